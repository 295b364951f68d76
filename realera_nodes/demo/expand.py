"""Writes the embedded model: assets of this package to a checkpoint and a diffusers folder.

``checkpoint_path()`` and ``pipeline_path()`` are what the rest of the project calls: they expand into the
user's cache folder once and return the path from then on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..cache import cached, say
from ..core.errors import ErasureError
from ..formats.stream import SafetensorsFile, sha256_of, write_tensors
from ..formats.windows import replace
from . import clip_text, layout
from .bpe import write_tokenizer

ASSETS = Path(__file__).parent / "assets"
MANIFEST = ASSETS / "manifest.json"
CHECKPOINT = "realera-demo.safetensors"
PIPELINE = "realera-demo"
LAYOUTS = ("checkpoint", "diffusers", "both")
#: decoded latents are multiplied by this in the checkpoint's TAESD, as SD1.x hosts divide by it
SD1_SCALE = 0.18215

LEVELS = [320, 320]  # channels of the UNet, one residual block each
UNET_CONFIG: dict[str, object] = {
    "_class_name": "UNet2DConditionModel", "sample_size": 8, "in_channels": 4, "out_channels": 4,
    "block_out_channels": LEVELS, "layers_per_block": 1, "cross_attention_dim": 768, "attention_head_dim": 8,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
TEXT_CONFIG = {
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": clip_text.VOCABULARY,
    "hidden_size": clip_text.WIDTH, "intermediate_size": 4 * clip_text.WIDTH, "num_hidden_layers": clip_text.LAYERS,
    "num_attention_heads": clip_text.HEADS, "max_position_embeddings": clip_text.CONTEXT, "hidden_act": "quick_gelu",
    "projection_dim": clip_text.WIDTH, "layer_norm_eps": 1e-5, "bos_token_id": clip_text.BOS,
    "eos_token_id": clip_text.EOS, "pad_token_id": clip_text.EOS, "dtype": "float32",
}  # fmt: skip
VAE_CONFIG = {"_class_name": "AutoencoderTiny", "latent_channels": 4, "scaling_factor": 1.0, "shift_factor": 0.0}
SCHEDULER_CONFIG = {
    "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
    "prediction_type": "epsilon",
}  # fmt: skip
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.30.0", "requires_safety_checker": False,
    "feature_extractor": [None, None], "image_encoder": [None, None], "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderTiny"],
}  # fmt: skip


#: files of the pipeline that hold weights
PARTS = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")


class DemoAssetError(ErasureError):
    """An asset of the embedded model is missing or damaged, or expanded to other bytes than it should."""


def manifest() -> dict:
    """Hashes of the assets and of what they expand to."""
    if not MANIFEST.exists():
        raise DemoAssetError(
            f"the embedded model's weights are not in {ASSETS} ({MANIFEST.name} is missing): reinstall a release that "
            "has them, or train and export them as docs/demo-model.md tells."
        )
    return json.loads(MANIFEST.read_text(encoding="utf-8"))


def load_asset(name: str) -> dict[str, Tensor]:
    """Tensors of an asset whose hash agrees with the manifest; raises DemoAssetError naming the file otherwise."""
    path = ASSETS / f"{name}.safetensors"
    if not path.exists():
        raise DemoAssetError(f"{path.name} is missing from {ASSETS}: reinstall the package to restore it.")
    if sha256_of(path) != manifest()["assets"][path.name]:
        raise DemoAssetError(f"{path.name} in {ASSETS} is damaged (its hash is wrong): reinstall the package to restore it.")
    return load_file(path)


def unet_state() -> dict[str, Tensor]:
    """LDM UNet weights in float16, standard shapes, names without a prefix."""
    asset, shapes = load_asset("unet"), manifest()["unet_shapes"]
    state = {}
    for name, shape in shapes.items():
        value = asset[name]
        if value.dtype == torch.int8:
            value = layout.dequantize(value, asset[name + ".scale"])
        state[name] = layout.pad(name, value.half(), tuple(shape))
    return state


def vae_state() -> dict[str, Tensor]:
    """TAESD weights in float16, standard shapes."""
    asset = load_asset("vae")
    return {name: layout.pad(name, asset[name], tuple(shape)) for name, shape in manifest()["vae_shapes"].items()}


def text_state() -> dict[str, Tensor]:
    """CLIP-L text model weights in float16 (see ``clip_text``)."""
    asset = load_asset("text")
    return clip_text.clip_state(clip_text.expand_table(asset["codes"], asset["logits"]))


def checkpoint_state() -> dict[str, Tensor]:
    """A single-file SD1.x checkpoint in LDM layout."""
    state = {f"model.diffusion_model.{k}": v for k, v in unet_state().items()}
    state |= {f"cond_stage_model.transformer.text_model.{k}": v for k, v in text_state().items()}
    state |= {f"first_stage_model.{k}": v for k, v in vae_state().items()}
    state["first_stage_model.vae_scale"] = torch.tensor(SD1_SCALE)
    state["first_stage_model.vae_shift"] = torch.tensor(0.0)
    return state


def write_checkpoint(path: Path) -> None:
    facts = {"modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": "stable-diffusion-v1",
             "modelspec.title": "RealEra embedded model", "modelspec.resolution": "64x64"}  # fmt: skip
    # safetensors' own writer orders several metadata entries by chance
    write_tensors(path, checkpoint_state(), {"format": "pt", **facts})


def write_pipeline(folder: Path) -> None:
    """A diffusers pipeline folder with the checkpoint's weights."""
    unet, res_blocks = unet_state(), (1,) * len(LEVELS)
    names = layout.unet_to_diffusers(list(unet), res_blocks)
    parts = {
        "unet/diffusion_pytorch_model": {names[k]: v for k, v in unet.items()},
        "vae/diffusion_pytorch_model": {layout.vae_to_diffusers(k): v for k, v in vae_state().items()},
        "text_encoder/model": {f"text_model.{k}": v for k, v in text_state().items()},
    }
    for part, state in parts.items():
        (folder / part).parent.mkdir(parents=True)
        save_file(state, folder / f"{part}.safetensors", metadata={"format": "pt"})
    (folder / "scheduler").mkdir()
    configs = {"unet/config": UNET_CONFIG, "vae/config": VAE_CONFIG, "text_encoder/config": TEXT_CONFIG,
               "scheduler/scheduler_config": SCHEDULER_CONFIG, "model_index": MODEL_INDEX}  # fmt: skip
    for name, config in configs.items():
        (folder / f"{name}.json").write_bytes(json.dumps(config, indent=1).encode())
    write_tokenizer(folder / "tokenizer")


def tree_hash(path: Path) -> str:
    """SHA-256 of a file, or of a folder's file names and contents."""
    if path.is_file():
        return sha256_of(path)
    lines = [f"{p.relative_to(path).as_posix()} {sha256_of(p)}" for p in sorted(path.rglob("*")) if p.is_file()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _whole_or_nothing(target: Path, write: Callable[[Path], object], expected: str | None, over: bool = True) -> None:
    """Runs ``write`` on a temporary neighbour of ``target``, checks its hash, then moves it into place.

    Without ``over``, what another process has put there meanwhile stays: somebody may be reading it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    holder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        write(holder / target.name)
        found = tree_hash(holder / target.name)
        if expected is not None and found != expected:
            raise DemoAssetError(
                f"{target.name} came out with hash {found[:12]} instead of {expected[:12]}: "
                "please report your torch and safetensors versions; nothing was written."
            )
        if over and target.is_dir():
            shutil.rmtree(target)
        try:
            replace(holder / target.name, target)
        except (OSError, ErasureError):  # a folder is never moved over another
            if over or not target.exists():
                raise
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def _cached(name: str, write: Callable[[Path], None]) -> Path:
    expected = manifest()["expanded"][name]
    # the hash is in the path, so a new release never meets an old expansion, and what is there was checked
    path = cached(expected[:16], name)
    if not path.exists():
        _whole_or_nothing(path, write, expected, over=False)
    elif not _complete(path):
        say(f"{path} is damaged: made anew.")
        _whole_or_nothing(path, write, expected)
    return path


@lru_cache
def _complete(path: Path) -> bool:
    """Whether files are as long as they say; looked at once a process. Its whole hash would take a second at every start."""
    files = [path] if path.is_file() else [path / f"{part}.safetensors" for part in PARTS]
    try:
        return all(SafetensorsFile.open(file).entries for file in files)
    except ErasureError:
        return False


def checkpoint_path() -> Path:
    """The single-file checkpoint in the user's cache, written at the first call. Raises DemoAssetError."""
    return _cached(CHECKPOINT, write_checkpoint)


def pipeline_path() -> Path:
    """The diffusers folder in the user's cache, written at the first call. Raises DemoAssetError."""
    return _cached(PIPELINE, write_pipeline)


def expand(out: Path, layout: str = "both") -> list[Path]:
    """Writes the model under ``out`` and returns the paths.

    Args:
        out: folder, made if missing.
        layout: "checkpoint", "diffusers" or "both".

    Raises:
        ValueError: unknown layout.
        DemoAssetError: an asset is missing or damaged.
        OSError: no space, no permission; nothing half-written stays.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is unknown: choose one of {', '.join(LAYOUTS)}.")
    written = []
    if layout in ("checkpoint", "both"):
        source = checkpoint_path()
        _whole_or_nothing(out / CHECKPOINT, lambda p: shutil.copyfile(source, p), manifest()["expanded"][CHECKPOINT])
        written.append(out / CHECKPOINT)
    if layout in ("diffusers", "both"):
        source = pipeline_path()
        _whole_or_nothing(out / PIPELINE, lambda p: shutil.copytree(source, p), manifest()["expanded"][PIPELINE])
        written.append(out / PIPELINE)
    return written
