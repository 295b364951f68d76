"""Whether a model predicts the noise (epsilon) or a velocity (v), by what its file says of itself."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.errors import ErasureError
from .folder import read_json

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .stream import SafetensorsFile

EPSILON, V = "epsilon", "v_prediction"
#: ComfyUI's test of SD2: v-models have a larger deviation than this in their last self-attention's bias
V_DEVIATION = 0.09
#: how trainers spell it in modelspec.prediction_type
_WORDS = {"epsilon": EPSILON, "eps": EPSILON, "noise": EPSILON, "v": V, "v_prediction": V, "v-prediction": V, "vprediction": V,
          "v_pred": V, "v-pred": V, "vpred": V, "velocity": V}  # fmt: skip
_OTHERS = ("sample", "x0", "x_0", "x0_prediction", "flow", "flow_matching", "flow_prediction", "rectified_flow", "rf", "edm")
_FIRST_BIAS = re.compile(r"(?P<prefix>.*)output_blocks\.(?P<n>\d+)\.1\.transformer_blocks\.0\.norm1\.bias")


@dataclass(frozen=True)
class Prediction:
    """What a model predicts.

    Attributes:
        type: "epsilon" or "v_prediction"
        by: what says so
        zero_snr: whether its noise schedule ends in pure noise (zero terminal SNR)
        doubts: sentences on statements that contradict each other or cannot be understood
    """

    type: str
    by: str
    zero_snr: bool = False
    doubts: tuple[str, ...] = ()


def prediction_of_file(file: SafetensorsFile, kind: str, given: str | None = None) -> Prediction:
    """What a single file's model predicts.

    Believed is, in this order: what the user says; the keys ``v_pred`` and ``ztsnr``, which hosts look for;
    modelspec.prediction_type, modelspec.predict_key and ss_v_parameterization; the weights (SD2, as ComfyUI looks at them);
    modelspec.architecture.
    A file that says nothing predicts epsilon.

    Args:
        kind: "sd1", "sd2" or "sdxl"
        given: by the user: "epsilon", "v_prediction" or None

    Raises:
        ErasureError: the file says that it predicts something else, and the user does not say otherwise.
    """
    said, doubts = _statements(file, kind)
    if given is None:
        _refuse_others(file)
    found = [(given, "the setting prediction"), *said] if given else said
    kind_of, by = found[0] if found else (EPSILON, "nothing in the file, which is usual")
    others = [(t, why) for t, why in found[1:] if t != kind_of]
    doubts += [f"{file.path.name}: {why} says {t}, but {by} says {kind_of}, which is used; --prediction decides otherwise."
               for t, why in others]  # fmt: skip
    zero = "ztsnr" in file.entries or _true(file.metadata.get("ss_zero_terminal_snr"))
    if zero and kind_of == EPSILON:
        doubts.append(f"{file.path.name} says that its schedule ends in pure noise, which no model that predicts epsilon can do: "
                      "the usual schedule is used; if its pictures are noise, give --prediction v_prediction.")  # fmt: skip
    return Prediction(kind_of, by, zero and kind_of == V and kind == "sdxl", tuple(doubts))


def _statements(file: SafetensorsFile, kind: str) -> tuple[list[tuple[str, str]], list[str]]:
    """(type, what says so), most trusted first; and what cannot be understood."""
    texts, said, doubts = file.metadata, [], []
    if "v_pred" in file.entries:  # a marker that trainers of such models add
        said.append((V, "its key v_pred"))
    word = texts.get("modelspec.prediction_type", "").strip().casefold()
    if word in _WORDS:
        said.append((_WORDS[word], "its modelspec.prediction_type"))
    elif word and word not in _OTHERS:
        doubts.append(f'{file.path.name}: its modelspec.prediction_type "{word[:40]}" is not known and was passed over; '
                      "--prediction decides.")  # fmt: skip
    key = texts.get("modelspec.predict_key", "").strip().casefold()  # as ComfyUI writes it into what it saves
    if key in _WORDS:
        said.append((_WORDS[key], "its modelspec.predict_key"))
    if "ss_v_parameterization" in texts:
        said.append((V if _true(texts["ss_v_parameterization"]) else EPSILON, "its ss_v_parameterization"))
    if kind == "sd2" and (deviation := _deviation(file)) is not None:
        said.append((V if deviation > V_DEVIATION else EPSILON, "its weights (as ComfyUI tells SD2's two kinds)"))
    if texts.get("modelspec.architecture", "").startswith("stable-diffusion-v2-768-v"):
        said.append((V, "its modelspec.architecture"))
    return said, doubts


def _refuse_others(file: SafetensorsFile) -> None:
    word = file.metadata.get("modelspec.prediction_type", "").strip().casefold()
    if word in _OTHERS:
        raise ErasureError(f'{file.path.name} says that it predicts "{word}", but only epsilon and v_prediction are supported: '
                           "use another model, or give --prediction if it is not so.")  # fmt: skip


def _true(text: str | None) -> bool:
    return (text or "").strip().casefold() in ("true", "1", "yes")


def _deviation(file: SafetensorsFile) -> float | None:
    """Of the bias that ComfyUI looks at (output_blocks.11 in SD2 itself)."""
    found = [m for name in file.entries if (m := _FIRST_BIAS.fullmatch(name))]
    if not found:
        return None
    return float(file.read(max(found, key=lambda m: int(m["n"]))[0]).float().std(unbiased=False))


def prediction_of_folder(checkpoint: Checkpoint, given: str | None = None) -> Prediction:
    """What a diffusers folder's model predicts: as given, else what its scheduler says, epsilon where that says nothing.

    Raises:
        ErasureError: the scheduler's configuration cannot be read, or names no type.
    """
    path = checkpoint.path / "scheduler" / "scheduler_config.json"
    config: Any = read_json(path) if path.exists() else {}
    if not isinstance(config, dict):
        raise ErasureError(f"{path} is not a scheduler's configuration: download the folder again.")
    word = config.get("prediction_type", EPSILON)
    if given is None and word not in (EPSILON, V):
        raise ErasureError(f'the model predicts "{word}", by {path}: only models that predict "epsilon" or "v_prediction" are '
                           "supported; mend it, or give --prediction.")  # fmt: skip
    by = "the setting prediction" if given else "its scheduler"
    said, doubts = _statements(checkpoint.files[0], "sd1")  # a folder's weights are not asked: its scheduler speaks for them
    if given and word in (EPSILON, V):
        said = [(word, "its scheduler"), *said]
    found = given or word
    doubts += [f"{checkpoint.path.name}: {why} says {t}, but {by} says {found}, which is used; --prediction decides otherwise."
               for t, why in said if t != found]  # fmt: skip
    return Prediction(found, by, bool(config.get("rescale_betas_zero_snr", False)), tuple(doubts))


def modelspec_word(prediction: str | None) -> str | None:
    """ModelSpec's word for a prediction type."""
    return {EPSILON: "epsilon", V: "v"}.get(prediction or "")
