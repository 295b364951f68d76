"""Expansion: same bytes, whole or not at all, damage named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from realera_nodes.cli import app
from realera_nodes.demo import expand

RUNNER = CliRunner()


@pytest.fixture
def copied_assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the assets that a test may damage, with an empty cache beside it."""
    assets = tmp_path / "assets"
    shutil.copytree(expand.ASSETS, assets)
    monkeypatch.setattr(expand, "ASSETS", assets)
    monkeypatch.setattr(expand, "MANIFEST", assets / "manifest.json")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return assets


def files_under(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_assets_fit_the_repository() -> None:
    total = sum(p.stat().st_size for p in expand.ASSETS.iterdir())
    assert total <= 48e6
    recorded = set(json.loads(expand.MANIFEST.read_text())["assets"])
    assert recorded == {p.name for p in expand.ASSETS.glob("*.safetensors")}


def test_expansion_gives_the_recorded_bytes_twice(tmp_path: Path) -> None:
    recorded = expand.manifest()["expanded"]
    for name, write in ((expand.CHECKPOINT, expand.write_checkpoint), (expand.PIPELINE, expand.write_pipeline)):
        for attempt in ("first", "second"):
            target = tmp_path / attempt / name
            target.parent.mkdir(exist_ok=True)
            write(target)
            assert expand.tree_hash(target) == recorded[name]


def test_command_writes_both_layouts(tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["demo-model", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == [expand.PIPELINE, expand.CHECKPOINT]
    with safe_open(tmp_path / expand.CHECKPOINT, "pt") as f:
        keys = list(f.keys())
    assert "model.diffusion_model.input_blocks.3.1.transformer_blocks.0.attn2.to_k.weight" in keys
    assert "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight" in keys
    assert "first_stage_model.taesd_decoder.1.weight" in keys


def test_command_writes_one_layout_and_over_an_old_one(tmp_path: Path) -> None:
    for _ in range(2):
        result = RUNNER.invoke(app, ["demo-model", "--out", str(tmp_path), "--layout", "diffusers"])
        assert result.exit_code == 0, result.output
    assert [p.name for p in tmp_path.iterdir()] == [expand.PIPELINE]


def test_unknown_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose one of checkpoint, diffusers, both"):
        expand.expand(tmp_path / "x", "onnx")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["unet", "text", "vae"])
def test_a_damaged_asset_is_named_and_nothing_is_written(copied_assets: Path, tmp_path: Path, name: str) -> None:
    path = copied_assets / f"{name}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    result = RUNNER.invoke(app, ["demo-model", "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert f"{name}.safetensors" in result.stderr.replace("\n", "")
    assert "damaged" in result.stderr
    assert not files_under(tmp_path / "cache")
    assert not (tmp_path / "out").exists()


def test_a_truncated_and_a_missing_asset_are_named(copied_assets: Path) -> None:
    path = copied_assets / "classifier.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(expand.DemoAssetError, match=r"classifier\.safetensors .* damaged"):
        expand.load_asset("classifier")
    path.unlink()
    with pytest.raises(expand.DemoAssetError, match=r"classifier\.safetensors is missing"):
        expand.load_asset("classifier")


def test_wrong_bytes_are_not_kept(copied_assets: Path, tmp_path: Path) -> None:
    """What a changed library would do: the expansion differs from the recorded hash."""
    record = json.loads(expand.MANIFEST.read_text())
    record["expanded"][expand.CHECKPOINT] = "0" * 64
    expand.MANIFEST.write_text(json.dumps(record))
    with pytest.raises(expand.DemoAssetError, match="came out with hash"):
        expand.checkpoint_path()
    assert not files_under(tmp_path / "cache")


def test_a_full_disk_leaves_nothing_behind(copied_assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(path, tensors, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(expand, "write_tensors", full_disk)
    result = RUNNER.invoke(app, ["demo-model", "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "no space left" in result.stderr
    assert not files_under(tmp_path / "cache")
    assert not (tmp_path / "out").exists()


def test_the_cache_is_used_again(copied_assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = expand.checkpoint_path()
    monkeypatch.setattr(expand, "write_checkpoint", lambda _: pytest.fail("expanded again"))
    assert expand.checkpoint_path() == first


@pytest.mark.parametrize("cut", [100, 100_000])
def test_a_damaged_expansion_is_made_anew(copied_assets: Path, cut: int) -> None:
    first = expand.checkpoint_path()
    whole = first.read_bytes()
    first.write_bytes(whole[:-cut])
    expand._complete.cache_clear()
    assert expand.checkpoint_path() == first
    assert first.read_bytes() == whole


def test_what_another_process_expanded_meanwhile_stays(tmp_path: Path) -> None:
    target = tmp_path / "realera-demo"

    def write(folder: Path) -> None:
        (folder / "unet").mkdir(parents=True)
        (folder / "unet" / "config.json").write_text("{}")
        shutil.copytree(folder, target)  # the other one was faster
        (target / "in-use").touch()

    expand._whole_or_nothing(target, write, None, over=False)
    assert files_under(tmp_path) == ["realera-demo/in-use", "realera-demo/unet/config.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["realera-demo"], "nothing temporary is left"


def test_a_move_that_fails_for_another_reason_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no")

    monkeypatch.setattr(os, "replace", refuse)
    for over in (True, False):
        with pytest.raises(PermissionError):
            expand._whole_or_nothing(tmp_path / "x", lambda p: p.touch(), None, over=over)
        assert not list(tmp_path.iterdir())
