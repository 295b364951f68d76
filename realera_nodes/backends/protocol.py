"""What the rest of the project asks of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from ..core.adapters import AdapterSettings, Factors
from ..core.alignment import Trajectories
from ..core.spans import TextStates
from ..core.suppression import AttendingStudent
from .full_weights import FullWeights


class Backend(Protocol):
    """A loaded Stable Diffusion. Its weights are never written to: edits and adapters live in contexts."""

    kind: str  # "sd1", "sd2", "sdxl"
    context_width: int

    def encode(self, prompts: Sequence[str]) -> TextStates:
        """States of prompts. ErasureError: empty, or longer than one chunk of 77 tokens."""

    def phrase_ids(self, phrase: str) -> list[int]:
        """Token ids of a phrase inside a prompt, without start and end tokens."""

    def encoder_hash(self) -> str:
        """Names the text encoder and tokenizer, for caches."""

    def projections(self) -> Mapping[str, Tensor]:
        """attn2.to_k and to_v weights (out, d) by canonical name, for reading."""

    def edited(self, deltas: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Inside, the model computes with weight + delta: of projections by canonical name, of any parameter by diffusers'."""

    def adapted(self, factors: Factors) -> AbstractContextManager[None]:
        """Inside, the model computes with weight + up @ down."""

    def training(self, deltas: Mapping[str, Tensor], config: AdapterSettings) -> AbstractContextManager[AttendingStudent]:
        """A student with ``deltas`` and fresh adapters; the teacher is the original."""

    def training_weights(self, wanted: Callable[[str], bool]) -> AbstractContextManager[FullWeights]:
        """A student that trains whole parameters, those whose name (diffusers') is ``wanted``."""

    def schedule(self, steps: int) -> tuple[Tensor, Tensor]:
        """DDIM's timesteps (S,) int64, noisiest first, and alpha_bar (S,) at each, on the CPU."""

    def predict_noise(self, z: Tensor, t: Tensor, text: TextStates) -> Tensor:
        """eps(z_t, t, text): (B, 4, h, w), for eps- and v-models alike."""

    def alphas(self) -> Tensor:
        """Cumulative products of the noise schedule, (1000,)."""

    def latents(self, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float) -> Tensor:
        """What sampling ends with, one for each (prompt, seed): (N, 4, h, w) in the UNet's scale, without noise."""

    def encode_pictures(self, images: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) in [0, 1] as latents (N, 4, h, w) in the UNet's scale."""

    def trajectories(self, prompt: str, count: int, steps: int, guidance: float, seed: int) -> Trajectories:
        """Latents at every step of ``count`` sampling runs."""

    def pictures(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int,
        guidance: float,
        on_batch: Callable[[int], None] | None = None,
    ) -> Tensor:
        """One picture for each (prompt, seed): (N, 3, H, W) in [0, 1] on the CPU."""
