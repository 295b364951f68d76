"""Checkpoints on disk, a single file or a diffusers folder, opened and written with changed weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..core.errors import ErasureError
from .architecture import SUPPORTED, Architecture, detect
from .atomic import Batch, atomic_folder, require_space
from .folder import parts_of, read_index, require_part, variant_of, walk, weights_of
from .header import Entry
from .prediction import Prediction, prediction_of_file, prediction_of_folder
from .quantised import refuse_quantised
from .stream import SafetensorsFile, copy_file, known_sha256, rewrite
from .written import not_as_written

Change = Callable[[Tensor], Tensor]
#: parts that pictures are made without
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder", "watermarker")
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

    def prediction(self, given: str | None = None) -> Prediction:
        """What the model predicts, as ``given`` or as its files say. ErasureError: what is not supported."""
        if self.is_folder:
            return prediction_of_folder(self, given)
        return prediction_of_file(self.files[0], self.architecture.kind, given)

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
        main = [f for f in self.files if variant_of(f.path.name) == variant_of(self.files[0].path.name)]
        if not self.is_folder or len(main) == 1:
            return known_sha256(self.files[0].path)
        return hashlib.sha256("\n".join(known_sha256(f.path) for f in main).encode()).hexdigest()


def open_checkpoint(path: Path) -> Checkpoint:
    """A single-file checkpoint or a diffusers pipeline folder (model_index.json, unet/*.safetensors).

    Raises:
        ErasureError: unusable file or folder, missing shards, or a model of another family (see ``detect``).
    """
    path = Path(path)
    if os.path.isdir(path):
        return _open_folder(path)
    file = SafetensorsFile.open(path)
    refuse_quantised(file)
    return Checkpoint(_detect(file.shapes, path), path, False, (file,))


def _detect(shapes: Mapping[str, tuple[int, ...]], path: Path) -> Architecture:
    try:
        return detect(shapes)
    except ErasureError as error:
        raise ErasureError(f"{path.name}: {error}") from error


def _open_folder(path: Path) -> Checkpoint:
    read_index(path)
    unet = path / "unet"
    if not os.path.lexists(unet):
        raise ErasureError(f"{path} has no unet folder, so it is a model of another family: {SUPPORTED}.")
    groups = weights_of(require_part(path, "unet"))
    if not groups:
        raise ErasureError(f"{unet} holds no diffusion_pytorch_model*.safetensors: download the folder again.")
    files: list[SafetensorsFile] = []
    architecture: Architecture | None = None
    for paths in groups.values():
        opened = [SafetensorsFile.open(p) for p in paths]
        for file in opened:
            refuse_quantised(file)
        found = _detect({key: shape for f in opened for key, shape in f.shapes.items()}, path)
        if architecture is not None and found != architecture:
            raise ErasureError(f"the variants of the UNet in {unet} are different models: remove all but one.")
        architecture = found
        files += opened
    assert architecture is not None  # groups is not empty
    return Checkpoint(architecture, path, True, tuple(files))


def planned_bytes(checkpoint: Checkpoint, target: Path) -> int:
    """What ``write_edited`` will write. Call it before long work: it refuses what could not be written.

    Raises:
        ErasureError: a part of the folder is not there or cannot be copied, or the target lies inside the source or around it.
    """
    if not checkpoint.is_folder:
        return checkpoint.path.stat().st_size
    return sum(path.stat().st_size for path in _files_to_copy(checkpoint, Path(target)))


def write_edited(
    checkpoint: Checkpoint,
    target: Path,
    new_weights: Mapping[str, Change],
    metadata: Mapping[str, str],
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    batch: Batch | None = None,
) -> None:
    """The checkpoint with changed weights, in the same form (file or folder); the source is not touched.

    The running averages (model_ema) that training checkpoints hold beside their weights are changed alike: some programs load
    these. Of a folder everything is copied, what is linked as files, except hidden files, single-file checkpoints at its top
    and UNet weights in other formats than safetensors: these would carry the unedited model along. What was written is opened
    again and compared with the source.

    Args:
        target: file or folder to write; it appears whole or not at all.
        new_weights: a projection's canonical name, or diffusers' name of any parameter of the UNet -> function of the old
            value in float32, giving the new one.
        metadata: added to the metadata of every changed file.
        overwrite: replace ``target`` if it exists.
        progress: called with bytes done and bytes in total.
        batch: what it is to appear with, in place of ``overwrite``.

    Raises:
        ErasureError: unknown name, unusable target, no disk space, NaN or infinity (see ``stream.rewrite``), a part that cannot
            be copied, or a disk that does not hold what was written.
    """
    changes = {checkpoint._key(name): change for name, change in new_weights.items()}
    target = Path(target)
    if not checkpoint.is_folder:
        there = checkpoint.files[0].entries
        changes |= {_average_of(key): change for key, change in changes.items() if _average_of(key) in there}
        rewrite(checkpoint.path, target, changes, metadata, overwrite, progress, batch)
        return
    edited = {f.path: {k: v for k, v in changes.items() if k in f.entries} for f in checkpoint.files}
    files = _files_to_copy(checkpoint, target)
    total, done = sum(p.stat().st_size for p in files), 0

    def tick(n: int) -> None:
        nonlocal done
        done += n
        if progress is not None:
            progress(min(done, total), total)

    with atomic_folder(target, overwrite, batch=batch) as folder:
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
        _require_equal(checkpoint, folder, files, target)


def _average_of(key: str) -> str:
    """The name under which a single file in LDM's layout keeps the running average of a weight."""
    return "model_ema." + key.removeprefix("model.").replace(".", "")


def _files_to_copy(checkpoint: Checkpoint, target: Path) -> list[Path]:
    """See ``planned_bytes``."""
    for part in parts_of(read_index(checkpoint.path)):
        if part not in OPTIONAL:
            require_part(checkpoint.path, part)
    edited, found = {f.path for f in checkpoint.files}, []
    for path in walk(checkpoint.path):
        parts = path.relative_to(checkpoint.path).parts
        unedited_model = path.suffix in _WEIGHTS and (len(parts) == 1 or parts[0] == "unet") and path not in edited
        if not unedited_model:
            found.append(path)
    inside, around = {checkpoint.path, *(p.parent for p in found)}, {p.resolve().parent for p in found}
    _refuse_overlap(checkpoint.path, inside, around, target)
    return found


def _refuse_overlap(root: Path, inside: set[Path], around: set[Path], target: Path) -> None:
    """A target inside a folder of the source would be copied into itself; one around a file of it would replace that file."""
    place = target.resolve()
    if _same(place, root.resolve()):
        return  # in its own place, if it may be replaced
    for source in map(Path.resolve, inside):
        if any(_same(source, p) for p in place.parents):
            raise _overlap(target)
    for source in {*map(Path.resolve, inside), *around}:
        if any(_same(place, p) for p in source.parents):
            raise _overlap(target)


def _same(a: Path, b: Path) -> bool:
    """Whether two paths are one place, also where a disk knows no capital letters."""
    if a == b:
        return True
    try:
        return a.name.casefold() == b.name.casefold() and a.samefile(b)
    except OSError:
        return False


def _overlap(target: Path) -> ErasureError:
    return ErasureError(f"{target} lies inside the source folder or around it: choose another folder.")


def _tensors(path: Path) -> list[tuple[str, Entry]] | None:
    """Names, types and places of a file's tensors; None where it is no safetensors file that can be read."""
    try:
        return list(SafetensorsFile.open(path).entries.items()) if path.suffix == ".safetensors" else None
    except ErasureError:
        return None


def _require_equal(checkpoint: Checkpoint, folder: Path, files: list[Path], target: Path) -> None:
    """Opens what was written. ErasureError: it is not the source's parts with the source's tensors."""
    edited = {f.path for f in checkpoint.files}  # their metadata are longer
    try:
        for path in files:
            copy = folder / path.relative_to(checkpoint.path)
            same = copy.stat().st_size == path.stat().st_size or path in edited
            if not same or ((tensors := _tensors(path)) is not None and _tensors(copy) != tensors):
                raise ErasureError(f"{copy.name} differs from the source's.")
        if open_checkpoint(folder).architecture != checkpoint.architecture:
            raise ErasureError("its UNet is another one.")
    except (ErasureError, OSError) as error:
        raise not_as_written(target, str(error)) from error
