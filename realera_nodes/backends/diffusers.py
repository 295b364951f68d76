"""Stable Diffusion through a diffusers pipeline: SD1.x, SD2.x (eps and v) and SDXL."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..core.adapters import AdapterSettings, Factors, merged
from ..core.alignment import Trajectories
from ..core.errors import ErasureError
from ..core.noise import start_noise
from ..core.spans import TextStates
from ..formats.architecture import KINDS, SUPPORTED
from .diffusers_text import DiffusersText
from .full_weights import FullWeights, edited_parameters, full_weights
from .student import ADAPTER, PeftStudent

#: of latents, where the UNet does not say
LATENT_SIDE = {"sd1": 64, "sd2": 64, "sdxl": 128}


def _native(own: Any, kind: str, pipe: Any) -> int:
    """Side of the latents that a UNet was trained on, by its ``sample_size``. ErasureError: it is no number."""
    if own is None:
        v = pipe.scheduler.config.get("prediction_type") == "v_prediction"
        return 96 if kind == "sd2" and v else LATENT_SIDE[kind]
    sides = list(own) if isinstance(own, (list, tuple)) else [own]
    if not sides or not all(type(n) is int and 0 < n <= 1024 for n in sides):
        raise ErasureError(f"the UNet's sample_size is {own!r} instead of a number of latents such as 64: mend its config.json.")
    return max(sides)


class DiffusersBackend(DiffusersText):
    """A pipeline behind the project's protocol. Edits swap parameters inside contexts; no tensor of the pipeline is written to.

    Args:
        pipe: StableDiffusionPipeline or StableDiffusionXLPipeline
        size: side of the pictures in pixels; None is the model's own

    Attributes:
        kind: "sd1", "sd2" or "sdxl"
        context_width: width d of the text states
        side: of pictures, in pixels
        names: canonical names of the projections
        scheduler: DDIM on the model's own noise schedule, used for all sampling

    Raises:
        ErasureError: the pipeline is of another family, or its pictures cannot be of that size.
    """

    def __init__(self, pipe: Any, size: int | None = None):
        unet: Any = getattr(pipe, "unet", None)
        width = getattr(getattr(unet, "config", None), "cross_attention_dim", None)
        if width not in KINDS:
            raise ErasureError(
                f"{type(pipe).__name__} has no UNet with text cross-attention of width 768, 1024 or 2048: {SUPPORTED}."
            )
        if unet.config.in_channels != 4:
            raise ErasureError(f"the UNet reads {unet.config.in_channels} channels instead of 4, so this is an inpainting or "
                               "picture-to-picture model: choose its text-to-picture version.")  # fmt: skip
        self.unet, self.context_width, self.kind = unet, width, KINDS[width]
        cell = pipe.vae_scale_factor
        self.side: int = size or _native(unet.config.sample_size, self.kind, pipe) * cell
        if self.side < cell or self.side % cell:
            raise ErasureError(f"pictures of {self.side} pixels are not possible: choose a size that is a multiple of {cell}.")
        # other schedulers' configurations lack these, and DDIM's own defaults are not Stable Diffusion's
        self.scheduler = _ddim(pipe.scheduler.config)
        predicts = self.scheduler.config.prediction_type
        if predicts not in ("epsilon", "v_prediction"):
            raise ErasureError(
                f'the model predicts "{predicts}": only models that predict "epsilon" or "v_prediction" are supported.'
            )
        super().__init__(pipe, self.kind, next(unet.parameters()).device)
        self.names = [
            f"{n}.{p}" for n, m in unet.named_modules() if n.endswith("attn2") for p in ("to_k", "to_v") if hasattr(m, p)
        ]

    # weights

    def projections(self) -> dict[str, Tensor]:
        return {name: self.linear(name).weight.detach() for name in self.names}

    def linear(self, name: str) -> Any:
        """The layer of a canonical name, under its adapter if it has one. ErasureError: the UNet has no such layer."""
        try:
            module = self.unet.get_submodule(name)
        except AttributeError as error:
            raise ErasureError(f"the model has no layer {name}: the edit was made for another model.") from error
        return getattr(module, "base_layer", module)

    def edited(self, deltas: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Inside, the UNet computes with weight + delta, by a projection's canonical name or any parameter's own.

        The parameters themselves are put back, whatever happens. ErasureError: an edit of another model.
        """
        return edited_parameters(self.unet, {self._parameter(name): delta for name, delta in deltas.items()})

    def _parameter(self, name: str) -> str:
        """Path of the parameter that a name stands for."""
        if name.endswith((".weight", ".bias")):
            return name
        return f"{name}.base_layer.weight" if self.linear(name) is not self.unet.get_submodule(name) else f"{name}.weight"

    @contextmanager
    def adapted(self, factors: Factors) -> Iterator[None]:
        with self.edited({name: merged(factors, name) for name in factors}):
            yield

    @contextmanager
    def training(self, deltas: Mapping[str, Tensor], config: AdapterSettings) -> Iterator[PeftStudent]:
        """A student: base + ``deltas`` + a fresh LoRA of peft's. On leaving, the UNet is as it was.

        Raises:
            ErasureError: peft is not installed, no layer has a target's name, or ``deltas`` are of another model.
        """
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise ErasureError("training needs peft, which is not installed: pip install peft.") from error
        if not any(name.endswith(tuple(f".{t}" for t in config.targets)) for name, _ in self.unet.named_modules()):
            raise ErasureError(f"no layer of the model ends with {' or '.join(config.targets)}: choose other targets.")
        wanted = [p.requires_grad for p in self.unet.parameters()]
        alpha: Any = config.alpha or config.rank  # a float does as well, whatever peft's annotation says
        lora = LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=list(config.targets), init_lora_weights=False)
        try:
            self.unet.requires_grad_(False)
            self.unet.add_adapter(lora, adapter_name=ADAPTER)
            originals = {name: self.linear(name).weight for name in deltas}
            with self.edited(deltas):
                yield PeftStudent(self, originals, config)
        finally:
            self.unet.unload_lora()
            if hasattr(self.unet, "peft_config"):
                del self.unet.peft_config
            self.unet._hf_peft_config_loaded = False
            for p, flag in zip(self.unet.parameters(), wanted, strict=True):
                p.requires_grad_(flag)

    @contextmanager
    def training_weights(self, wanted: Callable[[str], bool]) -> Iterator[FullWeights]:
        """A student that trains whole parameters, those whose name is ``wanted``. On leaving, the UNet is as it was."""
        paths = {name: name for name, _ in self.unet.named_parameters() if wanted(name)}
        with full_weights(self, self.unet, paths) as student:
            yield student

    # pictures

    def schedule(self, steps: int) -> tuple[Tensor, Tensor]:
        """DDIM's timesteps (S,), noisiest first, and alpha_bar (S,) at each."""
        scheduler = copy.deepcopy(self.scheduler)  # it may be in the middle of something
        scheduler.set_timesteps(steps)
        timesteps = scheduler.timesteps.cpu().clone()
        return timesteps, scheduler.alphas_cumprod.cpu()[timesteps]

    def predict_noise(self, z: Tensor, t: Tensor, text: TextStates) -> Tensor:
        """eps(z_t, t, text): (B, 4, h, w) float32."""
        z, t = z.to(self.device), t.to(self.device)
        added = None
        if self.kind == "sdxl":
            if text.pooled is None:
                raise ErasureError("SDXL needs the pooled text state: encode the prompt with the model's own encoders.")
            size = torch.tensor([[self.side, self.side, 0, 0, self.side, self.side]], dtype=self.unet.dtype, device=self.device)
            added = {"text_embeds": text.pooled.to(self.device, self.unet.dtype), "time_ids": size.expand(len(z), -1)}
        states = text.states.to(self.device, self.unet.dtype)
        out = self.unet(z.to(self.unet.dtype), t, states, added_cond_kwargs=added)[0].float()
        if self.scheduler.config.prediction_type == "v_prediction":
            a = self.scheduler.alphas_cumprod.to(self.device)[t][:, None, None, None]
            return a.sqrt() * out + (1 - a).sqrt() * z.float()
        return out

    def _call(self, prompts: list[str], latents: Tensor, steps: int, guidance: float, output: str, callback=None) -> Any:
        kept = self.pipe.scheduler
        try:
            self.pipe.scheduler = self.scheduler
            self.pipe.set_progress_bar_config(disable=True)
            with self._lean():
                return self.pipe(prompts, latents=latents.to(self.device, self.unet.dtype), num_inference_steps=steps,
                                 guidance_scale=guidance, height=self.side, width=self.side, output_type=output,
                                 callback_on_step_end=callback).images  # fmt: skip
        finally:
            self.pipe.scheduler = kept

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Start noise (N, 4, h, w), as ``start_noise`` makes it."""
        return start_noise(seeds, self.side // self.pipe.vae_scale_factor)

    def alphas(self) -> Tensor:
        """Cumulative products of the noise schedule, (1000,)."""
        return self.scheduler.alphas_cumprod.float().cpu()

    def latents(self, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float, batch: int = 4) -> Tensor:
        """What sampling ends with, one for each (prompt, seed): (N, 4, h, w) in the UNet's scale, without noise."""
        parts = [slice(i, i + batch) for i in range(0, len(prompts), batch)]
        return torch.cat(
            [self._call(list(prompts[p]), self.noise(seeds[p]), steps, guidance, "latent").float().cpu() for p in parts]
        )

    @torch.no_grad()
    def encode_pictures(self, images: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) in [0, 1], brought to the model's size, as latents (N, 4, h, w) in the UNet's scale."""
        vae = self.pipe.vae
        sized = torch.nn.functional.interpolate(images.float(), (self.side, self.side), mode="bilinear", antialias=True)
        out = vae.encode((2 * sized - 1).to(self.device, vae.dtype))
        z = out.latents if hasattr(out, "latents") else out.latent_dist.mode()
        return (z * vae.config.scaling_factor).float().cpu()

    def trajectories(self, prompt: str, count: int, steps: int, guidance: float, seed: int) -> Trajectories:
        """Latents before every denoising step of ``count`` runs: what z_t is drawn from."""
        noise = self.noise(range(seed, seed + count))
        latents = [noise]

        def keep(pipe: Any, step: int, t: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
            latents.append(values["latents"].float().cpu())
            return values

        self._call([prompt] * count, noise, steps, guidance, "latent", keep)
        return Trajectories(torch.stack(latents[:-1], 1), self.scheduler.timesteps.cpu().clone())

    def pictures(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int = 20,
        guidance: float = 5.0,
        batch: int = 4,
        on_batch: Callable[[int], None] | None = None,
    ) -> Tensor:
        """One picture for each (prompt, seed): (N, 3, H, W) in [0, 1] on the CPU."""
        out = []
        for start in range(0, len(prompts), batch):
            part = slice(start, start + batch)
            out.append(self._call(list(prompts[part]), self.noise(seeds[part]), steps, guidance, "pt").float().cpu())
            if on_batch:
                on_batch(len(out[-1]))
        return torch.cat(out)


def _ddim(config: Any) -> Any:
    """DDIM on a model's own noise schedule."""
    from diffusers import DDIMScheduler

    class Ddim(DDIMScheduler):
        def set_timesteps(self, *args: Any, **options: Any) -> None:
            super().set_timesteps(*args, **options)
            # with as many steps as the schedule has, the offset leads one beyond its end
            self.timesteps = self.timesteps.clamp(max=self.config.num_train_timesteps - 1)  # type: ignore[has-type]

    return Ddim.from_config(config, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
