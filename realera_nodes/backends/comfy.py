"""Stable Diffusion as ComfyUI has loaded it: SD1.x, SD2.x (eps and v) and SDXL, with upstream LoRAs.

The host shares one network among all branches of a graph, so edits are patches on clones, and adapters are hooks that
are gone when their context ends. Weights of the network are never written to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor, nn

from ..core.adapters import AdapterSettings, Factors, merged
from ..core.alignment import Trajectories
from ..core.errors import ErasureError
from ..core.esd import denoised
from ..core.noise import start_noise
from ..core.spans import TextStates
from ..formats.prediction import EPSILON, V
from .comfy_sampling import SCHEDULE, predicted, trained_schedule
from .comfy_student import HookStudent, freeze_quantised, thaw
from .comfy_text import ComfyText
from .comfy_weights import SUPPORTED, EffectiveWeights, finite, key_patches, layer_keys, parameter_keys, plain
from .full_weights import FullWeights, full_weights

KINDS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}


def prediction_of(model: Any) -> str | None:
    """What a MODEL's network is read to predict, also under a sampling patch: "epsilon", "v_prediction"; None: something else."""
    found = predicted(model.get_model_object(SCHEDULE))
    return {"eps": EPSILON, "v": V}.get(found)


class ComfyBackend:
    """A MODEL and a CLIP behind the project's protocol.

    Args:
        model: ComfyUI's ModelPatcher
        clip: its CLIP
        vae: needed for pictures only
        side: of pictures in pixels; None is the family's own

    Raises:
        ErasureError: a model of another family, or a CLIP that does not belong to it.
    """

    def __init__(self, model: Any, clip: Any, vae: Any = None, side: int | None = None):
        keys = layer_keys(model)
        self.patcher, self._unscheduled = trained_schedule(model)
        self.keys = keys
        self.names = [n for n in keys if n.endswith(("attn2.to_k", "attn2.to_v")) and keys[n] in model.model.state_dict()]
        widths = {comfy.utils.get_attr(model.model, keys[n]).shape[1] for n in self.names}
        if len(widths) != 1 or not widths <= KINDS.keys():
            raise ErasureError(f"cross-attention of width {', '.join(map(str, sorted(widths)))} cannot be edited: {SUPPORTED}.")
        self.context_width = widths.pop()
        self.kind = KINDS[self.context_width]
        self.text = ComfyText(clip, self.context_width)
        self.encode, self.rows, self.end_states = self.text.encode, self.text.rows, self.text.end_states
        self.phrase_ids, self.vocabulary, self.encoder_hash = self.text.phrase_ids, self.text.vocabulary, self.text.encoder_hash
        if side is not None and (not 8 <= side <= 2048 or side % 8):  # wired up, it comes unchecked
            raise ErasureError(f"picture_size is {side}: it must be 0, or a multiple of 8 between 8 and 2048.")
        self.vae, self.side = vae, side or self._native_side()
        self._student: HookStudent | FullWeights | None = None

    @property
    def prediction(self) -> str | None:
        """ "epsilon" or "v_prediction"; None: something else."""
        return prediction_of(self.patcher)

    def _native_side(self) -> int:
        v = self.patcher.model.model_type == comfy.model_base.ModelType.V_PREDICTION
        return {"sd1": 512, "sd2": 768 if v else 512, "sdxl": 1024}[self.kind]

    # weights

    def projections(self) -> Mapping[str, Tensor]:
        """attn2.to_k and to_v weights (out, d) with upstream LoRAs and edits, by canonical name."""
        return EffectiveWeights(self.patcher, {name: self.keys[name] for name in self.names})

    def model_hash(self) -> str:
        """Names the loaded network by its unpatched projections."""
        digest = hashlib.sha256()
        for name in self.names:
            flat = key_patches(self.patcher, self.keys[name])[0][0].detach().flatten()
            digest.update(flat[:: max(1, flat.numel() // 512)].float().cpu().numpy().tobytes())
        return digest.hexdigest()[:24]

    @contextmanager
    def edited(self, deltas: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the UNet computes with weight + delta, by canonical name or any parameter's own: a patch on a clone."""
        clone = self.patcher.clone()
        keys = self.keys if deltas.keys() <= self.keys.keys() else self.keys | parameter_keys(self.patcher)
        patches: dict[str, Any] = {keys[name]: ("diff", (delta,)) for name, delta in deltas.items()}
        clone.add_patches(patches)
        before, self.patcher = self.patcher, clone
        try:
            yield
        finally:
            self.patcher = before

    @contextmanager
    def adapted(self, factors: Factors) -> Iterator[None]:
        with self.edited({name: merged(factors, name) for name in factors}):
            yield

    @contextmanager
    def training(self, deltas: Mapping[str, Tensor], config: AdapterSettings) -> Iterator[HookStudent]:
        """A student: the model + ``deltas`` + a fresh LoRA, by hooks. On leaving, the network is as it was."""
        wanted = [n for n in self.keys if n.endswith(config.targets)]
        if not wanted:
            raise ErasureError(f"no module of the model ends with {' or '.join(config.targets)}: choose other targets.")
        with self._trainable() as net:
            modules = {n: net.get_submodule(self.keys[n].removesuffix(".weight")) for n in {*wanted, *deltas}}
            self._student = student = HookStudent(self, modules, wanted, deltas, config)
            try:
                yield student
            finally:
                student.remove()

    @contextmanager
    def training_weights(self, wanted: Callable[[str], bool]) -> Iterator[FullWeights]:
        """A student that trains whole parameters, those whose name (diffusers') is ``wanted``: differences beside the network."""
        paths = {name: key for name, key in parameter_keys(self.patcher).items() if wanted(name)}
        with self._trainable() as net, full_weights(self, net, paths) as student:
            self._student = student
            yield student

    @contextmanager
    def _trainable(self) -> Iterator[nn.Module]:
        """The model, wholly on its device and fit for gradients; its flags are put back."""
        self._require_plain_input()
        inference, net = torch.is_inference_mode_enabled(), self.patcher.model
        flags: list[tuple[nn.Parameter, bool]] = []
        with torch.inference_mode(False), torch.enable_grad():
            try:
                self._load_whole()
                flags = thaw(net)
                yield net
            finally:
                self._student = None
                for p, flag in flags:
                    p.requires_grad_(flag)
                if inference:
                    freeze_quantised(net)

    def _load_whole(self) -> None:
        """Onto the device for training, nothing offloaded, and everything else away."""
        comfy.model_management.load_models_gpu([self.patcher], memory_required=1e20, force_full_load=True)

    # noise

    def _sampling(self) -> Any:
        if self._unscheduled:  # said here, as closed forms ask the network nothing and need no schedule
            raise ErasureError(self._unscheduled)
        return self.patcher.get_model_object(SCHEDULE)

    def _require_plain_input(self) -> None:
        if self.patcher.model.model_config.unet_config.get("in_channels", 4) != 4:
            raise ErasureError(
                "the model also takes a picture (inpainting or editing): mine and train on its base model, then apply the LoRA."
            )

    def predict_noise(self, z: Tensor, t: Tensor, text: TextStates) -> Tensor:
        """eps(z_t, t, text): (B, 4, h, w) float32 on the model's device, z in VP space."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self._student is None:
            self._require_plain_input()
            comfy.model_management.load_models_gpu([self.patcher], memory_required=self.patcher.memory_required(z.shape))
        device = self.patcher.load_device
        z = plain(z).to(device, torch.float32)
        sigma = self._sampling().sigma(plain(t).float()).to(device, torch.float32)
        wide = sigma[:, None, None, None]
        x = z * (1 + wide.square()).sqrt()  # the host's sigma space: x0 + sigma noise
        options = {**self.patcher.model_options["transformer_options"], "cond_or_uncond": [0], "sigmas": sigma}
        denoised = self.patcher.model.apply_model(
            x, sigma, c_crossattn=plain(text.states).to(device), transformer_options=options, **self._extra(z, text)
        )
        noise = (x - denoised) / wide
        return noise if self._student is not None else finite(noise)  # training looks at its loss

    def _extra(self, z: Tensor, text: TextStates) -> dict[str, Tensor]:
        """What else the UNet is told: SDXL's pooled text and sizes."""
        if self.kind == "sdxl" and text.pooled is None:
            raise ErasureError("SDXL needs the pooled text state: encode the prompt with the model's own encoders.")
        pooled = None if text.pooled is None else plain(text.pooled).to(z.device)
        found = self.patcher.model.extra_conds(
            pooled_output=pooled, width=self.side, height=self.side, device=z.device, noise=z, prompt_type="positive"
        )
        return {"y": found["y"].cond.to(z.device)} if "y" in found else {}

    # pictures

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Start noise (N, 4, h, w), as ``start_noise`` makes it."""
        return start_noise(seeds, self.side // 8)

    def sample(
        self, prompts: Sequence[str], noise: Tensor, steps: int, guidance: float,
        on_latent: Callable[[Tensor], None] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Euler in sigma space, which is DDIM, at DDIM's timesteps: samples (N, 4, h, w) for the VAE, and timesteps (S,).

        ``on_latent`` gets the latents (N, 4, h, w), in VP space, before every step.
        """
        self._require_plain_input()
        sampling, (timesteps, _) = self._sampling(), self.schedule(steps)
        sigmas = torch.cat([sampling.sigmas.cpu()[timesteps], torch.zeros(1)])
        first = sigmas[0]
        if not float(first) >= float(sampling.sigma_max) * (1 - 1e-5):  # else the host does it
            noise = noise * (1 + first.square()).sqrt() / first

        def keep(step: int, denoised: Tensor, x: Tensor, total: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            if on_latent:
                on_latent((x / (1 + sigmas[step].square()).sqrt().to(x)).float().cpu())

        texts = self.encode(prompts), self.encode([""] * len(prompts))
        sizes = {"width": self.side, "height": self.side}
        positive, negative = ([[t.states, {"pooled_output": t.pooled, **sizes}]] for t in texts)
        samples = comfy.samplers.sample(
            self.patcher, noise, positive, negative, guidance, self.patcher.load_device, comfy.samplers.sampler_object("euler"),
            sigmas, model_options=self.patcher.model_options, latent_image=torch.zeros_like(noise), callback=keep,
            disable_pbar=True, seed=0,
        )  # fmt: skip
        return finite(samples.float().cpu()), timesteps

    def schedule(self, steps: int) -> tuple[Tensor, Tensor]:
        """DDIM's timesteps (S,), noisiest first, and alpha_bar (S,) at each."""
        alphas = self.alphas()
        timesteps = (torch.arange(steps).flip(0) * (len(alphas) // steps) + 1).clamp(max=len(alphas) - 1)
        return timesteps, alphas[timesteps]

    def alphas(self) -> Tensor:
        """Cumulative products of the noise schedule, (1000,)."""
        return 1 / (1 + self._sampling().sigmas.float().cpu().square())

    def latents(self, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float, batch: int = 4) -> Tensor:
        """What sampling ends with, one for each (prompt, seed): (N, 4, h, w) in the UNet's scale, without noise."""
        parts = [slice(i, i + batch) for i in range(0, len(prompts), batch)]
        found = torch.cat([self.sample(prompts[p], self.noise(seeds[p]), steps, guidance)[0] for p in parts])
        return self.patcher.model.process_latent_in(found)

    def encode_pictures(self, images: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) in [0, 1], brought to the model's size, as latents (N, 4, h, w) in the UNet's scale."""
        if self.vae is None:
            raise ErasureError("the concept brings pictures and no VAE is connected: connect the checkpoint's VAE.")
        sized = torch.nn.functional.interpolate(images.float(), (self.side, self.side), mode="bilinear", antialias=True)
        return plain(self.patcher.model.process_latent_in(self.vae.encode(sized.movedim(1, -1)).float().cpu()))

    def trajectories(self, prompt: str, count: int, steps: int, guidance: float, seed: int) -> Trajectories:
        """Latents before every denoising step of ``count`` runs: what z_t is drawn from."""
        latents: list[Tensor] = []
        _, timesteps = self.sample([prompt] * count, self.noise(range(seed, seed + count)), steps, guidance, latents.append)
        return Trajectories(torch.stack(latents, 1), timesteps)

    def pictures(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int = 20, guidance: float = 5.0, batch: int = 4,
        on_batch: Callable[[int], None] | None = None,
    ) -> Tensor:  # fmt: skip
        """One picture for each (prompt, seed): (N, 3, H, W) in [0, 1] on the CPU."""
        if self.vae is None:
            raise ErasureError("no VAE is connected, so no pictures can be drawn: connect the checkpoint's VAE.")
        out = []
        for start in range(0, len(prompts), batch):
            part = slice(start, start + batch)
            samples, _ = self.sample(prompts[part], self.noise(seeds[part]), steps, guidance)
            out.append(self.vae.decode(samples)[..., :3].movedim(-1, 1).float().cpu().clamp(0, 1))
            if on_batch:
                on_batch(len(out[-1]))
        return torch.cat(out)

    @torch.no_grad()
    def preview(self, prompt: str, seed: int = 0, steps: int = 12, guidance: float = 5.0) -> Tensor:
        """(3, H, W) in [0, 1] as the student draws it inside ``training``; without a VAE a coarse one from the latent."""
        assert self._student is not None
        texts = self.encode([prompt]), self.encode([""])
        self._load_whole()  # encoding may have moved the UNet away
        with self._student.student():  # not by the host's sampler, which could move weights while they are stood in for
            latent = denoised(self._student, self.noise([seed]), *texts, *self.schedule(steps), guidance).cpu()[0]
        if self.vae is not None:
            picture = self.vae.decode(self.patcher.model.process_latent_out(latent[None]))[0, ..., :3].movedim(-1, 0)
            self._load_whole()  # and decoding
            return picture.float().cpu().clamp(0, 1)
        colors = torch.tensor(self.patcher.model.latent_format.latent_rgb_factors)
        return ((torch.einsum("chw,ck->khw", latent, colors) + 1) / 2).clamp(0, 1)
