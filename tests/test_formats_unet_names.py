"""Every parameter of a UNet is found under diffusers' name in either layout, as diffusers' own conversion has it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from realera_nodes.backends.configs import unet_config
from realera_nodes.demo import layout
from realera_nodes.demo.expand import checkpoint_path, pipeline_path
from realera_nodes.formats.architecture import detect
from realera_nodes.formats.checkpoint import open_checkpoint, write_edited
from realera_nodes.formats.stream import SafetensorsFile
from realera_nodes.formats.unet_names import ldm_parameters
from tests.test_formats_architecture import DIFFUSERS, diffusers_shapes
from tests.tiny import KINDS, tiny_files, unet_name

LDM = "model.diffusion_model."


def converted(names: dict[str, tuple[int, ...]], kind: str) -> dict[str, str]:
    """diffusers name -> LDM name by diffusers' own conversion, which moves numbered one-element tensors about."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    ordered = list(names)
    numbered = {LDM + name: torch.tensor([i]) for i, name in enumerate(ordered)}
    moved = convert_ldm_unet_checkpoint(numbered, unet_config(names, kind))
    return {name: ordered[int(value)] for name, value in moved.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_those_of_diffusers_conversion_on_tiny_models(kind: str) -> None:
    folder, single = (open_checkpoint(p) for p in tiny_files(kind))
    shapes = {name.removeprefix(LDM): s for name, s in single.files[0].shapes.items() if name.startswith(LDM)}
    found = {name: key.removeprefix(LDM) for name, key in single.architecture.parameters.items()}
    assert found == converted(shapes, kind)
    assert set(found) == set(folder.architecture.parameters)
    assert set(found.values()) == set(shapes), "a parameter of the file has no name"
    for name, key in folder.architecture.parameters.items():
        assert key == name
    assert {f"{name}.weight" for name in single.architecture.projections} < set(found)


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_those_of_diffusers_conversion_at_full_size(kind: str) -> None:
    """SD 1.5's, 2.1's and SDXL's own structure, by the names of diffusers' networks."""
    shapes = diffusers_shapes(kind)
    layers = 2
    attended = [t.startswith("Cross") for t in DIFFUSERS[kind].get("up_block_types", ("Up", "Cross", "Cross", "Cross"))]
    stored = {name: unet_name(name, layers, attended) for name in shapes}
    ldm = {stored[name]: shape for name, shape in shapes.items()}
    assert len(ldm) == len(shapes)
    assert ldm_parameters(ldm, kind == "sdxl") == stored
    assert converted(ldm, kind) == stored


def test_the_embedded_models_names() -> None:
    """Against the table that expands it, and against its other layout, value by value."""
    single, folder = open_checkpoint(checkpoint_path()), open_checkpoint(pipeline_path())
    assert set(single.architecture.parameters) == set(folder.architecture.parameters) == set(folder.files[0].entries)
    names = [k.removeprefix(LDM) for k in single.files[0].entries if k.startswith(LDM)]
    table = {new: LDM + old for old, new in layout.unet_to_diffusers(names, (1, 1)).items()}
    assert single.architecture.parameters == table
    for name in ("conv_in.bias", "time_embedding.linear_2.weight", "up_blocks.0.upsamplers.0.conv.weight"):
        assert torch.equal(single.read(name), folder.read(name)), name


def test_a_class_embedding_is_not_sdxls() -> None:
    unet = {f"label_emb.0.{i}.weight" for i in (0, 2)} | {"input_blocks.0.0.weight", "output_blocks.0.0.in_layers.0.weight"}
    assert "class_embedding.linear_2.weight" in ldm_parameters(unet, sdxl=False)
    assert ldm_parameters(unet, sdxl=True)["add_embedding.linear_1.weight"] == "label_emb.0.0.weight"


def test_what_is_no_part_of_the_unet_is_left_out() -> None:
    names = SafetensorsFile.open(tiny_files("sd1")[1]).shapes
    foreign = {"model.diffusion_model.extra.weight": (1,), "model.diffusion_model.input_blocks.1.0.odd.weight": (1,),
               "model_ema.diffusion_modelconv_in": (1,), "input_blocks.0.0.weight": (1,)}  # fmt: skip
    assert detect(names | foreign).parameters == detect(names).parameters
    assert not any(re.search("first_stage|cond_stage", key) for key in detect(names).parameters.values())


@pytest.mark.parametrize("which", [0, 1], ids=["folder", "file"])
def test_any_parameter_can_be_rewritten(which: int, tmp_path: Path) -> None:
    source = tiny_files("sd2")[which]
    base, target = open_checkpoint(source), tmp_path / source.name
    changed = ["conv_in.bias", "mid_block.resnets.1.norm2.weight", "down_blocks.0.attentions.0.proj_in.weight"]
    write_edited(base, target, {name: lambda w: w + 1 for name in changed}, {})
    written = open_checkpoint(target)
    for name in base.architecture.parameters:
        wanted = base.read(name).float() + (name in changed)
        assert torch.equal(written.read(name).float(), wanted.to(base.read(name).dtype).float()), name
    if which:
        old, new = load_file(source), load_file(target)
        keys = {base.architecture.parameters[name] for name in changed}
        assert {k for k in old if not torch.equal(old[k], new[k])} == keys
