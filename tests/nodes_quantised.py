"""Every node on models whose weights are float8 or quantised, run by ComfyUI's Python.

python nodes_quantised.py COMFYUI OUT all|few FORMAT ...: OUT gets what each node said and how precise edits are, as JSON;
``few``: of the training nodes the first alone.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

UNET = "model.diffusion_model."
#: the embedded model held in a type of the host's choosing (Load Diffusion Model's weight_dtype, --fp8_e4m3fn-unet)
HELD = {"e4m3fn": "float8_e4m3fn", "e5m2": "float8_e5m2", "half": "float16"}
#: formats of files that hold numbers with scales; the host's own names
SCALED = {"scaled-fp8": None, "fp8": "float8_e4m3fn", "int8": "int8_tensorwise", "mxfp8": "mxfp8", "nvfp4": "nvfp4"}
PROMPT = "a photo of the airplane"


def written(format: str, out: Path) -> Path:
    """The embedded checkpoint with every linear layer of its UNet in ``format``."""
    from safetensors.torch import load_file, save_file

    from realera_nodes.demo import expand

    state = load_file(expand.checkpoint_path())
    # two of nvfp4's numbers lie in one byte, and the host tells a model's kind by the width of to_k
    ends = ".weight" if format != "nvfp4" else ("to_v.weight", "to_q.weight", "proj.weight")
    for key in [k for k, v in state.items() if k.startswith(UNET) and k.endswith(ends) and v.ndim == 2]:
        layer, value = key.removesuffix(".weight"), state[key].float()
        if format == "scaled-fp8":
            scale = value.abs().max() / 448
            state[key], state[f"{layer}.scale_weight"] = (value / scale).to(torch.float8_e4m3fn), scale
            continue
        from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

        held = QuantizedTensor.from_float(value.bfloat16(), QUANT_ALGOS[SCALED[format]]["comfy_tensor_layout"])
        del state[key]
        state |= held.state_dict(key)
        state[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps({"format": SCALED[format]}).encode()), dtype=torch.uint8)
    if format == "scaled-fp8":
        state[f"{UNET}scaled_fp8"] = torch.tensor([], dtype=torch.float8_e4m3fn)
    save_file({k: v.contiguous() for k, v in state.items()}, out)
    return out


def loaded(format: str, folder: Path) -> tuple[Any, Any, Any]:
    """MODEL, CLIP, VAE."""
    import comfy.sd

    from realera_nodes.demo import expand

    options = {"dtype": getattr(torch, HELD[format])} if format in HELD else {}
    path = expand.checkpoint_path() if format in HELD else written(format, folder / f"{format}.safetensors")
    return comfy.sd.load_checkpoint_guess_config(str(path), model_options=options)[:3]


def in_use(model: Any, keys: dict[str, str]) -> dict[str, Tensor]:
    """The weights that the host computes with once a MODEL is loaded, (out, d) float32 by canonical name."""
    import comfy.model_management
    from comfy.model_patcher import get_key_weight

    comfy.model_management.load_models_gpu([model], force_full_load=True)
    found = {}
    for name, key in keys.items():
        weight, _, convert = get_key_weight(model.model, key)
        full = weight.detach().to("cpu", torch.float32, copy=True)
        found[name] = (convert(full, inplace=True) if convert else full).clone()
    comfy.model_management.unload_all_models()
    return found


def lost(states: Tensor, got: dict[str, Tensor], base: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """How far what an edit does to a text's keys and values, (L, d) its states, is from what it should do, of the latter."""
    apart = [((got[n] - base[n] - delta) @ states.T).norm() / (delta @ states.T).norm() for n, delta in wanted.items()]
    return float(torch.stack(apart).mean())


def precision(model: Any, clip: Any, vae: Any, nodes: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Of a closed-form edit: the types of its patches, what they, the loaded weights and a saved checkpoint lose of it."""
    import comfy.sd
    from nodes_trouble import concept, execute

    from realera_nodes.backends.comfy import ComfyBackend
    from realera_nodes.backends.comfy_edits import split

    backend = ComfyBackend(model, clip, side=64)
    states = backend.encode([PROMPT]).states[0, 1:10]
    keys = {name: backend.keys[name] for name in backend.names}
    before = in_use(model, keys)
    base = {name: w.clone() for name, w in backend.projections().items()}
    edited, lora, _ = execute(nodes["ClosedForm"], model=model, clip=clip, concepts=(concept(),)).result
    solved = {name: up @ down for name, (down, up) in lora.factors.items()}
    kept = split(edited)[1]
    patches = [p[1][1][0] for key in keys.values() for p in edited.patches[key]]
    after = in_use(edited, keys)
    saved = execute(nodes["SaveCheckpoint"], model=edited, clip=clip, vae=vae).ui["checkpoint"][0]
    again = comfy.sd.load_checkpoint_guess_config(f"{folder}/{saved['subfolder']}/{saved['filename']}")
    reopened = in_use(again[0], keys)
    return {
        "held": str(model.model.get_dtype()),
        "bits": sorted({torch.finfo(p.dtype).bits for p in patches}),
        "read": max(float((base[n] - before[n]).norm() / before[n].norm()) for n in base),
        "delta": max(float((kept[n] - solved[n]).norm() / solved[n].norm()) for n in solved),
        "loaded": lost(states, after, base, solved),
        "saved": lost(states, reopened, base, solved),
        "base changed": sum(not torch.equal(w, before[n]) for n, w in in_use(model, keys).items()),
    }


def every_node(model: Any, clip: Any, vae: Any, nodes: dict[str, Any], few: bool) -> dict[str, str]:
    """What each node that takes a MODEL says: "nothing" where it worked."""
    from nodes_trouble import concept, execute, said

    given = {"model": model, "clip": clip}
    one = given | {"concepts": (concept(),)}
    found: dict[str, str] = {}
    kept: dict[str, Any] = {}

    def attempt(name: str, node: str = "", **more: Any) -> None:
        def work() -> None:
            kept[name] = execute(nodes[node or name], **more).result

        found[name] = said(work)

    attempt("ClosedForm", **one)
    if "ClosedForm" in kept:
        attempt("TrainLora", **(one | {"model": kept["ClosedForm"][0], "vae": vae, "steps": 2, "preview_every": 2}))
    attempt("TrainEsd x", node="TrainEsd", **one, steps=1, variant="x")
    if few:
        return found
    attempt("MineNeighbors", **one)
    if "ClosedForm" in kept:
        attempt("Report", **(one | {"model": kept["ClosedForm"][0], "vae": vae}))
    if "TrainLora" in kept:
        attempt("SaveLora", lora=kept["TrainLora"][1])
        attempt("SaveCheckpoint", model=kept["TrainLora"][0], clip=clip, vae=vae)
    attempt("Erase", **given, phrase="airplane", anchor="sky", words=0)
    attempt("Uce", **one)
    attempt("BuildPrior", **given, retained="cat\ndog", captions="a man rides a bike")
    attempt("Refinement", **one)
    if "Refinement" in kept:
        refined = {"model": kept["Refinement"][0], "clip": clip}
        attempt("TrainSuppression", **refined, concept=(concept(),), paper_settings=False, images=1, image_steps=2, batch=1)
        if "TrainSuppression" in kept:
            attempt("FuseLoras", **refined, loras=kept["TrainSuppression"][2], paper_settings=False)
    attempt("EraseMany", **given, list="airplane -> sky", paper_settings=False, images=1, image_steps=2, batch=1)
    attempt("TrainEsd u", node="TrainEsd", **one, steps=1, variant="u")
    return found


def answers(format: str, folder: Path, few: bool) -> dict[str, Any]:
    """All of this file for one format."""
    from nodes_trouble import all_nodes, rest  # beside this script; "tests" is ComfyUI's own here

    model, clip, vae = loaded(format, folder)
    nodes = all_nodes()
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    found: dict[str, Any] = {"said": every_node(model, clip, vae, nodes, few)}
    rest()
    after = model.model.state_dict()
    found["changed"] = [k for k, v in before.items() if not torch.equal(plain(after[k]), plain(v))]
    found["hooks"] = sum(len(m._forward_hooks) for m in model.model.modules())
    return found | precision(model, clip, vae, nodes, folder)


def plain(value: Tensor) -> Tensor:
    """Bits that can be compared, whatever their type."""
    return value.contiguous().reshape(-1).view(torch.uint8) if value.numel() else value.flatten().float()


def main() -> None:
    host, out, amount, *formats = sys.argv[1:]
    sys.argv = ["main.py", "--cpu"]
    sys.path[:0] = [host, str(Path(__file__).parents[1])]
    import comfy.options

    comfy.options.enable_args_parsing()
    import folder_paths

    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        folder_paths.set_output_directory(folder)
        found = {format: answers(format, Path(folder), amount == "few") for format in formats}
    Path(out).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
