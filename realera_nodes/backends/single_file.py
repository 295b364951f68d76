"""A diffusers pipeline from one .safetensors file in the original Stable Diffusion layout, without a network.

Configurations come from the tensors' shapes (``configs``), the tokenizer from this package, and weights are renamed by
diffusers' own single-file conversion.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ErasureError
from ..demo.bpe import write_tokenizer
from ..demo.layout import vae_to_diffusers
from ..formats.architecture import Kind
from ..formats.checkpoint import Checkpoint
from ..formats.prediction import prediction_of_file
from ..formats.stream import FLOATS, SafetensorsFile
from .configs import LATENT_SCALE, clip_config, open_clip_config, shape_of, unet_config, vae_config

State = dict[str, Tensor]
UNET, VAES = "model.diffusion_model.", ("first_stage_model.", "vae.")
#: (layout, possible prefixes) of each kind's text encoders
TEXTS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "sd1": (("clip", ("cond_stage_model.transformer.",)),),
    "sd2": (("open_clip", ("cond_stage_model.model.", "conditioner.embedders.0.model.")),),
    "sdxl": (
        ("clip", ("conditioner.embedders.0.transformer.",)),
        ("open_clip", ("conditioner.embedders.1.model.",)),
    ),
}
#: pixels that a file may call its own
SIDES = (8, 8192)
#: OpenCLIP-H has 24 layers, of which SD2 uses 23; files written by diffusers' scripts leave out the last
SD2_LAYERS = 23


@dataclass
class Part:
    """Tensors of a file under one prefix, read on demand, in one dtype, without NaN."""

    file: SafetensorsFile
    prefix: str
    dtype: torch.dtype
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, file: SafetensorsFile, prefixes: Iterable[str], dtype: torch.dtype) -> Part | None:
        """The part under the first of the prefixes that occurs."""
        for prefix in prefixes:
            shapes = {name[len(prefix) :]: shape for name, shape in file.shapes.items() if name.startswith(prefix)}
            if shapes:
                return cls(file, prefix, dtype, shapes)
        return None

    def read(self, wanted: Callable[[str], bool] = lambda name: True) -> State:
        """Float tensors by name without prefix. ErasureError: quantised weights, NaN or infinity."""
        state = {}
        for name in self.shapes:
            if not wanted(name) or name.endswith("position_ids"):
                continue
            full = self.prefix + name
            if self.file.entries[full].dtype in FLOATS:
                state[name] = finite(self.file.read(full).to(self.dtype), full, self.file.path.name)
            elif name.endswith(".weight"):
                raise ErasureError(f"{full} in {self.file.path.name} holds quantised whole numbers: use a float16 version.")
        return state


def finite(value: Tensor, name: str, file: str) -> Tensor:
    """The value. ErasureError: it contains NaN or infinity."""
    # extremes carry NaN along, and take a third of isfinite's time
    if value.numel() and not torch.isfinite(torch.stack(value.aminmax())).all():
        raise ErasureError(f"{name} in {file} contains NaN or infinity: the file is damaged, use another copy of the model.")
    return value


def single_file_pipeline(checkpoint: Checkpoint, dtype: torch.dtype, prediction: str | None = None) -> Any:
    """StableDiffusionPipeline or StableDiffusionXLPipeline on the CPU.

    Args:
        checkpoint: of an opened .safetensors file
        prediction: "epsilon" or "v_prediction"; None is what the file says

    Raises:
        ErasureError: a part is missing, incomplete or damaged, or of an unknown make.
    """
    import diffusers

    file, kind = checkpoint.files[0], checkpoint.architecture.kind
    unet, vae = Part.of(file, [UNET], dtype), Part.of(file, VAES, dtype)
    texts = [(layout, Part.of(file, prefixes, dtype)) for layout, prefixes in TEXTS[kind]]
    _require(file, kind, unet, vae, [t for _, t in texts])
    assert unet is not None
    assert vae is not None
    try:
        scheduler = make_scheduler(file, kind, unet, prediction)
        autoencoder = make_vae(vae, kind)
        side = native_side(file, kind, scheduler.config.prediction_type)
        network = make_unet(unet, kind, side // 2 ** (len(autoencoder.config.block_out_channels) - 1))
        encoders = [make_clip(t, layout, kind, i == 1) for i, (layout, t) in enumerate(texts) if t is not None]
    except ErasureError as error:
        if file.path.name in str(error):
            raise
        raise ErasureError(f"{file.path.name}: {error}") from error
    tokenizers = make_tokenizers(layout for layout, _ in texts)
    parts = {"vae": autoencoder, "unet": network, "scheduler": scheduler}
    if kind == "sdxl":
        return diffusers.StableDiffusionXLPipeline(
            text_encoder=encoders[0], text_encoder_2=encoders[1], tokenizer=tokenizers[0], tokenizer_2=tokenizers[1],
            add_watermarker=False, **parts)  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        text_encoder=encoders[0], tokenizer=tokenizers[0], safety_checker=None, feature_extractor=None,
        requires_safety_checker=False, **parts)  # fmt: skip


def _require(file: SafetensorsFile, kind: Kind, unet: Part | None, vae: Part | None, texts: list[Part | None]) -> None:
    missing = [] if unet else [f"UNet ({UNET}*)"]
    for part, (_, prefixes) in zip(texts, TEXTS[kind], strict=True):
        if part is None:
            missing.append(f"text encoder ({prefixes[0]}*)")
    if vae is None:
        missing.append(f"VAE ({VAES[0]}*)")
    if missing:
        raise ErasureError(f"{file.path.name} has no {' and no '.join(missing)}: choose a checkpoint with all of its parts.")


def native_side(file: SafetensorsFile, kind: Kind, prediction: str) -> int:
    """Pixels: what the file's modelspec says, if it can be, else what the models of its kind were trained at."""
    stated = re.fullmatch(r"([0-9]{1,5})x\1", file.metadata.get("modelspec.resolution", ""))
    if stated and SIDES[0] <= int(stated[1]) <= SIDES[1]:
        return int(stated[1])
    return 1024 if kind == "sdxl" else 768 if kind == "sd2" and prediction == "v_prediction" else 512


def make_scheduler(file: SafetensorsFile, kind: Kind, unet: Part, prediction: str | None) -> Any:
    """SD's schedule. The prediction type is as given, else what the file says (``prediction_of_file``)."""
    from diffusers import DDIMScheduler

    if "edm_mean" in file.entries or "edm_vpred.sigma_max" in file.entries:
        raise ErasureError("it is an EDM model such as Playground 2.5, whose noise schedule is not supported: use another model.")
    found = prediction_of_file(file, kind, prediction)
    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type=found.type, rescale_betas_zero_snr=found.zero_snr,
        timestep_spacing="trailing" if found.zero_snr else "leading")  # fmt: skip


def _empty(make: Callable[..., Any], *args: Any, **config: Any) -> Any:
    """A module whose parameters have shapes and no memory."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return make(*args, **config)


def _filled(module: Any, state: State, part: str) -> Any:
    """An empty module with its weights. ErasureError: some are missing or of another shape; more do not matter."""
    wanted = {name: value.shape for name, value in module.state_dict().items()}
    missing = [name for name in wanted if name not in state]
    if missing:
        raise ErasureError(
            f"its {part} lacks {len(missing)} tensors, e.g. {missing[0]}: the file is incomplete, download it again."
        )
    for name, shape in wanted.items():
        if state[name].shape != shape:
            raise ErasureError(f"{name} of its {part} has shape {tuple(state[name].shape)} instead of {tuple(shape)}, "
                               "which is of another model: use another file.")  # fmt: skip
    module.load_state_dict({name: state[name] for name in wanted}, assign=True)
    return module.eval()


def make_unet(part: Part, kind: Kind, sample_size: int) -> Any:
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config = unet_config(part.shapes, kind) | {"sample_size": sample_size}
    if kind == "sdxl":
        shape_of(part.shapes, "label_emb.0.2.weight", "UNet")  # the conversion needs it
    state = convert_ldm_unet_checkpoint({UNET + name: value for name, value in part.read().items()}, config)
    return _filled(_empty(UNet2DConditionModel, **config), state, "UNet")


def make_vae(part: Part, kind: Kind) -> Any:
    """AutoencoderKL, or AutoencoderTiny from ComfyUI's names for TAESD."""
    from diffusers import AutoencoderKL, AutoencoderTiny
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    if any(name.startswith("taesd_decoder.") for name in part.shapes):
        factor = torch.tensor(1.0)
        state = part.read(lambda name: name in ("vae_scale", "vae_shift"))
        if "vae_shift" in state and state["vae_shift"] != 0:
            raise ErasureError("its TAESD shifts latents (vae_shift), as Stable Diffusion's does not: use another file.")
        # ComfyUI decodes latent / S * vae_scale, diffusers latent / scaling_factor
        factor = torch.tensor(LATENT_SCALE[kind]) / state.get("vae_scale", factor).float()
        channels = shape_of(part.shapes, "taesd_decoder.1.weight", "VAE")[1]
        tiny = part.read(lambda name: re.match(r"taesd_(en|de)coder\.\d+\.", name) is not None)
        return _filled(_empty(AutoencoderTiny, latent_channels=channels, scaling_factor=float(factor)),
                       {vae_to_diffusers(name): value for name, value in tiny.items()}, "VAE")  # fmt: skip
    config = vae_config(part.shapes, kind)
    weights = part.read(lambda name: name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")))
    return _filled(_empty(AutoencoderKL, **config), convert_ldm_vae_checkpoint(weights, config), "VAE")


def make_clip(part: Part, layout: str, kind: Kind, projected: bool) -> Any:
    """CLIPTextModel, with SDXL's projection if ``projected``."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    make = CLIPTextModelWithProjection if projected else CLIPTextModel
    if layout == "clip":
        state = {name.removeprefix("text_model."): value for name, value in part.read().items()}
        config = CLIPTextConfig(**clip_config({name: tuple(value.shape) for name, value in state.items()}))
    else:
        config, state = _open_clip(part, kind)
    model = _empty(make, config)
    if hasattr(model, "text_model"):  # transformers 5.6 took it off CLIPTextModel
        state = {name if name.startswith("text_projection") else f"text_model.{name}": value for name, value in state.items()}
    return _filled(model, state, "text encoder")


def _open_clip(part: Part, kind: Kind) -> tuple[Any, State]:
    """Configuration and weights in transformers' layout, without ``text_model.``."""
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
    from transformers import CLIPTextConfig

    config = open_clip_config(part.shapes)
    if kind == "sd2" and config["num_hidden_layers"] != SD2_LAYERS:
        config["num_hidden_layers"] -= 1  # SD2 reads the last layer but one
    layers = config["num_hidden_layers"]

    def used(name: str) -> bool:
        match = re.match(r"transformer\.resblocks\.(\d+)\.", name)
        return int(match[1]) < layers if match else name != "logit_scale"

    weights = part.read(used)

    class Host:  # what the conversion asks of a model
        pass

    Host.config = CLIPTextConfig(**config)  # type: ignore[attr-defined]
    state = convert_open_clip_checkpoint(Host, weights, prefix="")
    return Host.config, {name.removeprefix("text_model."): value.contiguous() for name, value in state.items()}  # type: ignore[attr-defined]


def make_tokenizers(layouts: Iterable[str]) -> list[Any]:
    """CLIP's, one for each text encoder. OpenCLIP pads with "!", id 0."""
    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        pads = {"clip": {}, "open_clip": {"pad_token": "!"}}
        return [CLIPTokenizer.from_pretrained(folder, local_files_only=True, **pads[layout]) for layout in layouts]
