"""A diffusers folder's parts, each in the variant that it is there in: people swap in a VAE, and repositories mix."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..core.errors import ErasureError, says_out_of_memory
from ..formats.architecture import SUPPORTED
from ..formats.checkpoint import Checkpoint
from ..formats.folder import index_of, parts_of, read_index, read_json, require_part, walk, weights_of
from ..formats.quantised import refuse_quantised
from ..formats.stream import SafetensorsFile
from .single_file import finite

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
#: a pipeline's parts with weights and without, of SD and of SDXL
MODELS = (("unet", "text_encoder", "vae"), ("unet", "text_encoder", "text_encoder_2", "vae"))
OTHERS = (("tokenizer", "scheduler"), ("tokenizer", "tokenizer_2", "scheduler"))
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_TOKEN = re.compile(r"-\d{1,9}-of-\d{1,9}")


def folder_pipeline(checkpoint: Checkpoint, dtype: torch.dtype, prediction: str | None) -> Any:
    """The pipeline that model_index.json names, on the CPU.

    Raises:
        ErasureError: another pipeline's class, a part that is missing, pickled, quantised, damaged or not finite, or whose
            configuration holds what it cannot hold.
    """
    import diffusers

    folder = checkpoint.path
    index = read_index(folder)
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise ErasureError(f"{folder}/model_index.json names no pipeline (_class_name): download the folder again.")
    if name not in PIPELINES:
        raise ErasureError(f"{folder.name} is a {name}, but only {SUPPORTED}: choose one of those.")
    xl = name == "StableDiffusionXLPipeline"
    classes = parts_of(index)
    for part in (*MODELS[xl], *OTHERS[xl]):
        if part not in classes:
            raise ErasureError(f"{folder.name} has no {part}: choose a folder with all of its parts.")
        for _ in walk(require_part(folder, part)):
            pass  # a pipe in place of a file would be waited for
    parts = {part: _model(folder, part, classes[part], dtype) for part in MODELS[xl]}
    parts |= {part: _other(folder, part, classes[part], prediction) for part in OTHERS[xl]}
    _set_lengths(parts)
    options: dict[str, Any] = {"local_files_only": True, "feature_extractor": None, "image_encoder": None}
    options |= {"add_watermarker": False} if xl else {"safety_checker": None, "requires_safety_checker": False}
    with said_by(folder, "model_index.json"):
        return getattr(diffusers, name).from_pretrained(str(folder), **parts, **options)


@contextmanager
def said_by(folder: Path, part: str) -> Iterator[None]:
    """Turns what a library says of a part into a sentence; running out of memory stays what it is."""
    try:
        yield
    except (ErasureError, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        if says_out_of_memory(error):
            raise
        raise _unloadable(folder, part, error) from error


def _unloadable(folder: Path, part: str, error: Exception) -> ErasureError:
    said = (str(error).strip().splitlines() or [""])[0][:200].rstrip(".")
    why = said if isinstance(error, (OSError, ValueError)) and said else f"{type(error).__name__}: {said}"
    return ErasureError(f"{folder.name} cannot be loaded ({part}: {why}): download the folder again.")


def _class(folder: Path, part: str, named: tuple[str, str]) -> Any:
    """The class of a part. ErasureError: no library has it."""
    import diffusers
    import transformers

    library = {"diffusers": diffusers, "transformers": transformers}.get(named[0])
    with said_by(folder, part):  # a class whose requirements are missing says so when it is touched
        found = getattr(library, named[1], None) if library else None
        usable = isinstance(found, type) and hasattr(found, "from_pretrained")
    if not usable:
        raise ErasureError(f"{part} of {folder.name} is a {'.'.join(named)}, which is not known here: choose another model, or "
                           "update diffusers and transformers.")  # fmt: skip
    return found


def _model(folder: Path, part: str, named: tuple[str, str], dtype: torch.dtype) -> Any:
    """A part with weights, from the first variant that is there."""
    place, make = folder / part, _class(folder, part, named)
    stem = "model" if named[0] == "transformers" else "diffusion_pytorch_model"
    groups = weights_of(place, stem)
    if not groups:
        raise ErasureError(f"{folder.name} cannot be loaded ({part} holds no {stem}*.safetensors): download the folder again.")
    variant, paths = next(iter(groups.items()))
    files = [SafetensorsFile.open(p) for p in paths]
    for file in files:
        refuse_quantised(file)
    if any(_TOKEN.search(p.name) for p in paths) and index_of(place, variant, stem) is None:
        wanted = f"{stem}.safetensors.index{'.' if variant else ''}{variant}.json"
        raise ErasureError(f"{place} has shards but lacks {wanted}, which says what is in them: download that file as well.")
    config = read_json(place / "config.json")
    if not isinstance(config, dict):
        raise ErasureError(f"{place / 'config.json'} is not a configuration: download the folder again.")
    if config.get("quantization_config"):
        raise ErasureError(f"{place} holds quantised weights, by its config.json: use a float16 version of the model.")
    options = {_dtype_keyword(named[0]): dtype, "local_files_only": True, "use_safetensors": True, "variant": variant or None}
    with said_by(folder, part):
        module = make.from_pretrained(str(place), **options).eval()
    _require_weights(folder, part, module, files)
    return module


def _other(folder: Path, part: str, named: tuple[str, str], prediction: str | None) -> Any:
    """A tokenizer or the scheduler."""
    make = _class(folder, part, named)
    with said_by(folder, part):
        found = make.from_pretrained(str(folder / part), local_files_only=True)
        if part == "scheduler" and prediction:
            found = make.from_config(found.config, prediction_type=prediction)
    return found


def _set_lengths(parts: dict[str, Any]) -> None:
    """Tokenizers write as many tokens as their encoders read; some configurations do not say, and mean any number."""
    for end in ("", "_2"):
        tokenizer, encoder = parts.get(f"tokenizer{end}"), parts.get(f"text_encoder{end}")
        if tokenizer is not None and encoder is not None:
            tokenizer.model_max_length = encoder.config.max_position_embeddings


def _require_weights(folder: Path, part: str, module: Any, files: Sequence[SafetensorsFile]) -> None:
    """Raises ErasureError: tensors that the files lack, which the libraries would fill with random numbers, or NaN."""
    stored = {_modern(name) for file in files for name in file.entries}
    missing = [name for name in module.state_dict() if _modern(name) not in stored]
    if missing:
        raise ErasureError(f"{part} in {folder.name} lacks {len(missing)} tensors, e.g. {missing[0]}: download the folder again.")
    for name, value in module.named_parameters():
        finite(value.detach(), f"{part}'s {name}", folder.name)


def _modern(name: str) -> str:
    """A tensor's name without what differs between versions: CLIP's prefix, and the attention of old VAEs."""
    name = name.removeprefix("text_model.")
    return re.sub(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{_OLD_ATTENTION[m[2]]}.", name)


def _dtype_keyword(library: str) -> str:
    """The library's name for the weights' dtype: newer versions print a notice at the old one."""
    import transformers
    from diffusers import utils

    if library == "diffusers":
        return "dtype" if hasattr(utils, "_resolve_dtype") else "torch_dtype"
    version = tuple(int(n) for n in re.findall(r"\d+", transformers.__version__)[:2])
    return "dtype" if version >= (4, 56) else "torch_dtype"
