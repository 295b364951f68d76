"""Nodes on models that carry patches of how they are sampled. Run by ComfyUI's Python.

python nodes_sampling.py COMFYUI OUT: OUT gets, as JSON and by patch, what the network is told and what nodes say.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: name -> (module of the host, its node, inputs)
SCHEDULES: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{kind: ("model_advanced", "ModelSamplingDiscrete", {"sampling": kind, "zsnr": False})
       for kind in ("eps", "v_prediction", "lcm", "x0", "img_to_img")},
    "eps zsnr": ("model_advanced", "ModelSamplingDiscrete", {"sampling": "eps", "zsnr": True}),
    "lcm zsnr": ("model_advanced", "ModelSamplingDiscrete", {"sampling": "lcm", "zsnr": True}),
    **{f"edm {kind}": ("model_advanced", "ModelSamplingContinuousEDM", {"sampling": kind, "sigma_max": 120.0, "sigma_min": 0.002})
       for kind in ("v_prediction", "edm", "edm_playground_v2.5", "eps", "cosmos_rflow")},
    "continuous v": ("model_advanced", "ModelSamplingContinuousV",
                     {"sampling": "v_prediction", "sigma_max": 500.0, "sigma_min": 0.03}),
    "sd3": ("model_advanced", "ModelSamplingSD3", {"shift": 3.0}),
    "auraflow": ("model_advanced", "ModelSamplingAuraFlow", {"shift": 1.73}),
    "flux": ("model_advanced", "ModelSamplingFlux", {"max_shift": 1.15, "base_shift": 0.5, "width": 512, "height": 512}),
    "cascade": ("model_advanced", "ModelSamplingStableCascade", {"shift": 2.0}),
}  # fmt: skip
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "rescale": ("model_advanced", "RescaleCFG", {"multiplier": 0.7}),
    "compute dtype": ("model_advanced", "ModelComputeDtype", {"dtype": "bf16"}),
    "freeu": ("freelunch", "FreeU", {"b1": 1.1, "b2": 1.2, "s1": 0.9, "s2": 0.2}),
    "freeu v2": ("freelunch", "FreeU_V2", {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}),
    "hypertile": ("hypertile", "HyperTile", {"tile_size": 32, "swap_size": 2, "max_depth": 0, "scale_depth": False}),
    "pag": ("pag", "PerturbedAttentionGuidance", {"scale": 3.0}),
    "sag": ("sag", "SelfAttentionGuidance", {"scale": 0.5, "blur_sigma": 2.0}),
    "tome": ("tomesd", "TomePatchModel", {"ratio": 0.3}),
    "downscale": ("model_downscale", "PatchModelAddDownscale",
                  {"block_number": 1, "downscale_factor": 2.0, "start_percent": 0.0, "end_percent": 0.35,
                   "downscale_after_skip": True, "downscale_method": "bicubic", "upscale_method": "bicubic"}),
    "differential": ("differential_diffusion", "DifferentialDiffusion", {}),
}  # fmt: skip
STEPS = (19, 20, 259, 500, 819, 999)


def host_node(model: Any, module: str, name: str, inputs: dict[str, Any]) -> Any:
    """A node of the host on a model, of either schema."""
    cls = getattr(importlib.import_module(f"comfy_extras.nodes_{module}"), name)
    if hasattr(cls, "define_schema"):
        given = cls.execute(model=model, **inputs)
        return getattr(given, "result", given)[0]
    return getattr(cls(), cls.FUNCTION)(model=model, **inputs)[0]


def strangers(model: Any) -> dict[str, Any]:
    """Patches as other packs make them: of the schedule, the sampler, the attention."""
    import comfy.model_sampling
    import comfy.patcher_extension

    def picture_prompt(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
        from comfy.ldm.modules.attention import optimized_attention

        assert float(extra["sigmas"].detach().cpu()[0]) > 0
        each = len(q) // len(extra["cond_or_uncond"])
        more = torch.zeros(each * len(extra["cond_or_uncond"]), 4, k.shape[2], device=k.device, dtype=k.dtype)
        return optimized_attention(q, k, v, extra["n_heads"]) + 0.1 * optimized_attention(q, more, more, extra["n_heads"])

    class Other(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
        """A schedule of discrete steps of another make."""

    class Every(comfy.model_sampling.EPS, torch.nn.Module):
        """Every fifth of the model's own levels, with nothing in common with the host's classes but the methods."""

        def __init__(self, base: Any):
            super().__init__()
            self.base, self.sigmas, self.sigma_data = base, base.sigmas[4::5].clone(), 1.0
            self.sigma_min, self.sigma_max = self.sigmas[0], self.sigmas[-1]

        def timestep(self, sigma: Tensor) -> Tensor:
            return (sigma - self.sigmas[:, None]).abs().argmin(0) * 5 + 4

        def sigma(self, timestep: Tensor) -> Tensor:
            return self.sigmas[(timestep.long() // 5).clamp(max=len(self.sigmas) - 1)]

    class Blind(Every):
        """The same levels, of which the network is told only their number."""

        def timestep(self, sigma: Tensor) -> Tensor:
            return (super().timestep(sigma) - 4) // 5

    def clone(change: Any) -> Any:
        patched = model.clone()
        change(patched)
        return patched

    def schedule(made: Any) -> Any:
        return clone(lambda m: m.add_object_patch("model_sampling", made))

    def wrap(apply: Any, given: dict[str, Any]) -> Tensor:
        return apply(given["input"], given["timestep"], **given["c"])

    base = model.get_model_object("model_sampling")
    return {
        "other discrete": schedule(Other(model.model.model_config, zsnr=False)), "every fifth": schedule(Every(base)),
        "blind fifth": schedule(Blind(base)),
        "picture prompt": clone(lambda m: m.set_model_attn2_replace(picture_prompt, "middle", 0, 0)),
        "attention": clone(lambda m: m.set_model_attn1_patch(lambda q, k, v, extra: (q, k, v))),
        "unet wrapper": clone(lambda m: m.set_model_unet_function_wrapper(wrap)),
        "cfg function": clone(lambda m: m.set_model_sampler_cfg_function(
            lambda given: given["uncond"] + given["cond_scale"] * (given["cond"] - given["uncond"]))),
        "wrapper": clone(lambda m: m.add_wrapper(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL,
                                                 lambda run, *args, **more: run(*args, **more))),
    }  # fmt: skip


def told(backend: Any) -> dict[str, Any]:
    """Of predictions at ``STEPS``: how far the timesteps that the network is told are from them, how loud its input is against
    1, and the noise it predicts in a grey picture against what is there; the schedule's levels against the network's."""
    net, heard = backend.patcher.model.diffusion_model, []
    forward = net.forward

    def spy(x: Tensor, timesteps: Tensor, *args: Any, **more: Any) -> Tensor:
        heard.append((float(timesteps[0]), float(x.float().std())))
        return forward(x, timesteps, *args, **more)

    steps = torch.tensor(STEPS)
    levels = (1 - backend.alphas()[steps]).sqrt()
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text, found = backend.encode(["a photo of the cat"]), []
    net.forward = spy
    try:
        for t, level in zip(steps, levels, strict=True):
            found.append(float((backend.predict_noise(level * noise, t[None], text) - noise).norm() / noise.norm()))
    finally:
        net.forward = forward
    ts, alphas = backend.schedule(10)
    return {
        "told": max(abs(t - float(s)) for (t, _), s in zip(heard, steps, strict=True)),
        "loud": max(abs(std / float(level * noise.std()) - 1) for (_, std), level in zip(heard, levels, strict=True)),
        "noise": found, "timesteps": ts.tolist(), "alphas": alphas.tolist(),
    }  # fmt: skip


def asked(model: Any, clip: Any, vae: Any, nodes: dict[str, Any]) -> dict[str, Any]:
    """What nodes do with a patched model."""
    from nodes_trouble import concept, execute, said

    from realera_nodes.backends.comfy import ComfyBackend
    from realera_nodes.core.errors import ErasureError

    one = {"model": model, "clip": clip, "concepts": (concept(),)}
    backend = ComfyBackend(model, clip, vae, side=64)
    edited = execute(nodes["ClosedForm"], **one).result[0]  # which asks the network nothing
    found: dict[str, Any] = {"kept": edited.object_patches.keys() == model.object_patches.keys()}
    found["train"] = said(lambda: execute(nodes["TrainLora"], **one, steps=2, guidance=1.0))
    found["pictures"] = said(lambda: backend.pictures(["a photo of the cat"], [0], steps=2))
    try:
        with torch.no_grad():
            found |= told(backend)
    except ErasureError as error:
        found["refused"] = str(error)
    return found


def main() -> None:
    host, out, *wanted = sys.argv[1:]
    sys.argv = ["main.py", "--cpu"]
    sys.path[:0] = [host, str(Path(__file__).parents[1])]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sd
    from nodes_trouble import all_nodes  # beside this script; "tests" is ComfyUI's own here

    from realera_nodes.demo import expand

    with torch.inference_mode():
        model, clip, vae = comfy.sd.load_checkpoint_guess_config(str(expand.checkpoint_path()))[:3]
        models = {"nothing": lambda: model}
        models |= {name: lambda given=given: host_node(model, *given) for name, given in (SCHEDULES | OTHERS).items()}
        models |= {name: lambda made=made: made for name, made in strangers(model).items()}
        nodes = all_nodes()
        found = {name: asked(make(), clip, vae, nodes) for name, make in models.items() if not wanted or name in wanted}
        found["nothing again"] = asked(model, clip, vae, nodes)  # after all others on the same network
    Path(out).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
