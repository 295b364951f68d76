"""Checkpoints on disk, a single file or a diffusers folder, opened and written with changed weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..core.errors import ErasureError
from .architecture import SUPPORTED, Architecture, detect
from .atomic import atomic_folder, require_space
from .stream import SafetensorsFile, copy_file, known_sha256, rewrite

Change = Callable[[Tensor], Tensor]
# diffusion_pytorch_model[.VARIANT][-0000i-of-0000n][.VARIANT].safetensors
_UNET_FILE = re.compile(
    r"diffusion_pytorch_model(\.(?P<a>\w+))?(-(?P<i>\d+)-of-(?P<n>\d+))?(\.(?P<b>\w+))?\.safetensors", re.ASCII
)
_WEIGHTS = {".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".msgpack", ".onnx", ".onnx_data", ".pb", ".h5", ".gguf"}


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; no file is kept open.

    Attributes:
        architecture: kind, layout, projections and parameters.
        path: the file or the folder.
        is_folder: a diffusers folder.
        files: the safetensors files with the projections. A folder may hold the UNet in shards, and in more than one
            variant (fp16, non_ema): the variant that ``read_projection`` reads comes first, edits change them all.
    """

    architecture: Architecture
    path: Path
    is_folder: bool
    files: tuple[SafetensorsFile, ...]

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata of the (first) file."""
        return self.files[0].metadata

    def _key(self, name: str) -> str:
        for names in (self.architecture.projections, self.architecture.parameters):
            if name in names:
                return names[name]
        what = "projection" if name.endswith(("to_k", "to_v")) else "parameter"
        raise ErasureError(f"{self.path.name} has no {what} {name}: the edit was made for another model.")

    def read(self, name: str) -> Tensor:
        """A projection by its canonical name, or a parameter of the UNet by diffusers', in its stored dtype.

        Raises:
            ErasureError: unknown name.
        """
        key = self._key(name)
        return next(file for file in self.files if key in file.entries).read(key)

    def read_projection(self, name: str) -> Tensor:
        """Weight (out, context width) in its stored dtype. Raises ErasureError for an unknown canonical name."""
        return self.read(name)

    def sha256(self) -> str:
        """Hash of the file; of a folder, the hash of its UNet file, or of its shards' hashes."""
        main = [f for f in self.files if _variant(f.path.name) == _variant(self.files[0].path.name)]
        if not self.is_folder or len(main) == 1:
            return known_sha256(self.files[0].path)
        return hashlib.sha256("\n".join(known_sha256(f.path) for f in main).encode()).hexdigest()


def open_checkpoint(path: Path) -> Checkpoint:
    """A single-file checkpoint or a diffusers pipeline folder (model_index.json, unet/*.safetensors).

    Raises:
        ErasureError: unusable file or folder, missing shards, or a model of another family (see ``detect``).
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    file = SafetensorsFile.open(path)
    architecture = _detect(file.shapes, path)
    _refuse_scaled(architecture, file)
    return Checkpoint(architecture, path, False, (file,))


def _detect(shapes: Mapping[str, tuple[int, ...]], path: Path) -> Architecture:
    try:
        return detect(shapes)
    except ErasureError as error:
        raise ErasureError(f"{path.name}: {error}") from error


def _refuse_scaled(architecture: Architecture, file: SafetensorsFile) -> None:
    """float8 weights with a scale beside them are not the weights: an edit would be off by that factor."""
    for key in (*architecture.projections.values(), *architecture.parameters.values()):
        if key.removesuffix(".weight") + ".scale_weight" in file.entries:
            raise ErasureError(f"{file.path.name} holds scaled float8 weights: use a float16 version of the model.")


def _variant(name: str) -> str:
    match = _UNET_FILE.fullmatch(name)
    return (match["a"] or match["b"] or "") if match else ""


def _open_folder(path: Path) -> Checkpoint:
    if not (path / "model_index.json").exists():
        raise ErasureError(f"{path} has no model_index.json: give a checkpoint file or the top folder of a diffusers pipeline.")
    if not (path / "unet").is_dir():
        raise ErasureError(f"{path} has no unet folder, so it is a model of another family: {SUPPORTED}.")
    groups: dict[str, list[Path]] = {}
    for file in sorted((path / "unet").iterdir()):
        if _UNET_FILE.fullmatch(file.name):
            groups.setdefault(_variant(file.name), []).append(file)
    if not groups:
        if any((path / "unet").glob("*.bin")):
            raise ErasureError(f"{path}/unet holds pickles (.bin) only: open it in a tool you trust and save as .safetensors; "
                               "this project never opens pickles.")  # fmt: skip
        raise ErasureError(f"{path}/unet holds no diffusion_pytorch_model*.safetensors: download the folder again.")
    files: list[SafetensorsFile] = []
    architecture: Architecture | None = None
    for variant in sorted(groups, key=lambda v: (v != "", v != "fp16", v)):
        _require_shards(path / "unet", groups[variant])
        opened = [SafetensorsFile.open(p) for p in groups[variant]]
        found = _detect({key: shape for f in opened for key, shape in f.shapes.items()}, path)
        if architecture is not None and found != architecture:
            raise ErasureError(f"the variants of the UNet in {path}/unet are different models: remove all but one.")
        architecture = found
        files += opened
    assert architecture is not None  # groups is not empty
    for f in files:
        _refuse_scaled(architecture, f)
    return Checkpoint(architecture, path, True, tuple(files))


def _require_shards(unet: Path, files: list[Path]) -> None:
    """Raises ErasureError naming the first shard that file names or the index announce and that is not there."""
    wanted: set[str] = set()
    for file in files:
        match = _UNET_FILE.fullmatch(file.name)
        if match and match["n"]:
            a, b = f".{match['a']}" if match["a"] else "", f".{match['b']}" if match["b"] else ""
            n = int(match["n"])
            wanted |= {f"diffusion_pytorch_model{a}-{i:05}-of-{n:05}{b}.safetensors" for i in range(1, n + 1)}
    variant = _variant(files[0].name)
    for index in unet.glob("diffusion_pytorch_model*.index*.json"):
        if index.name.split(".index")[1] == (f".{variant}.json" if variant else ".json"):
            try:
                wanted |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ErasureError(f"{index} is not an index of shards: download the folder again.") from error
    for name in sorted(wanted):
        if not (unet / name).exists():
            raise ErasureError(f"{unet} lacks the shard {name}: download the folder again.")


def write_edited(
    checkpoint: Checkpoint,
    target: Path,
    new_weights: Mapping[str, Change],
    metadata: Mapping[str, str],
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """The checkpoint with changed weights, in the same form (file or folder); the source is not touched.

    The running averages (model_ema) that training checkpoints hold beside their weights are changed alike: some programs load
    these. Of a folder everything is copied except hidden files, single-file checkpoints at its top and UNet weights in other
    formats than safetensors: these would carry the unedited model along.

    Args:
        target: file or folder to write; it appears whole or not at all.
        new_weights: a projection's canonical name, or diffusers' name of any parameter of the UNet -> function of the old
            value in float32, giving the new one.
        metadata: added to the metadata of every changed file.
        overwrite: replace ``target`` if it exists.
        progress: called with bytes done and bytes in total.

    Raises:
        ErasureError: unknown name, unusable target, no disk space, NaN or infinity (see ``stream.rewrite``).
    """
    changes = {checkpoint._key(name): change for name, change in new_weights.items()}
    target = Path(target)
    if not checkpoint.is_folder:
        there = checkpoint.files[0].entries
        changes |= {_average_of(key): change for key, change in changes.items() if _average_of(key) in there}
        rewrite(checkpoint.path, target, changes, metadata, overwrite, progress)
        return
    source, place = checkpoint.path.resolve(), target.resolve()
    if source in place.parents or place in source.parents:
        raise ErasureError(f"{target} lies inside the source folder or around it: choose another folder.")
    edited = {f.path: {k: v for k, v in changes.items() if k in f.entries} for f in checkpoint.files}
    files = list(_files_to_copy(checkpoint))
    total, done = sum(p.stat().st_size for p in files), 0

    def tick(n: int) -> None:
        nonlocal done
        done += n
        if progress is not None:
            progress(min(done, total), total)

    with atomic_folder(target, overwrite) as folder:
        require_space(target.parent, total)
        for path in files:
            out = folder / path.relative_to(checkpoint.path)
            if path not in edited:
                copy_file(path, out, tick)
                continue
            before = done

            def of_file(part: int, _: int, before: int = before) -> None:
                tick(before + part - done)

            rewrite(path, out, edited[path], metadata, progress=of_file)


def _average_of(key: str) -> str:
    """The name under which a single file in LDM's layout keeps the running average of a weight."""
    return "model_ema." + key.removeprefix("model.").replace(".", "")


def _files_to_copy(checkpoint: Checkpoint) -> Iterator[Path]:
    edited = {f.path for f in checkpoint.files}
    for path in sorted(checkpoint.path.rglob("*")):
        parts = path.relative_to(checkpoint.path).parts
        if not path.is_file() or any(part.startswith(".") for part in parts):
            continue
        unedited_model = path.suffix in _WEIGHTS and (len(parts) == 1 or parts[0] == "unet") and path not in edited
        if not unedited_model:
            yield path
