"""What writes files does so under Windows' rules too: names, open files, handles, line ends, code pages."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from realera_nodes.core.concepts import Concept
from realera_nodes.core.errors import ErasureError
from realera_nodes.core.training import TrainState
from realera_nodes.formats import windows as places
from realera_nodes.formats.atomic import atomic_file, atomic_folder, atomic_path, check_target
from realera_nodes.formats.checkpoint import open_checkpoint, write_edited
from realera_nodes.formats.lora import write_lora
from realera_nodes.formats.stream import SafetensorsFile, copy_file, rewrite, write_tensors
from tests.windows import windows

__all__ = ["windows"]
ROOT = Path(__file__).resolve().parents[1]
SHIPPED = [*(ROOT / "realera_nodes").rglob("*.py"), *(ROOT / "tools").rglob("*.py"), *(ROOT / "scripts").glob("*.py"),
           ROOT / "install.py", ROOT / "__init__.py", ROOT / "example_workflows" / "client.py"]  # fmt: skip


def by_handle(path: Path) -> None:
    with atomic_file(path) as f:
        f.write(b"whole")


def by_path(path: Path) -> None:
    with atomic_path(path) as partial:
        save_file({"x": torch.ones(3)}, partial, metadata={"a": "b"})


def folder(path: Path) -> None:
    with atomic_folder(path) as inside:
        (inside / "unet").mkdir()
        (inside / "unet" / "a").write_bytes(b"1")


def tensors(path: Path) -> None:
    write_tensors(path, {"x": torch.ones(3)}, {})


def lora(path: Path) -> None:
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    write_lora(path, {name: (torch.ones(1, 4), torch.ones(2, 1))}, {}, torch.float16)


def rewritten(path: Path) -> None:
    source = path.with_name("source.safetensors")
    write_tensors(source, {"x": torch.ones(3), "y": torch.ones(2)}, {})
    rewrite(source, path, {"x": lambda x: 2 * x}, {})


def copied(path: Path) -> None:
    source = path.with_name("source.safetensors")
    source.write_bytes(b"x" * 1000)
    copy_file(source, path)


def state(path: Path) -> None:
    from realera_nodes.resume import load_state, save_state

    parts = [torch.ones(2)]
    for step in (1, 2):  # the second over the first
        save_state(TrainState(step, [0.5], [], parts, parts, parts, torch.Generator().get_state()), path)
    assert load_state(path).step == 2


def shelf(path: Path) -> None:
    from realera_nodes.mass_config import MassConfig
    from realera_nodes.shelf import Base, FolderShelf

    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    kept = FolderShelf.of([Concept("cat", "dog")], [], MassConfig("mace"), Base((name,), "sd1", "0" * 64, "x"), path)
    for _ in range(2):
        kept.save(Concept("cat", "dog"), {name: (torch.ones(1, 768), torch.ones(320, 1))})


def run_files(path: Path) -> None:
    from realera_nodes.studio.runs import Run

    path.mkdir()
    run = Run(path)
    for step in range(3):
        run.set_state(state="running", done=step)
        run.note("écrit 日本")
    assert run.state["done"] == 2
    assert "日本" in run.log


def ledger(path: Path) -> None:
    from realera_nodes.bench.erasure.rows import Ledger

    for i in range(2):
        Ledger(path).add({"key": str(i)})


WRITERS = [by_handle, by_path, folder, tensors, lora, rewritten, copied, state, shelf, run_files, ledger]


@pytest.mark.parametrize("write", WRITERS, ids=lambda w: w.__name__)
def test_every_writer_works_under_the_rules(windows, tmp_path: Path, write: Callable[[Path], None]) -> None:
    target = tmp_path / "new name.safetensors"
    write(target)
    assert target.exists()
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".partial")]


def test_the_rules_bite(windows, tmp_path: Path) -> None:
    """The fixture refuses what Windows does: else no test above could fail."""
    (tmp_path / "a").write_bytes(b"1")
    with (tmp_path / "a").open("rb") as f:
        with pytest.raises(OSError, match="bad file descriptor"):
            os.fsync(f.fileno())
        with pytest.raises(PermissionError):
            (tmp_path / "a").rename(tmp_path / "b")
        with pytest.raises(PermissionError):
            (tmp_path / "a").unlink()
    (tmp_path / "b").write_text("x\n", encoding="utf-8")
    assert (tmp_path / "b").read_bytes() == b"x\r\n"
    with pytest.raises(FileExistsError):
        (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(OSError, match="syntax is incorrect"):
        (tmp_path / "aux.txt").write_bytes(b"")
    with pytest.raises(PermissionError):
        os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(ImportError):
        import fcntl  # noqa: F401


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_that_a_program_has_open_is_named_and_nothing_stays(windows, tmp_path: Path, overwrite: bool) -> None:
    target = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(3)}, target)
    with safe_open(target, "pt") as held:  # as a loaded model holds its file
        kept = held.get_tensor("x")
        with pytest.raises(ErasureError, match="while a program has it open" if overwrite else "already exists"):
            write_tensors(target, {"x": torch.zeros(3)}, {}, overwrite)
        assert torch.equal(kept, torch.ones(3))
    del kept, held
    assert os.listdir(tmp_path) == ["a.safetensors"]
    assert torch.equal(SafetensorsFile.open(target).read("x"), torch.ones(3))


def test_a_folder_with_an_open_file_stays_whole(windows, tmp_path: Path) -> None:
    target = tmp_path / "pipe"
    target.mkdir()
    (target / "model_index.json").write_bytes(b"old")
    held = (target / "model_index.json").open("rb")
    with held, pytest.raises(ErasureError, match="pipe cannot be written while a program"), atomic_folder(target, True) as inside:
        (inside / "model_index.json").write_bytes(b"new")
    assert (target / "model_index.json").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_scanner_that_looks_for_a_moment_is_waited_for(windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tensors(tmp_path / "a", {"x": torch.ones(3)}, {})
    scanner = (tmp_path / "a").open("rb")
    monkeypatch.setattr(places.time, "sleep", lambda _: scanner.close())
    write_tensors(tmp_path / "a", {"x": torch.zeros(3)}, {}, overwrite=True)
    assert torch.equal(SafetensorsFile.open(tmp_path / "a").read("x"), torch.zeros(3))


def test_elsewhere_nobody_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "replace", refused)
    monkeypatch.setattr(places.time, "sleep", lambda _: pytest.fail("waited"))
    with pytest.raises(PermissionError):
        places.replace(tmp_path / "a", tmp_path / "b")


def test_a_writer_that_fails_leaves_its_own_error_and_no_file(windows, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="half"), atomic_path(tmp_path / "a") as partial:  # noqa: PT012
        partial.write_bytes(b"x")
        raise RuntimeError("half")
    assert os.listdir(tmp_path) == []


BAD = ["CON", "nul.safetensors", "aux.v2.safetensors", "Com1", "LPT\u00b9.txt", "PRN .txt", "a:b", "c:", 'say "x"', "what?",
       "a*b", "a<b>", "a|b", "tab\tname", "dot.", "space ", "..."]  # fmt: skip
GOOD = ["a", "console.safetensors", "null", "aux-erased.safetensors", "com10", "été 日本.safetensors", ".hidden", "a.b.c",
        "x" * 200]  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("write", [by_handle, by_path, folder, tensors])
def test_names_that_are_none_on_windows_are_refused_in_a_sentence(windows, tmp_path: Path, name: str, write) -> None:
    for target in (tmp_path / name, tmp_path / name / "x.safetensors"):
        with pytest.raises(ErasureError, match="choose another name") as refused:
            write(target)
        assert "\n" not in str(refused.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", GOOD)
def test_other_names_are_taken(windows, tmp_path: Path, name: str) -> None:
    by_handle(tmp_path / name)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["CON", "a:b", "dot.", "what?"])
def test_elsewhere_such_names_stay_allowed(tmp_path: Path, name: str) -> None:
    check_target(tmp_path / name)


@pytest.mark.parametrize("name", ["con.safetensors", "AUX.safetensors", "a:b.safetensors", "x.safetensors.", "a|b.safetensors"])
def test_uploads_get_no_such_name_anywhere(name: str) -> None:
    from realera_nodes.studio.safety import plain_name

    with pytest.raises(ErasureError, match="no name for a file"):
        plain_name(name)


def test_a_run_whose_state_is_being_read_is_waited_for(windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from realera_nodes.studio.runs import Run

    run = Run(tmp_path)
    run.set_state(state="running")
    reader = (tmp_path / "state.json").open("rb")
    monkeypatch.setattr(places.time, "sleep", lambda _: reader.close())
    run.set_state(state="done")
    assert run.state["state"] == "done"


def test_the_embedded_tokenizer_has_the_same_bytes(windows, tmp_path: Path) -> None:
    from realera_nodes.demo.bpe import write_tokenizer

    write_tokenizer(tmp_path)
    assert all(b"\r" not in p.read_bytes() for p in tmp_path.iterdir())
    assert json.loads((tmp_path / "vocab.json").read_bytes())


def test_the_embedded_model_has_the_same_bytes(windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from realera_nodes.demo import expand

    for part in ("unet_state", "vae_state", "text_state"):
        monkeypatch.setattr(expand, part, dict)
    monkeypatch.setattr(expand.layout, "unet_to_diffusers", lambda *_: {})
    target = tmp_path / "realera-demo"
    expand._whole_or_nothing(target, expand.write_pipeline, None)
    texts = [p for p in target.rglob("*") if p.suffix in (".json", ".txt")]
    assert len(texts) == 9
    assert all(b"\r" not in p.read_bytes() for p in texts)


@pytest.fixture(scope="module")
def models() -> tuple[Path, Path]:
    """A folder and a file, made by other people's libraries before any rule is played."""
    from tests.tiny import tiny_files

    return tiny_files("sd1")


def test_erased_models_are_written_under_the_rules(models, windows, tmp_path: Path) -> None:
    for source, name in zip(models, ("erased", "erased.safetensors"), strict=True):
        base = open_checkpoint(source)
        change = {n: lambda w: w + 0.1 for n in base.architecture.projections}
        write_edited(base, tmp_path / name, change, {})
        assert open_checkpoint(tmp_path / name).architecture.kind == "sd1"
        write_edited(base, tmp_path / name, change, {}, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["erased", "erased.safetensors"]


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_words_that_a_console_lacks_end_in_no_traceback(tmp_path: Path, encoding: str) -> None:
    from realera_nodes.formats.metadata import ErasureMetadata

    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    said = ErasureMetadata("test", ("日本 \u2192",), ("plain",)).to_safetensors("sd1")
    write_lora(tmp_path / "a.safetensors", {name: (torch.ones(1, 4), torch.ones(2, 1))}, said, torch.float16)
    command = [sys.executable, "-m", "realera_nodes", "inspect", str(tmp_path / "a.safetensors")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert b"plain" in done.stdout
    assert ("日本" in done.stdout.decode()) == (encoding == "utf-8")


def calls(path: Path) -> list[ast.Call]:
    return [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]


def spelled(call: ast.Call) -> str:
    return ast.unparse(call.func)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_text_files_name_their_encoding(path: Path) -> None:
    """Windows' default is a code page, in which no path and no concept with other letters can be read back."""
    missing = []
    for call in calls(path):
        name, given = spelled(call).rpartition(".")[2], {k.arg for k in call.keywords}
        if "encoding" in given or None in given:
            continue
        whole = (name == "read_text" and not call.args) or (name == "write_text" and len(call.args) < 2)
        if whole or (name in ("run", "Popen", "check_output") and given & {"text", "universal_newlines"}):
            missing.append(call.lineno)
        elif name == "open":
            method = isinstance(call.func, ast.Attribute)
            modes = [k.value for k in call.keywords if k.arg == "mode"] or call.args[0 if method else 1 :][:1]
            mode = modes[0].value if modes and isinstance(modes[0], ast.Constant) else "r" if not modes else None
            ours = method and spelled(call).split(".")[-2] in ("Image", "SafetensorsFile", "os", "sidecar", "webbrowser")
            if isinstance(mode, str) and "b" not in mode and not ours:
                missing.append(call.lineno)
    assert missing == []


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_what_windows_does_otherwise_stands_in_one_place(path: Path) -> None:
    """Moving files over others, waiting for the disk, and what only POSIX has."""
    home = path.parent.name == "formats" and path.name in ("windows.py", "draft.py")
    allowed = {"rows.py": {"os.fsync"}, "streaming.py": {"os.fsync"}, "sidecar.py": {"os.replace"}}.get(path.name, set())
    only_here = {"os.fsync", "os.replace", "os.rename", "os.link", "os.symlink", "os.fork", "os.killpg", "os.statvfs", "os.chmod",
                 "os.mkfifo", "os.getuid"}  # fmt: skip
    used = {spelled(c) for c in calls(path)} & only_here
    assert home or used <= allowed
    top = ast.parse(path.read_text(encoding="utf-8")).body
    imported = {a.name for n in top if isinstance(n, ast.Import) for a in n.names}
    assert not imported & {"fcntl", "resource", "pwd", "grp", "termios"}
    assert not any("SIGKILL" in ast.unparse(n) for n in top)
