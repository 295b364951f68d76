"""Models from disk: a diffusers folder or a single .safetensors file, never the network."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from ..core.errors import ErasureError
from ..formats.architecture import PREDICTIONS
from ..formats.checkpoint import open_checkpoint
from .diffusers import DiffusersBackend
from .folder_parts import _modern, folder_pipeline, said_by  # noqa: F401 _modern is asked for here
from .single_file import single_file_pipeline


def load_backend(
    path: Path,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    size: int | None = None,
    prediction: str | None = None,
) -> DiffusersBackend:
    """A model ready to be asked and edited.

    Args:
        path: a diffusers folder, or a .safetensors file of SD1.x, SD2.x or SDXL with text encoders and VAE
        device: "cuda", "cuda:1", "mps", "cpu" ...; None is CUDA if there is one, else the CPU
        dtype: of the weights; None is float16 on CUDA, else float32
        size: side of the pictures in pixels; None is the model's own
        prediction: "epsilon" or "v_prediction"; None is what the model says

    Raises:
        ErasureError: files that are missing, damaged or of another family, an unknown device or setting.
    """
    if prediction is not None and prediction not in PREDICTIONS:
        raise ErasureError(f"prediction type {prediction!r} is unknown: choose {' or '.join(PREDICTIONS)}.")
    place = torch_device(device)
    dtype = dtype or (torch.float16 if place.type == "cuda" else torch.float32)
    checkpoint = open_checkpoint(Path(path))
    require_libraries()
    with quiet():
        if checkpoint.is_folder:
            pipe = folder_pipeline(checkpoint, dtype, prediction)
        else:
            pipe = single_file_pipeline(checkpoint, dtype, prediction)
        pipe.to(place, dtype)
        if not checkpoint.is_folder:
            return DiffusersBackend(pipe, size)
        with said_by(checkpoint.path, "what its configurations say does not work"):
            backend = DiffusersBackend(pipe, size)
            try_out(backend)  # the configurations are people's own
    return backend


def torch_device(name: str | None) -> torch.device:
    """Raises ErasureError: no such device here."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ErasureError(f'device "{name}" cannot be used here: choose another, such as "cpu".') from error


def require_libraries() -> None:
    """Raises ErasureError: diffusers or what it needs is not installed."""
    try:
        import accelerate  # noqa: F401
        import diffusers  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ErasureError(f'{error.name} is missing: install it with pip install "realera-nodes[headless]".') from error


@torch.no_grad()
def try_out(backend: DiffusersBackend) -> None:
    """Asks every part once, on as small a picture as the network takes, so that nothing comes up after minutes of work.

    Raises:
        ErasureError: the noise schedule is none.
        Exception: whatever the libraries raise.
    """
    alphas = backend.alphas()
    if alphas.shape != (1000,) or not torch.isfinite(alphas).all() or alphas.min() < 0 or not (alphas.diff() < 0).all():
        raise ErasureError("the model's noise schedule (scheduler_config.json) is none of 1000 falling steps: download it again.")
    backend.schedule(2)
    text = backend.encode([""])
    if text.states.shape != (1, 77, backend.context_width):
        raise ErasureError(f"the text encoder gives states of shape {tuple(text.states.shape)} instead of "
                           f"(1, 77, {backend.context_width}): its parts do not belong together.")  # fmt: skip
    side = max(8, 2 ** (len(backend.unet.config.block_out_channels) - 1))
    z = torch.zeros(1, backend.unet.config.in_channels, side, side)
    noise = backend.predict_noise(z, torch.tensor([500]), text)
    if noise.shape != z.shape:
        raise ErasureError(f"the UNet predicts noise of shape {tuple(noise.shape)} for latents of {tuple(z.shape)}: its parts do "
                           "not belong together.")  # fmt: skip
    vae = backend.pipe.vae
    vae.decode(z.to(vae.device, vae.dtype) / vae.config.scaling_factor, return_dict=False)


@contextmanager
def quiet() -> Iterator[None]:
    """Neither notices nor progress bars of diffusers and transformers, as long as it lasts.

    Everything they say here is about choices that are made on purpose (no safety checker, AutoencoderTiny, no torchvision).
    """
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    with ExitStack() as undo, warnings.catch_warnings():
        for library in (of_diffusers, of_transformers):
            undo.callback(library.set_verbosity, library.get_verbosity())
            library.set_verbosity(logging.ERROR)
            if getattr(library, "_tqdm_active", True):
                undo.callback(library.enable_progress_bar)
                library.disable_progress_bar()
        warnings.simplefilter("ignore")
        yield
