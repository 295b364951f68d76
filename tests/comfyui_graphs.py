"""Graphs of the pack's nodes on one real ComfyUI server, started when a test first asks for it and stopped at exit."""

from __future__ import annotations

import atexit
import io
import tempfile
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from realera_nodes.demo import expand
from tests.conftest import PACK, ComfyServer, served, with_pack
from tests.http_graphs import fetch, queue, wait

#: the tests' own nodes and routes: the hash of a model's unpatched weights, a model that fails after some calls, progress, memory
PROBE = PACK / "tests" / "data" / "probe_nodes.py.txt"

_open = ExitStack()
atexit.register(_open.close)


@cache
def server() -> ComfyServer:
    """A server with the pack linked into custom_nodes, the tests' own nodes and the embedded checkpoint."""
    base = Path(_open.enter_context(tempfile.TemporaryDirectory(prefix="comfyui-nodes-")))
    (base / "custom_nodes" / "tests-probe").mkdir(parents=True)
    (base / "custom_nodes" / "tests-probe" / "__init__.py").write_text(PROBE.read_text())
    (base / "models" / "loras").mkdir(parents=True)
    environment = with_pack(base) | {"XDG_CACHE_HOME": str(base / "cache")}
    return _open.enter_context(served(base, environment))


@cache
def info() -> dict[str, Any]:
    """/object_info."""
    return httpx.get(f"{server().url}/object_info", timeout=60).json()


@cache
def base_hash() -> str:
    """The hash of the loaded weights before any of the pack's nodes has run."""
    return weights(server(), {"loader": loader()}, ["loader", 0])


@cache
def erased() -> dict[str, Any]:
    """The chain's outputs, with pictures of the base and of the erased model, and both saved."""
    base_hash()
    graph = chain(info()) | drawn(["train", 0])
    graph |= {
        "before": graph["sampler"] | {"inputs": graph["sampler"]["inputs"] | {"model": ["loader", 0]}},
        "before decode": node("VAEDecode", samples=["before", 0], vae=["loader", 2]),
        "before save": node("SaveImage", images=["before decode", 0], filename_prefix="tests/before"),
        "lora": node("RealEra_SaveLora", lora=["train", 1], filename_prefix="loras/tests-lora", precision="float32"),
        "edit lora": node("RealEra_SaveLora", lora=["edit", 1], filename_prefix="loras/tests-edit", precision="float16"),
        "checkpoint": node("RealEra_SaveCheckpoint", model=["train", 0], clip=["loader", 1], vae=["loader", 2],
                           filename_prefix="checkpoints/tests"),
    }  # fmt: skip
    return run(server(), graph)


def node(class_type: str, /, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def run(comfy: ComfyServer, graph: dict, seconds: float = 180) -> dict[str, Any]:
    """Queues a graph and returns its outputs by node."""
    done = wait(comfy.url, queue(comfy.url, graph), seconds)
    assert done["status"]["status_str"] == "success", (done["status"], comfy.log.read_text()[-3000:])
    return done["outputs"]


def failure(comfy: ComfyServer, graph: dict) -> dict[str, Any]:
    """Queues a graph that fails and returns the message of its failure."""
    done = wait(comfy.url, queue(comfy.url, graph))
    assert done["status"]["status_str"] == "error"
    return done["status"]["messages"][-1][1]


def pictures(comfy: ComfyServer, output: dict[str, Any]) -> np.ndarray:
    return np.stack([np.array(Image.open(io.BytesIO(fetch(comfy.url, i)))).astype(int) for i in output["images"]])


def loader(name: str = expand.CHECKPOINT) -> dict:
    return node("CheckpointLoaderSimple", ckpt_name=name)


def concept(phrase: str = "airplane", anchor: str = "sky", **more: Any) -> dict:
    return node("RealEra_Concept", **({"phrase": phrase, "anchor": anchor, "kind": "object", "aliases": "", "preserve": "bird: 2",
                                       "templates": "a photo of the {}"} | more))  # fmt: skip


def with_defaults(info: dict[str, Any], class_type: str, /, **inputs: Any) -> dict:
    """A node with the defaults of /object_info for what is not given."""
    fields = info[class_type]["input"]["required"]
    return node(class_type, **({n: f[1]["default"] for n, f in fields.items() if "default" in f[1]} | inputs))


def drawn(model: list, prompt: str = "a photo of the airplane", steps: int = 8) -> dict[str, dict]:
    """Nodes that draw two pictures with a model; ends in "save"."""
    return {
        "positive": node("CLIPTextEncode", text=prompt, clip=["loader", 1]),
        "negative": node("CLIPTextEncode", text="", clip=["loader", 1]),
        "latent": node("EmptyLatentImage", width=64, height=64, batch_size=2),
        "sampler": node("KSampler", model=model, positive=["positive", 0], negative=["negative", 0], latent_image=["latent", 0],
                        seed=3, steps=steps, cfg=5.0, sampler_name="euler", scheduler="normal", denoise=1.0),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["loader", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="tests/x"),
    }  # fmt: skip


def chain(info: dict[str, Any]) -> dict[str, dict]:
    """Loader, concept, mining, closed form and training, all as small as they go.

    The server keeps results of nodes that are in the next graph too, wired up or not: with the chain in it, nothing runs twice.
    """
    return {
        "loader": loader(),
        "concept": concept(),
        "mine": with_defaults(info, "RealEra_MineNeighbors", model=["loader", 0], clip=["loader", 1], concepts=["concept", 0],
                              vocabulary=64, candidates=8, words=2, words_beyond=2, trajectories=1, trajectory_steps=4,
                              picture_size=64),
        "edit": with_defaults(info, "RealEra_ClosedForm", model=["loader", 0], neighbors=["mine", 0], prior=0.0),
        "train": with_defaults(info, "RealEra_TrainLora", model=["edit", 0], clip=["loader", 1], neighbors=["mine", 0],
                               vae=["loader", 2], steps=4, lr=1e-3, trajectories=1, trajectory_steps=4, picture_size=64,
                               preview_every=2),
    }  # fmt: skip


_salt = iter(range(10**6))


def weights(comfy: ComfyServer, graph: dict, after: list) -> str:
    """The hash of the base's weights once ``after`` has run; no hook may be left on the network either."""
    probe = node("Test_Hash", model=["loader", 0], after=after, salt=next(_salt))
    digest, hooks = run(comfy, graph | {"probe": probe})["probe"]["text"]
    assert hooks == "0"
    return digest
