"""What a dry run refuses the run refuses, in the same words, before anything is drawn; and the other way round."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from realera_nodes import memory
from realera_nodes.backends import loading
from realera_nodes.backends.diffusers import DiffusersBackend
from realera_nodes.cli import app
from realera_nodes.core.errors import ErasureError
from realera_nodes.memory import Need, require_memory
from tests.tiny import SIDE, tiny_files

NAME = "sd1-epsilon"  # of the tiny model's files


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "400")


def trees(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if "cache" not in p.relative_to(folder).parts[:1]}


def both(tmp_path: Path, *arguments: str | Path) -> str:
    """The sentence that a dry run and a run end with."""
    before = trees(tmp_path)
    told = []
    for more in (["--dry-run"], []):
        result = CliRunner().invoke(app, [str(a) for a in (*arguments, *more)])
        assert result.exit_code == 1, (more, result.output, result.exception)
        assert isinstance(result.exception, SystemExit), result.exception
        assert "Traceback" not in result.output
        told.append("error: " + " ".join(result.output.split()).partition("error: ")[2])  # a run shows that it loads the model
        assert trees(tmp_path) == before, f"something was left by {more or 'the run'}"
    assert told[0] == told[1], told
    assert len(told[0]) > len("error: "), told
    return told[0]


def erase(tmp_path: Path, *more: str | Path, source: Path | None = None, out: Path | None = None) -> str:
    source, out = source or tiny_files("sd1")[1], out or tmp_path / "out"
    words = [] if "--concept" in more else ["--concept", "airplane", "--anchor", "sky"]
    return both(tmp_path, "erase", source, *words, "--out", out, "--size", str(SIDE), *more)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*args, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(loading, "load_backend", loaded)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--size", "0"], "size is 0: it must lie between 8 and 2048"),
        (["--size", "-8"], "size is -8"),
        (["--size", "1000000000"], "size is 1000000000"),
        (["--guidance", "nan"], "guidance is nan: it must lie between 0 and 100"),
        (["--guidance", "inf"], "guidance is inf"),
        (["--guidance", "-1e308"], "guidance is -1e+308"),
        (["--seed", "99999999999999999999"], "seed is 99999999999999999999: it must lie between -2^63 and 2^64 - 1"),
        (["--seed", "-99999999999999999999"], "seed is -99999999999999999999"),
        (["--pictures", "0"], "pictures is 0"),
        (["--pictures", "100000"], "pictures is 100000"),
        (["--sampling-steps", "0"], "sampling_steps is 0"),
        (["--sampling-steps", "1001"], "sampling_steps is 1001"),
        (["--prediction", "sample"], 'prediction is "sample": choose one of epsilon, v_prediction'),
        (["--residue", ""], "residue phrase is empty"),
        (["--set", "neighbors.m=100000000"], "neighbors.m is 100000000"),
        (["--set", "neighbors.n=100000000"], "neighbors.n is 100000000"),
        (["--set", "closed_form.strength=-1"], "closed_form.strength is -1"),
        (["--set", "closed_form.ridge=1e308"], "closed_form.ridge is 1e+308"),
        (["--set", "closed_form.lambda_1=inf"], "closed_form.lambda_1 is inf"),
        (["--set", "alignment.lr=nan"], "alignment.lr is nan"),
        (["--set", 'alignment.targets=["attn1.to_q"]'], 'targets holds "attn1.to_q"'),
        (["--set", 'alignment.targets=["attn2.to_out.0"]'], 'targets holds "attn2.to_out.0"'),
        (["--set", 'alignment.targets=["attn2.to_k", "to_v"]'], "write attn2.to_v"),
        (["--set", 'alignment.targets=["nowhere"]'], 'targets holds "nowhere"'),
        (["--set", "closed_form_on=false", "--set", "alignment_on=false"], "both off"),
        (["--method", "mace", "--set", 'suppression.targets=["attn1.to_k"]'], 'targets holds "attn1.to_k"'),
        (["--method", "mace", "--set", "suppression.t2=5000"], "suppression.t2 is 5000"),
        (["--method", "uce", "--set", "strength=-0.5"], "strength is -0.5"),
        (["--method", "uce", "--set", "to_anchor=false", "--set", "guide=Airplane"], "both erased and the guide"),
        (["--method", "esd-x", "--set", "eta=1e30"], "eta is 1e+30"),
        (["--method", "esd-x", "--no-save-checkpoint"], "nothing would be written"),
        (["--concept", "airplane", "--anchor", "sky\n", "--preserve", "airplane\u200b"], "both erased"),
        (["--concept", "\u200b", "--anchor", "sky"], "the concept to erase is empty"),
        (["--concept", "\ufeff \u2060", "--anchor", "sky"], "the concept to erase is empty"),
        (["--concept", "airplane", "--anchor", "\u00a0"], "the anchor of"),
        (["--concept", "x" * 5000, "--anchor", "sky"], "shorten it"),
        (["--concept", r"x \(y\)", "--anchor", "c", "--concept", "x (y)", "--anchor", "c"], "twice"),
    ],
    ids=lambda v: " ".join(v)[:60].encode("ascii", "replace").decode() if isinstance(v, list) else "",
)  # fmt: skip
def test_what_needs_no_model_is_refused_before_it_is_loaded(arguments: list[str], says: str, tmp_path: Path) -> None:
    assert says in erase(tmp_path, *arguments)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            '[[concepts]]\nphrase = "bird"\nanchor = "sky"\npreserve = [{ phrase = "ship", weight = 1' + 400 * "0" + " }]",
            "weight",
        ),
        ('[[concepts]]\nphrase = "bird"\nanchor = "sky"\npreserve = [{ phrase = "ship", weight = nan }]', "weight"),
        ("seed = 1" + 5000 * "0", "is not TOML"),
        ("x = " + 3000 * "[" + 3000 * "]", "is not TOML"),
        ("[neighbors]\nm = 100000000", "neighbors.m is 100000000"),
        ("[closed_form]\nridge = 1e308", "closed_form.ridge is 1e+308"),
        ('[[concepts]]\nphrase = "bird"\nanchor = "sky"\ntemplates = ["no place"]', "once, where the phrase goes"),
        ("retain = 3", "retain must be a list"),
        ("concepts = 3", "[[concepts]]"),
        ("method = 3", 'no method "3"'),
        ('[[concepts]]\nphrase = "\\u200b"\nanchor = "sky"', "is empty"),
        ("\0", "is not TOML"),
    ],
    ids=lambda v: "",
)
def test_configs_are_refused_alike(text: str, says: str, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(text)
    assert says in erase(tmp_path, "--config", config)


@pytest.mark.usefixtures("no_model")
def test_a_config_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "is no file" in erase(tmp_path, "--config", tmp_path / "pipe")
    assert "is no file" in erase(tmp_path, "--config", tmp_path)
    assert "is no file" in erase(tmp_path, "--config", "/dev/zero")


def grid_is_a_folder(out: Path) -> None:
    (out / "grid.png").mkdir(parents=True)


def a_link_to_nothing(name: str) -> Callable[[Path], None]:
    def make(out: Path) -> None:
        out.mkdir()
        (out / name).symlink_to(out / "nowhere")

    return make


PLACES = [
    (grid_is_a_folder, ["--overwrite"], "is a folder"),
    (grid_is_a_folder, [], "is a folder"),
    (lambda out: (out / f"{NAME}-erased.safetensors").mkdir(parents=True), ["--overwrite"], "is a folder"),
    (lambda out: (out / f"{NAME}-erased-lora.safetensors").mkdir(parents=True), ["--overwrite"], "is a folder"),
    (a_link_to_nothing("grid.png"), [], "already exists"),
    (a_link_to_nothing(f"{NAME}-erased-edit-lora.safetensors"), [], "already exists"),
    (lambda out: out.symlink_to(out.parent / "nowhere"), ["--overwrite"], "give --out a folder"),
    (lambda out: out.symlink_to(out), [], "give --out a folder"),
    (lambda out: out.write_text(""), ["--overwrite"], "is a file: give --out a folder"),
    (lambda out: os.mkfifo(out), [], "give --out a folder"),
]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(("make", "options", "says"), PLACES)
def test_places_that_cannot_be_written_to(make, options: list[str], says: str, tmp_path: Path) -> None:
    make(tmp_path / "out")
    assert says in erase(tmp_path, *options)


@pytest.mark.usefixtures("no_model")
def test_places_below_a_file_and_names_that_are_too_long(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "is a file" in erase(tmp_path, out=tmp_path / "file" / "deep" / "out")
    assert "too long" in erase(tmp_path, out=tmp_path / ("x" * 300))
    assert "too long" in erase(tmp_path, out=tmp_path / "new" / ("x" * 300) / "deep")
    long = tmp_path / f"{'m' * 236}.safetensors"  # fits, and what is named after it does not
    long.symlink_to(tiny_files("sd1")[1])
    assert "too long" in erase(tmp_path, source=long)
    assert "too long" in erase(tmp_path, source=long, out=tmp_path / "new" / "out")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("inside", [".", "unet", "new/deep"])
@pytest.mark.parametrize("option", ["--overwrite", "--no-save-checkpoint"])
def test_an_output_inside_the_source_folder(inside: str, option: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.symlink_to(tiny_files("sd1")[0])
    before = trees(tiny_files("sd1")[0])
    assert "inside the source folder" in erase(tmp_path, option, source=model, out=model / inside)
    assert trees(tiny_files("sd1")[0]) == before


@pytest.mark.usefixtures("no_model")
def test_a_folder_of_others_is_not_replaced(tmp_path: Path) -> None:
    kept = tmp_path / "out" / f"{NAME}-erased" / "mine.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    assert "not overwritten" in erase(tmp_path, "--overwrite", source=tiny_files("sd1")[0])
    assert kept.read_text() == "mine"


@pytest.mark.usefixtures("no_model")
def test_training_without_peft_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    assert "pip install peft" in erase(tmp_path)


@pytest.fixture
def no_unet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model may be loaded, but its UNet is asked nothing."""

    def asked(*args, **options):
        raise AssertionError("the UNet was asked")

    for name in ("predict_noise", "_call", "latents", "trajectories", "pictures"):
        monkeypatch.setattr(DiffusersBackend, name, asked)


LONG = "very " * 74 + "long"


@pytest.mark.usefixtures("no_unet")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--concept", LONG, "--anchor", "sky"], "shorten it"),
        (["--concept", "airplane", "--anchor", LONG], "shorten it"),
        (["--residue", LONG], "shorten it"),
        (["--preserve", LONG], "shorten it"),
        (["--method", "uce", "--preserve", LONG], "shorten it"),
        (["--method", "mace", "--concept", "very " * 70 + "long", "--anchor", "sky"], "shorten it"),
        (["--set", "neighbors.d1=0.01", "--set", "neighbors.s1=0.9"], "no neighbor lies within d1"),
        (["--set", "neighbors.s2=-1"], "no beyond-concept sample lies within d2"),
        (["--size", "13"], "multiple of"),
    ],
    ids=lambda v: " ".join(v)[:40] if isinstance(v, list) else "",
)
def test_what_needs_the_text_encoder_is_refused_before_the_unet_is_asked(arguments: list[str], says: str, tmp_path: Path) -> None:
    assert says in erase(tmp_path, *arguments)


@pytest.mark.usefixtures("no_unet")
def test_a_template_that_swallows_its_phrase(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('[[concepts]]\nphrase = "plane"\nanchor = "sky"\ntemplates = ["{}tree"]')
    assert "write the phrase as its own words" in both(
        tmp_path, "erase", tiny_files("sd1")[1], "--config", config, "--out", tmp_path / "out", "--size", SIDE
    )


@pytest.mark.usefixtures("no_unet")
@pytest.mark.parametrize(
    ("free", "arguments", "says"),
    [
        (1e6, [], r"free: lower size"),
        (2e8, ["--set", "neighbors.m=10000"], "lower neighbors.m or neighbors.n"),
        (3e9, ["--set", "alignment.batch=64", "--size", "256"], "lower alignment.batch or size"),
        (2e9, ["--method", "mace", "--set", "suppression.batch=64", "--size", "256"], "lower suppression.batch or size"),
        (4e7, ["--pictures", "64", "--size", "64"], "lower pictures or size"),
        (
            1.5e9, ["--set", "alignment.trajectories=64", "--set", "alignment.trajectory_steps=1000", "--size", "128"],
            "lower alignment.trajectories",
        ),
    ],
)  # fmt: skip
def test_more_memory_than_there_is(free: float, arguments: list[str], says: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(memory, "available", lambda device: free)
    told = erase(tmp_path, *arguments)
    assert says in told
    assert "GB of memory" in told


def test_free_memory_is_known_and_needs_are_compared_with_it() -> None:
    free = memory.available(torch.device("cpu"))
    assert 1e8 < free < 1e14
    backend = SimpleNamespace(device=torch.device("cpu"))
    require_memory(backend, [Need(free / 100, "a little", "lower it")])
    with pytest.raises(ErasureError, match=r"everything needs about .* GB of memory and .* GB are free: lower it\."):
        require_memory(backend, [Need(1, "nothing", ""), Need(free * 100, "everything", "lower it")])


def test_a_dry_run_that_says_yes_writes_nothing_and_the_run_does_it(tmp_path: Path) -> None:
    common = ["erase", tiny_files("sd1")[1], "--concept", r"air\nplane \(icon\)", "--anchor", "the [bold]sky", "--size", SIDE]
    small = [
        "--method",
        "uce",
        "--pictures",
        "1",
        "--sampling-steps",
        "1",
        "--residue",
        "a\n[/] <b>$x$",
        "--out",
        tmp_path / "out",
    ]
    arguments = [str(a) for a in (*common, *small)]
    result = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert result.exit_code == 0, result.output
    assert r"air\nplane (icon) -> the [bold]sky" in result.output
    assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    page = (tmp_path / "out" / "report.md").read_text()
    assert r"# Erased: air\\nplane (icon)" in page
