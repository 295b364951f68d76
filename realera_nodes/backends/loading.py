"""Models from disk: a diffusers folder or a single .safetensors file, never the network."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from ..core.errors import ErasureError
from ..formats.architecture import PREDICTIONS, SUPPORTED
from ..formats.checkpoint import Checkpoint, open_checkpoint
from ..formats.stream import SafetensorsFile
from .diffusers import DiffusersBackend
from .single_file import finite, single_file_pipeline

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
#: a pipeline's parts with weights and without, of SD and of SDXL
MODELS = (("unet", "text_encoder", "vae"), ("unet", "text_encoder", "text_encoder_2", "vae"))
OTHERS = (("tokenizer", "scheduler"), ("tokenizer", "tokenizer_2", "scheduler"))
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


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
    return DiffusersBackend(pipe, size)


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


def folder_pipeline(checkpoint: Checkpoint, dtype: torch.dtype, prediction: str | None) -> Any:
    """The pipeline that model_index.json names, on the CPU.

    Raises:
        ErasureError: another pipeline's class, a part that is missing, pickled, damaged or not finite.
    """
    import diffusers

    folder = checkpoint.path
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        name = index["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ErasureError(f"{folder}/model_index.json cannot be read: download the folder again.") from error
    if name not in PIPELINES:
        raise ErasureError(f"{folder.name} is a {name}, but only {SUPPORTED}: choose one of those.")
    xl = name == "StableDiffusionXLPipeline"
    for part in (*MODELS[xl], *OTHERS[xl]):
        if not any(index.get(part) or ()) or not (folder / part).is_dir():
            raise ErasureError(f"{folder.name} has no {part}: choose a folder with all of its parts.")
    options: dict[str, Any] = {_dtype_keyword(): dtype, "local_files_only": True, "use_safetensors": True}
    variant = re.search(r"\.(\w+)\.safetensors$", re.sub(r"-\d+-of-\d+", "", checkpoint.files[0].path.name))
    if variant:
        options["variant"] = variant[1]
    options |= {"feature_extractor": None, "image_encoder": None}
    options |= {"add_watermarker": False} if xl else {"safety_checker": None, "requires_safety_checker": False}
    try:
        pipe = getattr(diffusers, name).from_pretrained(str(folder), **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ErasureError(f"{folder.name} cannot be loaded ({first.rstrip('.')}): download the folder again.") from error
    for part in MODELS[xl]:
        _require_weights(folder, part, getattr(pipe, part))
    if prediction:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type=prediction)
    return pipe


def _require_weights(folder: Path, part: str, module: Any) -> None:
    """Raises ErasureError: tensors that the files lack, which the libraries would fill with random numbers, or NaN."""
    stored = {_modern(name) for file in (folder / part).glob("*.safetensors") for name in SafetensorsFile.open(file).entries}
    missing = [name for name in module.state_dict() if _modern(name) not in stored]
    if missing:
        raise ErasureError(f"{part} in {folder.name} lacks {len(missing)} tensors, e.g. {missing[0]}: download the folder again.")
    for name, value in module.named_parameters():
        finite(value.detach(), f"{part}'s {name}", folder.name)


def _modern(name: str) -> str:
    """A tensor's name without what differs between versions: CLIP's prefix, and the attention of old VAEs."""
    name = name.removeprefix("text_model.")
    return re.sub(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{_OLD_ATTENTION[m[2]]}.", name)


def _dtype_keyword() -> str:
    """diffusers' name for the weights' dtype: newer versions print a notice at the old one."""
    from diffusers import utils

    return "dtype" if hasattr(utils, "_resolve_dtype") else "torch_dtype"


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
