"""What both backends are asked, so that their answers can be compared. Run by ComfyUI's Python, it asks ComfyUI's.

python -O nodes_measure.py COMFYUI KIND PREDICTION CHECKPOINT OUT: the tiny text encoders have too few layers for an
assertion of the host's, hence -O.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SIDE, LATENT = 16, 8
PROMPTS = ["cat", "a painting of the (old:1.3) airplane", ""]
#: tiny stand-ins for the layers of real encoders; SD2's penultimate layer is its last but one
LAYERS = {"intermediate_size": 64, "num_hidden_layers": 2}


def fixed_noise(seeds: Any) -> Tensor:
    """Latents of the tiny models, whose VAE shrinks less than 8 times."""
    return torch.stack([torch.randn(4, LATENT, LATENT, generator=torch.Generator().manual_seed(s)) for s in seeds])


def measure(backend: Any) -> dict[str, Tensor]:
    """Text, weights, noise, trajectories, and an erasure's transform, losses and LoRA."""
    from realera_nodes.core.concepts import Concept, Preserved
    from realera_nodes.erasure import ErasureConfig, erase

    backend.noise = fixed_noise
    text = backend.encode(PROMPTS)
    found = {"states": text.states, "ids": torch.tensor(text.ids), "ends": backend.end_states(PROMPTS)}
    if text.pooled is not None:
        found["pooled"] = text.pooled
    [(found["rows"], found["weights"])] = backend.rows(PROMPTS)
    [(found["all rows"], found["all weights"])] = backend.rows(PROMPTS, start=True)
    found["phrase"] = torch.tensor(backend.phrase_ids("old airplane"))
    found |= {f"projection {name}": w.float() for name, w in backend.projections().items()}
    with torch.no_grad():
        found["noise"] = backend.predict_noise(fixed_noise(range(3)), torch.tensor([1, 500, 981]), text)
    run = backend.trajectories("a photo of the sky", 2, 5, 1.0, 3)
    found |= {"latents": run.latents, "timesteps": run.timesteps}
    base = ErasureConfig()
    config = replace(
        base,
        neighbors=replace(
            base.neighbors, vocabulary=48, candidates=6, words=2, words_beyond=2, response=-1.0, response_beyond=-1.0
        ),
        closed_form=replace(base.closed_form, prior=0.0),
        alignment=replace(base.alignment, steps=4, lr=1e-3, rank=2, alpha=1.0, trajectories=1, trajectory_steps=4, guidance=1.0),
    )
    result = erase(backend, [Concept("airplane", "sky", preserve=(Preserved("bird"),))], config)
    assert result.transform is not None
    assert result.state is not None
    found |= {"change": result.transform.change, "losses": torch.tensor(result.state.losses)}
    for name, (down, up) in result.factors.items():
        found |= {f"down {name}": down, f"up {name}": up}
    with torch.no_grad(), backend.edited(result.deltas(dict(backend.projections()))):
        found["erased noise"] = backend.predict_noise(fixed_noise(range(3)), torch.tensor([1, 500, 981]), text)
    return found | others(backend, text)


def others(backend: Any, text: Any) -> dict[str, Tensor]:
    """UCE's transform; ESD's losses, and the noise of the networks it trained."""
    from realera_nodes.core.concepts import Concept, Preserved
    from realera_nodes.core.esd import EsdConfig
    from realera_nodes.core.uce import UceConfig
    from realera_nodes.esd import erase_esd
    from realera_nodes.uce import erase_uce

    concepts = [Concept("airplane", "sky", preserve=(Preserved("bird"),))]
    found = {"uce change": erase_uce(backend, concepts, UceConfig()).transform.change}
    for variant, lr in (("x", 1e-4), ("u", 1e-5)):
        config = EsdConfig(variant=variant, steps=3, lr=lr, sampling_steps=3)
        outcome = erase_esd(backend, concepts, config)
        found[f"esd-{variant} losses"] = torch.tensor(outcome.losses)
        with torch.no_grad(), outcome.on(backend):
            found[f"esd-{variant} noise"] = backend.predict_noise(fixed_noise(range(3)), torch.tensor([1, 500, 981]), text)
        found |= {f"esd-{variant} {name}": outcome.weights[name] for name in sorted(outcome.weights)[:3]}
    return found


def comfy_backend(kind: str, prediction: str, checkpoint: Path) -> Any:
    """ComfyUI's loaders with the detection of a model's kind left out, which knows the real sizes only."""
    import comfy.model_base
    import comfy.model_detection
    import comfy.sd
    import comfy.supported_models
    import comfy.utils
    from comfy.model_patcher import ModelPatcher

    from realera_nodes.backends.comfy import ComfyBackend

    state = comfy.utils.load_torch_file(str(checkpoint))
    prefix = "model.diffusion_model."
    family = {"sd1": "SD15", "sd2": "SD20", "sdxl": "SDXL"}[kind]
    config = getattr(comfy.supported_models, family)(comfy.model_detection.detect_unet_config(state, prefix))
    config.set_inference_dtype(torch.float32, None)
    types = comfy.model_base.ModelType
    kinds = {"epsilon": types.EPS, "v_prediction": types.V_PREDICTION}
    net = (comfy.model_base.SDXL if kind == "sdxl" else comfy.model_base.BaseModel)(
        config, model_type=kinds[prediction], device="cpu"
    )
    net.load_model_weights(state, prefix)
    words = config.process_clip_state_dict(state)
    options = {"dtype": torch.float32, **{f"clip_{k}_model_config": LAYERS for k in "lhg"}}
    clip = comfy.sd.CLIP(config.clip_target(state), tokenizer_data=words, model_options=options)
    clip.load_sd(words, full_model=True)
    cpu = torch.device("cpu")
    return ComfyBackend(ModelPatcher(net, load_device=cpu, offload_device=cpu), clip, side=SIDE)


def refusals(backend: Any) -> dict[str, str]:
    """Sentences for what the backend does not take, by case."""
    from types import SimpleNamespace

    import comfy.model_management

    from realera_nodes.backends.comfy import ComfyBackend
    from realera_nodes.backends.comfy_output import guarded
    from realera_nodes.core.errors import ErasureError

    class Flux(torch.nn.Module):
        model_config = SimpleNamespace(unet_config={"image_model": "flux"})

    def out_of_memory() -> None:
        with guarded():
            raise comfy.model_management.OOM_EXCEPTION("out of memory")

    norm = torch.nn.LayerNorm(512)
    encoder = SimpleNamespace(transformer=SimpleNamespace(text_model=SimpleNamespace(final_layer_norm=norm)))
    other = SimpleNamespace(cond_stage_model=SimpleNamespace(clip_h=encoder), tokenize=lambda text: {"h": []})
    cases = {
        "flux": lambda: ComfyBackend(SimpleNamespace(model=Flux()), backend.text.clip),
        "clip": lambda: ComfyBackend(backend.patcher, other),
        "no clip": lambda: ComfyBackend(backend.patcher, None),
        "no vae": lambda: backend.pictures(["cat"], [0]),
        "embedding": lambda: backend.encode(["a photo of embedding:easynegative"]),
        "long": lambda: backend.encode(["cat " * 80]),
        "memory": out_of_memory,
    }
    found = {}
    for name, attempt in cases.items():
        try:
            attempt()
        except ErasureError as error:
            found[name] = str(error)
    return found


def traces(backend: Any) -> dict[str, str]:
    """What is left of edits on a model once they are taken apart again: hooks, changed bits, and the parts' difference."""
    from realera_nodes.backends.comfy_edits import EditRecord, ErasureLora, joined, split, with_deltas, with_lora

    record = EditRecord("test", ("cat",), ("dog",), (), {})
    weights = dict(backend.projections())
    before = {key: value.clone() for key, value in backend.patcher.model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    deltas = {n: 0.1 * torch.randn(w.shape, generator=generator) for n, w in weights.items()}
    factors = {n: (torch.randn(2, w.shape[1], generator=generator), torch.randn(w.shape[0], 2, generator=generator))
               for n, w in weights.items()}  # fmt: skip
    erased = with_lora(with_deltas(backend.patcher, deltas, record), ErasureLora(factors, record, backend.kind))
    base, found = split(erased)
    both = joined(factors, factors)
    wanted = {n: deltas[n] + factors[n][1] @ factors[n][0] for n in weights}
    try:
        with backend.edited(deltas):
            raise KeyError
    except KeyError:
        pass
    after = backend.patcher.model.state_dict()
    return {
        "split": str(max(float((found[n] - wanted[n]).abs().max()) for n in wanted)),
        "patches left": str(len(base.patches)),
        "joined": str(max(float((both[n][1] @ both[n][0] - 2 * factors[n][1] @ factors[n][0]).abs().max()) for n in wanted)),
        "changed": str(sum(not torch.equal(after[key], value) for key, value in before.items())),
        "hooks": str(sum(len(m._forward_hooks) for m in backend.patcher.model.modules())),
    }


def import_of_the_pack() -> dict[str, str]:
    """Processor seconds that the pack adds to the host's start, and what it imports that the host need not have."""
    import importlib
    import time

    importlib.import_module("comfy_api.v0_0_2")
    start = time.process_time()
    importlib.import_module("realera_nodes.nodes")
    seconds = time.process_time() - start
    heavy = ("diffusers", "peft", "gradio", "accelerate", "matplotlib", "typer", "rich")
    return {"import seconds": str(seconds), "heavy imports": ", ".join(n for n in heavy if n in sys.modules)}


def main() -> None:
    host, kind, prediction, checkpoint, out = sys.argv[1:]
    sys.argv = ["main.py", "--cpu"]
    sys.path[:0] = [host, str(Path(__file__).parents[1])]
    import comfy.options

    comfy.options.enable_args_parsing()
    light = import_of_the_pack()
    from nodes_trouble import trouble  # beside this script; "tests" is ComfyUI's own here
    from safetensors.torch import save_file

    with torch.inference_mode():
        backend = comfy_backend(kind, prediction, Path(checkpoint))
        found = measure(backend)
        said = refusals(backend) | traces(backend) | trouble(backend) | light
    save_file({name: value.detach().cpu().contiguous().clone() for name, value in found.items()}, out, said)


if __name__ == "__main__":
    main()
