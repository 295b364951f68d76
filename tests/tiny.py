"""Tiny random Stable Diffusions of each kind, as a diffusers folder and as a single file with the same weights.

Widths of the text are the real ones, as kinds are told apart by them; everything else is as small as it goes.
"""

from __future__ import annotations

import functools
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from realera_nodes.backends.loading import quiet
from realera_nodes.demo.bpe import write_tokenizer

KINDS = ("sd1", "sd2", "sdxl")
PREDICTIONS = {"sd1": "epsilon", "sd2": "v_prediction", "sdxl": "epsilon"}  # of what is written
EMBEDDING = torch.float8_e4m3fn  # on disk: the vocabulary cannot be small, so its vectors are
SIDE = 16  # pixels: 8 x 8 latents
#: where levels have attention, and how much, differs between the kinds as it does between the real ones
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"block_out_channels": (32, 64), "layers_per_block": 1, "attention_head_dim": 8, "cross_attention_dim": 768,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
    "sd2": {"block_out_channels": (64, 128), "layers_per_block": 2, "attention_head_dim": (1, 2), "cross_attention_dim": 1024,
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), "use_linear_projection": True,
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D")},
    "sdxl": {"block_out_channels": (64, 128), "layers_per_block": 1, "attention_head_dim": (1, 2), "cross_attention_dim": 2048,
             "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "use_linear_projection": True,
             "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 2),
             "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816},
}  # fmt: skip
LAST_BIAS = {"sd1": "up_blocks.1.attentions.1", "sd2": "up_blocks.1.attentions.2", "sdxl": "up_blocks.0.attentions.1"}


def tiny_pipeline(kind: str, prediction: str = "epsilon", seed: int = 0) -> Any:
    """A pipeline with float16 weights. A v-model has the large biases that real ones have."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(sample_size=SIDE // 2, **UNETS[kind])
        if prediction == "v_prediction":
            unet.get_submodule(LAST_BIAS[kind] + ".transformer_blocks.0.norm1").bias.normal_(std=0.3)
        vae = AutoencoderKL(block_out_channels=(32, 64), layers_per_block=1, latent_channels=4, sample_size=SIDE,
                            scaling_factor=0.13025 if kind == "sdxl" else 0.18215,
                            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
        texts = {"sd1": [_clip(768)], "sd2": [_clip(1024, "gelu")], "sdxl": [_clip(768), _clip(1280, "gelu", projected=True)]}[
            kind
        ]
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1, prediction_type=prediction)  # fmt: skip
    parts = {"unet": unet.half(), "vae": vae.half(), "scheduler": scheduler, "text_encoder": texts[0]}
    if kind == "sdxl":
        return StableDiffusionXLPipeline(**parts, text_encoder_2=texts[1], tokenizer=_tokenizer(), tokenizer_2=_tokenizer("!"),
                                         add_watermarker=False)  # fmt: skip
    return StableDiffusionPipeline(**parts, tokenizer=_tokenizer("!" if kind == "sd2" else "<|endoftext|>"), safety_checker=None,
                                   feature_extractor=None, requires_safety_checker=False)  # fmt: skip


def _clip(width: int, activation: str = "quick_gelu", projected: bool = False) -> Any:
    from accelerate import init_empty_weights
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(hidden_size=width, intermediate_size=64, num_hidden_layers=1 if width == 1024 else 2,
                            num_attention_heads=width // 64, hidden_act=activation, projection_dim=width, eos_token_id=49407,
                            bos_token_id=49406)  # fmt: skip
    with init_empty_weights(include_buffers=False):
        model = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
    state = {}
    for name, value in model.state_dict().items():
        if name.endswith("token_embedding.weight"):  # the sum of two of 446 vectors: as good as random, and much quicker
            rows = torch.randn(446, width).half()
            ids = torch.arange(len(value))
            state[name] = (rows[ids % 223] + rows[223 + ids // 223]).to(EMBEDDING)
        elif value.ndim == 1:
            state[name] = (torch.randn(value.shape) * 0.1 + float("norm" in name and name.endswith("weight"))).half()
        else:
            state[name] = (torch.randn(value.shape) * value.shape[1] ** -0.5).half()
    model.load_state_dict(state, assign=True)
    return model.eval()


@functools.cache
def _tokenizer(pad: str = "<|endoftext|>") -> Any:
    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        return CLIPTokenizer.from_pretrained(folder, pad_token=pad, local_files_only=True)


def write_tiny(kind: str, out: Path, prediction: str = "epsilon") -> tuple[Path, Path]:
    """(diffusers folder, single file) under ``out``."""
    pipe = tiny_pipeline(kind, prediction)
    folder, file = out / f"{kind}-{prediction}", out / f"{kind}-{prediction}.safetensors"
    with quiet():
        pipe.save_pretrained(folder, safe_serialization=True)
    save_file(ldm_state(pipe, kind), file, metadata={"format": "pt"})
    return folder, file


_FILES = tempfile.TemporaryDirectory(prefix="tiny-sd-")  # removed at exit


@functools.cache
def tiny_files(kind: str) -> tuple[Path, Path]:
    """(diffusers folder, single file), written once a run: for reading only. sd2 is a v-model."""
    return write_tiny(kind, Path(_FILES.name), PREDICTIONS[kind])


@functools.cache
def tiny_backend(kind: str) -> Any:
    """The folder's backend at 16 pixels, loaded once a run: tests leave it as it was."""
    from realera_nodes.backends.loading import load_backend

    return load_backend(tiny_files(kind)[0], device="cpu", size=SIDE)


def ldm_state(pipe: Any, kind: str) -> dict[str, Tensor]:
    """A pipeline's weights under a single file's names, with the buffers and leftovers that such files have."""
    layers, levels = pipe.unet.config.layers_per_block, len(pipe.unet.config.block_out_channels)
    attended = [t.startswith("Cross") for t in pipe.unet.config.up_block_types]
    state = {"model.diffusion_model." + unet_name(n, layers, attended): v for n, v in pipe.unet.state_dict().items()}
    for name, value in pipe.vae.state_dict().items():
        conv = ".attentions." in name and name.endswith(".weight") and "group_norm" not in name
        state["first_stage_model." + vae_name(name, levels)] = value[:, :, None, None] if conv else value
    if kind == "sd2":
        state |= open_clip_state(pipe.text_encoder, "cond_stage_model.model.", unused=1)
    else:
        prefix = ("cond_stage_model" if kind == "sd1" else "conditioner.embedders.0") + ".transformer.text_model."
        state |= {prefix + n.removeprefix("text_model."): v for n, v in pipe.text_encoder.state_dict().items()}
        state[prefix + "embeddings.position_ids"] = torch.arange(77)[None]
    if kind == "sdxl":
        state |= open_clip_state(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    state |= {
        "alphas_cumprod": torch.rand(1000),
        "model_ema.decay": torch.tensor(0.5),
        "first_stage_model.loss.logvar": torch.ones(1),
    }
    return {name: value.contiguous() for name, value in state.items()}


def unet_name(name: str, layers: int, attended: list[bool]) -> str:
    """diffusers' name -> LDM's. ``attended``: which levels have attention on the way up."""
    fixed = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
             "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
             "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
             "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
             "mid_block.resnets.1": "middle_block.2"}  # fmt: skip
    for old, new in fixed.items():
        if name.startswith(old + "."):
            name = new + name[len(old) :]
    if m := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name):
        level, what, j, rest = int(m[2]), m[3], int(m[4]), m[5]
        n = level * (layers + 1) + j
        if what == "downsamplers":
            name = f"input_blocks.{(level + 1) * (layers + 1)}.0.op{rest.removeprefix('conv')}"
        elif what == "upsamplers":
            name = f"output_blocks.{level * (layers + 1) + layers}.{1 + attended[level]}.{rest}"
        else:
            side = f"input_blocks.{n + 1}" if m[1] == "down" else f"output_blocks.{n}"
            name = f"{side}.{int(what == 'attentions')}.{rest}"
    parts = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
             "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
    m = re.fullmatch(rf"((?:input|output)_blocks\.\d+\.0|middle_block\.[02])\.({'|'.join(parts)})\.(\w+)", name)
    return f"{m[1]}.{parts[m[2]]}.{m[3]}" if m else name


def vae_name(name: str, levels: int) -> str:
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", name).replace(".resnets.", ".block.")
    name = re.sub(r"mid_block\.block\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name).replace("upsamplers.0", "upsample")
    for old, new in {"mid_block.attentions.0": "mid.attn_1", "group_norm": "norm", "to_out.0": "proj_out", ".to_": ".",
                     "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut"}.items():  # fmt: skip
        name = name.replace(old, new)
    return name


def open_clip_state(encoder: Any, prefix: str, unused: int = 0) -> dict[str, Tensor]:
    """OpenCLIP's names, with q, k and v in one. ``unused``: further layers, which SD2 has and does not read."""
    source = {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}
    fixed = {"embeddings.token_embedding.weight": "token_embedding.weight", "final_layer_norm.weight": "ln_final.weight",
             "embeddings.position_embedding.weight": "positional_embedding",
             "final_layer_norm.bias": "ln_final.bias"}  # fmt: skip
    state = {new: source[old] for old, new in fixed.items()}
    width, layers = source["final_layer_norm.weight"].shape[0], encoder.config.num_hidden_layers
    state["text_projection"] = (
        source["text_projection.weight"].T if "text_projection.weight" in source else torch.eye(width).half()
    )
    parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj"}  # fmt: skip
    for i in range(layers + unused):
        old, new = f"encoder.layers.{min(i, layers - 1)}.", f"transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            state[f"{new}attn.in_proj_{kind}"] = torch.cat([source[f"{old}self_attn.{p}_proj.{kind}"] for p in "qkv"])
            state |= {f"{new}{b}.{kind}": source[f"{old}{a}.{kind}"] * (1 if i < layers else 2) for a, b in parts.items()}
    return {prefix + name: value for name, value in state.items()} | {prefix + "logit_scale": torch.tensor(4.6)}
