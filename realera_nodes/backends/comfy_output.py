"""What ComfyUI's nodes give back: progress with previews, IMAGE tensors, and files with their provenance."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy.cli_args import args
from PIL import Image
from torch import Tensor

from ..core.adapters import Factors
from ..core.errors import ErasureError
from ..formats.atomic import atomic_path, check_target, require_space
from ..formats.lora import write_lora
from ..formats.metadata import ErasureMetadata
from ..formats.stream import SafetensorsFile, known_sha256
from ..formats.windows import check_names
from ..report.grid import to_image
from .comfy_edits import EditRecord

#: inputs that lead from a node to the checkpoint that its model came from, most direct first
UPSTREAM = ("model", "model_after", "lora", "neighbors")
LOADERS = {"ckpt_name": "checkpoints", "unet_name": "diffusion_models"}
PREVIEW_SIDE = 512
#: seconds between two messages about a training's losses
LOSSES_EVERY = 0.25


class NodeProgress:
    """The project's progress callback as a node's bar, its text and preview pictures. Raises when the user cancels."""

    def __init__(self, node_id: str | None):
        self.node_id, self.bar, self.stage = node_id, comfy.utils.ProgressBar(1), ""
        self.sent, self.sent_at = 0, 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        server = _server()
        if stage != self.stage and server is not None and self.node_id is not None:
            server.send_progress_text(stage, self.node_id)
        self.stage = stage
        self.bar.update_absolute(done, max(total, 1))

    def show(self, picture: Tensor, done: int, total: int) -> None:
        """A preview picture (3, H, W) in [0, 1] beside the bar."""
        self.bar.update_absolute(done, max(total, 1), ("JPEG", to_image(picture, PREVIEW_SIDE), PREVIEW_SIDE))

    def losses(self, losses: Sequence[float], total: int) -> None:
        """What a training's losses have grown by, to the page that queued it, for the node's curve."""
        server, now = _server(), time.monotonic()
        if len(losses) < self.sent:  # another training of the same node
            self.sent = 0
        due = now - self.sent_at >= LOSSES_EVERY or len(losses) == total
        if not due or server is None or self.node_id is None or server.client_id is None:
            return
        news = {"node": self.node_id, "start": self.sent, "losses": list(losses[self.sent :]), "total": total}
        server.send_sync("realera.loss", news, server.client_id)
        self.sent, self.sent_at = len(losses), now


def _server() -> Any:
    """ComfyUI's server; None where the nodes run without one."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


@contextmanager
def guarded() -> Iterator[None]:
    """Turns running out of memory into a sentence, and gives back what was taken."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # the calls that failed still hold their tensors
        comfy.model_management.unload_all_models()
        raise ErasureError(
            "the device is out of memory: lower batch, picture size or trajectories, or start ComfyUI with --lowvram."
        ) from None
    finally:
        comfy.model_management.soft_empty_cache()


def out_of_memory(error: Exception) -> bool:
    """Whether an error says so: CUDA has a type of its own for it, the CPU and Apple's GPUs only words."""
    said = str(error).lower()
    words = isinstance(error, RuntimeError) and ("out of memory" in said or "can't allocate memory" in said)
    return words or isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError))


def from_image(image: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) in [0, 1] on the CPU from an IMAGE (N, H, W, 3), whose alpha is left out."""
    return image[..., :3].movedim(-1, 1).float().cpu().clamp(0, 1).contiguous()


def from_mask(mask: Tensor, pictures: Tensor | None) -> Tensor:
    """Masks (N, H, W) in [0, 1] on the CPU from a MASK (N, H, W) or (H, W), scaled to their pictures (N, 3, H, W).

    Raises:
        ErasureError: a mask that marks nothing, which is what the host gives for a picture without one.
    """
    masks = mask.reshape(-1, *mask.shape[-2:]).float().cpu().clamp(0, 1)
    for i, one in enumerate(masks):
        if not one.any():
            raise ErasureError(f"mask {i + 1} marks nothing: paint it white on the concept, or connect no masks.")
    if pictures is not None and masks.shape[1:] != pictures.shape[2:]:
        masks = torch.nn.functional.interpolate(masks[:, None], pictures.shape[2:], mode="bilinear")[:, 0]
    return masks


def as_image(pictures: Sequence[Image.Image]) -> Tensor:
    """An IMAGE, (N, H, W, 3) in [0, 1], smaller pictures on white."""
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    sheets = []
    for picture in pictures:
        sheet = Image.new("RGB", (width, height), "white")
        sheet.paste(picture, (0, 0))
        sheets.append(torch.from_numpy(np.array(sheet)).float() / 255)
    return torch.stack(sheets)


def output_path(prefix: str, suffix: str = ".safetensors") -> tuple[Path, dict[str, str]]:
    """The next free file under the output folder, and how the page asks for it.

    Raises:
        ErasureError: a prefix that leads out of the output folder, or names no file.
    """
    root = folder_paths.get_output_directory()
    inside = Path(os.path.abspath(os.path.join(root, prefix))).is_relative_to(root)  # on Windows maybe another drive
    if not prefix.strip() or prefix.endswith(("/", "\\")) or not inside:
        raise ErasureError(
            f'the file name prefix "{prefix}" names no file inside the output folder: write one such as loras/erased.'
        )
    check_names((Path(root) / prefix).parent)
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, root)
    file = f"{name}_{counter:05}_{suffix}"
    check_target(Path(folder) / file)
    return Path(folder) / file, {"filename": file, "subfolder": subfolder, "type": "output"}


def write_factors(path: Path, factors: Factors, metadata: Mapping[str, str], precision: str) -> None:
    """A LoRA file; ``precision`` is the name of a torch type. Raises ErasureError: see ``write_lora``."""
    write_lora(path, factors, metadata, getattr(torch, precision))


@contextmanager
def whole_file(target: Path, nbytes: int) -> Iterator[str]:
    """A temporary path for the host's writers; it becomes ``target`` when the block ends without an exception."""
    require_space(target.parent, nbytes)
    with atomic_path(target) as partial:
        yield str(partial)


def file_metadata(
    records: Sequence[EditRecord], kind: str, hidden: Any, ranks: Mapping[str, int] | None = None, prediction: str | None = None
) -> dict[str, str]:  # fmt: skip
    """What a file says about its making and, for hosts, about its model; nothing with --disable-metadata."""
    if args.disable_metadata:
        return {}
    pairs = list(dict.fromkeys(pair for r in records for pair in zip(r.concepts, r.anchors, strict=True)))
    kinds = {pair: kind for r in records for pair, kind in zip(zip(r.concepts, r.anchors, strict=True), r.kinds, strict=False)}
    base = base_file(hidden.prompt or {}, str(hidden.unique_id))
    made = ErasureMetadata(
        method="; ".join(dict.fromkeys(r.method for r in records)),
        concepts=tuple(c for c, _ in pairs),
        anchors=tuple(a for _, a in pairs),
        preserved=tuple(dict.fromkeys(p for r in records for p in r.preserved)),
        config=records[0].config if len(records) == 1 else {"edits": [r.config for r in records]},
        base_sha256=known_sha256(base) if base else "",
        base_name=base.name if base else "",
        kinds=tuple(kinds[pair] for pair in pairs) if all(pair in kinds for pair in pairs) else (),
    )
    result = made.to_safetensors(kind, dict(ranks) if ranks else None, _texts_of(base), prediction)  # type: ignore[arg-type]
    result["prompt"] = json.dumps(hidden.prompt or {})
    return result | {key: json.dumps(value) for key, value in (hidden.extra_pnginfo or {}).items()}


def _texts_of(base: Path | None) -> Mapping[str, str]:
    """Metadata of the checkpoint's file; none where it is of another format."""
    try:
        return SafetensorsFile.open(base).metadata if base else {}
    except ErasureError:
        return {}


def base_file(prompt: Mapping[str, Any], node: str) -> Path | None:
    """The checkpoint that a node's model comes from, found in the graph; None where no loader is upstream."""
    waiting, seen = [node], set()
    while waiting:
        key = waiting.pop()
        if key in seen or key not in prompt:
            continue
        seen.add(key)
        inputs = prompt[key].get("inputs", {})
        for name, folder in LOADERS.items():
            if isinstance(inputs.get(name), str):
                found = folder_paths.get_full_path(folder, inputs[name])
                return Path(found) if found else None
        links = {n: v[0] for n, v in inputs.items() if isinstance(v, list) and len(v) == 2}
        order = [n for n in links if n not in UPSTREAM] + [n for n in reversed(UPSTREAM) if n in links]
        waiting += [str(links[n]) for n in order]  # the last is visited first
    return None
