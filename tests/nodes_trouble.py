"""What nodes say and leave behind in trouble, on tiny models. Run inside ComfyUI's Python by nodes_measure.py."""

from __future__ import annotations

import json
import tempfile
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

PHRASES = ["cat", "a painting of the old airplane", ""]
#: as little work as a node can be given
SMALL: dict[str, Any] = {
    "vocabulary": 48, "candidates": 4, "words": 1, "words_beyond": 1, "response": -1.0, "response_beyond": -1.0, "prior": 0.0,
    "m": 2, "n": 2, "trajectories": 1, "trajectory_steps": 2, "steps": 4, "picture_size": 64, "preview_every": 0,
    "pictures": 1, "sampling_steps": 2,
}  # fmt: skip


def trouble(backend: Any) -> dict[str, str]:
    """All checks of this file, each one's answers as JSON."""
    nodes = all_nodes()
    found = {
        "upstream": upstream(backend),
        "nan": broken(backend, nodes),
        "memory": memory(backend, nodes),
        "files": files(backend, nodes),
        "pictures": pictures(nodes),
        "curve": curve(),
    }
    return {name: json.dumps(answers) for name, answers in found.items()}


def all_nodes() -> dict[str, Any]:
    from realera_nodes.nodes import NODES

    for cls in NODES:
        cls.hidden = SimpleNamespace(unique_id=None, prompt={"1": {"class_type": "X", "inputs": {}}}, extra_pnginfo=None)
    return {cls.define_schema().node_id.removeprefix("RealEra_"): cls for cls in NODES}


def execute(cls: Any, **given: Any) -> Any:
    """A node with its defaults, made small, for what is not given."""
    inputs = {i.id: i.default for i in cls.define_schema().inputs if getattr(i, "default", None) is not None}
    return cls.execute(**(inputs | {k: v for k, v in SMALL.items() if k in inputs} | given))


def said(attempt: Callable[[], Any]) -> str:
    """The sentence that an attempt ends in, or what else it ended in."""
    from realera_nodes.core.errors import ErasureError

    try:
        attempt()
    except ErasureError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def upstream(backend: Any) -> dict[str, Any]:
    """LoRAs on the model and on the encoder, and clip skip: they count, and the pack's own text path gives the host's states."""
    from realera_nodes.backends.comfy import ComfyBackend
    from realera_nodes.backends.comfy_text import ComfyText

    clip, width = backend.text.clip, backend.context_width
    name = backend.names[-1]
    delta = torch.randn(backend.projections()[name].shape, generator=torch.Generator().manual_seed(1))
    model = backend.patcher.clone()
    model.add_patches({backend.keys[name]: ("diff", (delta,))}, 0.5)
    other = ComfyBackend(model, clip, side=backend.side)
    text = backend.encode(["cat"])
    z, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([500])
    with torch.no_grad():
        plain, patched = backend.predict_noise(z, t, text), other.predict_noise(z, t, text)
        with backend.edited({name: 0.5 * delta}):
            wanted = backend.predict_noise(z, t, text)
    found = {
        "projection": float((other.projections()[name] - backend.projections()[name] - 0.5 * delta).abs().max()),
        "noise": float((patched - wanted).abs().max()), "noise moved": float((patched - plain).abs().max()),
        "same network": other.model_hash() == backend.model_hash(),
    }  # fmt: skip
    key = next(k for k in clip.patcher.get_key_patches() if k.endswith("mlp.fc1.weight"))
    weight = clip.patcher.get_key_patches()[key][0][0]
    with_lora, skipping = clip.clone(), clip.clone()
    with_lora.add_patches({key: ("diff", (torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)),))}, 0.5)
    skipping.clip_layer({"sd1": -2, "sd2": -1, "sdxl": -1}[backend.kind])
    before = backend.encode(PHRASES).states
    for case, changed in {"lora": with_lora, "skip": skipping}.items():
        own = ComfyText(changed, width)
        host = own.encode(PHRASES)
        at = [ids.index(49407, 1) for ids in host.ids]
        ends = own.end_states(PHRASES)
        found[f"{case} ends"] = float((host.states[range(len(at)), at] - ends).abs().max() / ends.abs().max())
        found[f"{case} moved"] = float((host.states - before).abs().max())
        found[f"{case} hash"] = own.encoder_hash() != backend.encoder_hash()
    return found


def rest() -> None:
    """Unloads all models: while one is loaded, the host holds its patches in the weights that all clones share."""
    import comfy.model_management

    comfy.model_management.unload_all_models()


def concept() -> Any:
    from realera_nodes.core.concepts import Concept, Preserved

    return Concept("airplane", "sky", preserve=(Preserved("bird"),), templates=("a photo of the {}",))


def broken(backend: Any, nodes: dict[str, Any]) -> dict[str, str]:
    """What each node says that computes with a model that holds NaN, in cross-attention or elsewhere."""
    given = {"model": backend.patcher, "clip": backend.text.clip}
    words = {"phrase": "airplane", "anchor": "sky"}
    attempts = {
        "MineNeighbors": given | {"concepts": (concept(),)}, "TrainLora": given | {"concepts": (concept(),)},
        "ClosedForm": given | {"concepts": (concept(),)}, "Erase": given | words,
        "Report": given | {"concepts": (concept(),), "vae": object()},
        "Uce": given | {"concepts": (concept(),)}, "TrainEsd": given | {"concepts": (concept(),)},
    }  # fmt: skip
    rest()
    net, found = backend.patcher.model.diffusion_model, {}
    places = {"attention": next(p for n, p in net.named_parameters() if n.endswith("attn2.to_v.weight")),
              "elsewhere": net.input_blocks[0][0].weight}  # fmt: skip
    for place, weight in places.items():
        kept = weight.clone()
        weight.flatten()[0] = float("nan")
        for name, more in attempts.items():
            found[f"{place} {name}"] = said(lambda name=name, more=more: execute(nodes[name], **more))
        weight.copy_(kept)
    del found["elsewhere ClosedForm"], found["elsewhere Uce"]  # they ask nothing of the network but its cross-attention
    return found


def memory(backend: Any, nodes: dict[str, Any]) -> dict[str, Any]:
    """Running out of memory in the third prediction of a training: what is said, kept, left on the network and changed."""
    import comfy.model_management

    from realera_nodes.backends.comfy_student import HookStudent

    rest()
    before = {key: value.clone() for key, value in backend.patcher.model.state_dict().items()}
    predict, empty = HookStudent.predict_noise, comfy.model_management.soft_empty_cache
    large: list[weakref.ref] = []
    freed: list[bool] = []
    failure: list[Exception] = []
    calls = [0]

    def fail(self: HookStudent, *args: Any) -> torch.Tensor:
        calls[0] += 1
        activations = torch.zeros(1000)
        if calls[0] < 3:
            return predict(self, *args)
        large.append(weakref.ref(activations))
        raise failure[-1]

    def record(*args: Any) -> None:
        freed.append(bool(large) and large[-1]() is None)
        empty(*args)

    errors = {"gpu": torch.cuda.OutOfMemoryError("CUDA out of memory"), "host": MemoryError(),
              "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
              "other": RuntimeError("mat1 and mat2 shapes cannot be multiplied")}  # fmt: skip
    found: dict[str, Any] = {}
    HookStudent.predict_noise, comfy.model_management.soft_empty_cache = fail, record  # type: ignore[method-assign]
    try:
        for name, error in errors.items():
            failure.append(error)
            calls[0] = 0
            given = {"model": backend.patcher, "clip": backend.text.clip, "concepts": (concept(),)}
            found[name] = said(lambda given=given: execute(nodes["TrainLora"], **given))
            found[f"{name} calls"], found[f"{name} freed"] = calls[0], freed[-1]
    finally:
        HookStudent.predict_noise, comfy.model_management.soft_empty_cache = predict, empty  # type: ignore[method-assign]
    rest()
    net = backend.patcher.model
    found["hooks"] = sum(len(m._forward_hooks) for m in net.modules())
    found["changed"] = sum(not torch.equal(net.state_dict()[key], value) for key, value in before.items())
    found["trained again"] = said(lambda: execute(nodes["TrainLora"], **given))
    return found


def files(backend: Any, nodes: dict[str, Any]) -> dict[str, Any]:
    """Names and metadata of saved files, with --disable-metadata and without."""
    import folder_paths
    from comfy.cli_args import args

    from realera_nodes.backends.comfy_edits import EditRecord, ErasureLora, with_deltas
    from realera_nodes.formats.stream import SafetensorsFile

    record = EditRecord("test", ("cat",), ("dog",), (), {})
    weights = dict(backend.projections())
    lora = ErasureLora(
        {n: (torch.ones(1, w.shape[1]), torch.ones(w.shape[0], 1)) for n, w in weights.items()}, record, backend.kind
    )
    model = with_deltas(backend.patcher, {n: torch.ones_like(w) for n, w in weights.items()}, record)
    # of CLIP and VAE only what saving asks of them: the vocabulary alone would be 150 MB
    clip = SimpleNamespace(load_model=lambda: backend.patcher, get_sd=dict, state_dict_for_saving=dict,
                           patcher=SimpleNamespace(model_size=lambda: 0))  # fmt: skip
    vae = SimpleNamespace(get_sd=dict, patcher=clip.patcher)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        kept = folder_paths.get_output_directory(), args.disable_metadata
        folder_paths.set_output_directory(folder)
        try:
            for args.disable_metadata in (False, True):
                saved = [
                    execute(nodes["SaveLora"], lora=lora).ui["lora"][0],
                    execute(nodes["SaveCheckpoint"], model=model, clip=clip, vae=vae).ui["checkpoint"][0],
                ]
                for item in saved:
                    path = f"{folder}/{item['subfolder']}/{item['filename']}"
                    found[f"{item['subfolder']}/{item['filename']}"] = SafetensorsFile.open(path).metadata
        finally:
            folder_paths.set_output_directory(kept[0])
            args.disable_metadata = kept[1]
    return found


def pictures(nodes: dict[str, Any]) -> dict[str, Any]:
    """Pictures and masks on a concept, and what is said of those that do not fit."""

    def made(phrase: str = "cat", **given: Any) -> Any:
        return execute(nodes["Concept"], phrase=phrase, anchor="dog", **given).result[0]

    images = torch.rand(2, 6, 8, 4)
    mask = torch.zeros(2, 3, 4)
    mask[:, 1:, :2] = 1
    full = made(images=images, masks=mask, concepts=made("car"))
    return {
        "count": len(full), "none": full[0].images is None,
        "images": bool(torch.equal(full[1].images, images[..., :3].permute(0, 3, 1, 2))),
        "shape": list(full[1].masks.shape), "corners": [float(full[1].masks[0, y, x]) for y, x in ((0, 0), (5, 0), (5, 7))],
        "flat": list(made(images=images[:1], masks=mask[0])[0].masks.shape),
        "empty": said(lambda: made(images=images, masks=torch.zeros(2, 64, 64))),
        "fewer": said(lambda: made(images=images, masks=mask[:1])),
        "alone": said(lambda: made(masks=mask)),
    }  # fmt: skip


def curve() -> list[tuple[int, list[float]]]:
    """What the page hears of two trainings of one node, one after the other: (first step, losses)."""
    from realera_nodes.backends import comfy_output

    heard: list[tuple[int, list[float]]] = []
    server = SimpleNamespace(client_id="me", send_sync=lambda kind, news, to: heard.append((news["start"], news["losses"])))
    kept, comfy_output._server = comfy_output._server, lambda: server
    try:
        progress = comfy_output.NodeProgress("1")
        for losses in ([0.5, 0.4], [0.9, 0.8, 0.7]):
            for step in range(len(losses)):
                progress.losses(losses[: step + 1], len(losses))
    finally:
        comfy_output._server = kept
    return heard
