"""Words in the shell are shown as they are, and a stop or a full disk ends it in a sentence, at any time."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from realera_nodes.cli import app, common
from realera_nodes.cli.common import console, friendly
from realera_nodes.core.errors import ErasureError
from tests.tiny import SIDE, tiny_files

PACK = Path(__file__).parents[1]
ODD = [
    "[/]",
    "[bold]",
    "[[concepts]]",
    "[red]x[/red]",
    ":airplane:",
    "[link=x]",
    "\\[x]",
    "50% [off",
    "<b>$x$</b>",
    "*x* _y_ `z`",
]


@pytest.fixture(autouse=True)
def wide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def shell(*arguments: str | Path, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(PACK)}
    listen = {
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    }  # a job in the background ignores it
    return subprocess.Popen([sys.executable, "-m", "realera_nodes", *map(str, arguments)], env=environment, cwd=PACK,
                            stderr=subprocess.PIPE, text=True, **listen, **options)  # fmt: skip


@pytest.mark.parametrize("words", ODD)
def test_consoles_show_words_as_they_are(words: str, capsys: pytest.CaptureFixture) -> None:
    console.print(f"wrote {words}", soft_wrap=True)
    assert capsys.readouterr().out.rstrip("\n") == f"wrote {words}"
    with pytest.raises(common.typer.Exit), friendly():
        raise ErasureError(f'"{words}" is no folder.')
    assert capsys.readouterr().err.rstrip("\n") == f'error: "{words}" is no folder.'


@pytest.mark.parametrize("words", ODD)
def test_words_in_sentences_plans_and_folders(words: str, tmp_path: Path) -> None:
    spoken = words.replace("\\[", "[")  # an escaped bracket is a bracket
    common_ = ["erase", str(tmp_path / "none"), "--out", str(tmp_path / words)]
    result = CliRunner().invoke(app, [*common_, "-c", words, "-a", words])
    assert result.exit_code == 1
    assert f'error: "{spoken}" is both erased and the anchor' in result.output
    result = CliRunner().invoke(app, ["erase", str(tmp_path / words), "--out", str(tmp_path), "-c", "a", "-a", "b"])
    assert result.exit_code == 1
    assert str(tmp_path / words) in result.output
    result = CliRunner().invoke(app, ["erase", "demo", words, "--out", "x"])
    assert result.exit_code == 2
    assert words in result.output


def test_help_is_shown_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    for command, words in (
        ("erase", "TOML with [[concepts]]"),
        ("erase-many", "[[concepts]], retain = [...]"),
        ("erase-many", "[LIST.toml]"),
    ):
        result = CliRunner().invoke(app, [command, "--help"])
        assert result.exit_code == 0
        assert words in " ".join(re.sub("[│|]", " ", result.output).split()), result.output
        assert "\\[" not in result.output


def test_every_help_holds_its_options_words() -> None:
    import typer.main

    def walk(command, path: list[str]) -> None:
        result = CliRunner().invoke(app, [*path, "--help"])
        assert result.exit_code == 0, (path, result.output)
        shown = "".join(re.sub("[│|]", " ", result.output).split())
        for part in command.params:
            if getattr(part, "help", None) and not getattr(part, "hidden", False):
                assert "".join(part.help.replace("\\[", "[").split()) in shown, (path, part.name)
        for name, below in getattr(command, "commands", {}).items():
            walk(below, [*path, name])

    walk(typer.main.get_command(app), [])


def test_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/\xff\xfe"
    with shell("erase", tmp_path / "none", "-c", "a", "-a", "b", "--out", os.fsdecode(folder)) as process:
        told = process.communicate()[1]
    assert process.returncode == 1, told
    assert "Traceback" not in told
    with shell("inspect", os.fsdecode(folder)) as process:
        told = process.communicate()[1]
    assert process.returncode == 1, told
    assert "Traceback" not in told
    assert "error: " in told
    with shell("erase", "demo", "-c", os.fsdecode(b"air\xffplane"), "-a", "b", "--out", tmp_path) as process:
        told = process.communicate()[1]
    assert process.returncode == 1, told
    assert "no text" in told


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("arguments", [["presets"], ["--help"], ["erase", "--help"], ["inspect"]])
def test_output_that_cannot_be_written(arguments: list[str]) -> None:
    if arguments == ["inspect"]:
        arguments = ["inspect", str(tiny_files("sd1")[1])]
    with open("/dev/full", "w") as full, shell(*arguments, stdout=full) as process:
        told = process.communicate()[1]
    assert process.returncode == 1, told
    assert "Traceback" not in told
    assert "Exception ignored" not in told
    assert told.startswith("error: "), told
    assert len(told.strip().splitlines()) == 1, told
    assert "space" in told


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_errors_that_cannot_be_written_still_end_with_their_code(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(PACK)}
    command = f"{sys.executable} -m realera_nodes erase {tmp_path}/none -c a -a b --out {tmp_path} > /dev/full 2> /dev/full"
    assert subprocess.run(command, shell=True, env=environment, cwd=PACK).returncode == 1


@pytest.mark.parametrize("arguments", ["presets", "erase --help"])
def test_a_reader_that_has_seen_enough(arguments: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(PACK)}
    command = f"{sys.executable} -m realera_nodes {arguments} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], env=environment, cwd=PACK, capture_output=True, text=True)
    assert done.returncode in (0, 1), done  # 0: all was written before the reader left
    assert done.stderr == ""
    command = f"{sys.executable} -m realera_nodes {arguments} >&-"
    done = subprocess.run(["bash", "-c", command], env=environment, cwd=PACK, capture_output=True, text=True)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("after", [0.15, 0.4, 0.8, 1.3, 2.0, 3.0])
def test_ctrl_c_while_it_is_loaded(after: float, tmp_path: Path) -> None:
    """At whatever point of the imports: from the moment that our own code runs."""
    with shell("train-lora", tiny_files("sd1")[1], "-c", "airplane", "-a", "sky", "--size", SIDE, "--out", tmp_path / "out",
               "--set", "alignment.steps=100000", stdout=subprocess.DEVNULL) as process:  # fmt: skip
        started = time.monotonic()
        while not _listens(process.pid) and process.poll() is None:
            time.sleep(0.005)
        time.sleep(max(0.0, after - (time.monotonic() - started)))
        process.send_signal(signal.SIGINT)
        told = process.communicate(timeout=120)[1]
    assert process.returncode == 130, told
    assert told.strip().splitlines()[-1].startswith("cancelled: no file is half-written"), told
    assert "Traceback" not in told
    assert not [p for p in (tmp_path / "out").glob("*") if p.is_file()]


def _listens(pid: int) -> bool:
    """Whether our own code runs: Python's start-up itself cannot be told to be quiet."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return True
    return "_ctypes" in maps or "torch" in maps or "_typing" in maps or "numpy" in maps


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "too little memory"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"
            ),
            "too little memory",
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"), "too little memory"),
        (ModuleNotFoundError("No module named 'peft'", name="peft"), "peft is not installed"),
        (PermissionError(13, "Permission denied", "x"), "Permission denied"),
    ],
)
def test_what_a_user_can_mend_is_a_sentence(error: Exception, says: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(common.typer.Exit) as ended, friendly():
        raise error
    assert ended.value.exit_code == 1
    assert says in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError), friendly():
        raise ZeroDivisionError


def test_progress_and_tables_take_no_markup() -> None:
    from rich.table import Table

    table = Table("[bold]", title="[/] :cat:")
    table.add_row("[red]airplane[/red]")
    with console.capture() as captured:
        console.print(table)
    for words in ("[bold]", "[/] :cat:", "[red]airplane[/red]"):
        assert words in captured.get()
    assert isinstance(console, Console)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["mine", "demo", "-c", "a", "--top", "-5"], "top is -5: it must lie between 0"),
        (["mine", "demo", "-c", "a", "--word", "\u200b"], "--word is empty"),
        (["mine", "demo", "-c", "a", "--set", "neighbors.m=100000000"], "neighbors.m is 100000000"),
        (["demo", "--steps", "0"], "sampling_steps is 0"),
        (["demo", "--seed", "99999999999999999999"], "seed is 99999999999999999999"),
        (["demo", "--concept", "\u200b"], "the concept to erase is empty"),
        (["erase-many", "demo", "--preset", "mace-cifar10-dog", "--out", "x", "--jobs", "0"], "jobs is 0"),
        (["erase-many", "demo", "--preset", "mace-cifar10-dog", "--out", "x", "--guidance", "inf"], "guidance is inf"),
        (["erase-many", "demo", "--preset", "mace-cifar10-dog", "--out", "x", "--size", "1000000000"], "size is 1000000000"),
        (["prior", "demo", "--out", "/dev/null/x.safetensors", "--retain", "a"], "is a file"),
        (["prior", "demo", "--out", "x.safetensors", "--without", "\u200b"], "--without is empty"),
        (["prior", "demo", "--out", "x.safetensors", "--captions", "/dev/zero"], "is no file"),
        (["studio", "--size", "0"], "size is 0"),
        (["studio", "--port", "99999999"], "port is 99999999"),
        (["studio", "--prediction", "x"], 'prediction is "x"'),
        (["studio", "--device", "abacus"], "abacus"),
        (["bench", "objects", "--out", "x", "--batch", "0"], "batch is 0"),
        (["bench", "objects", "--out", "x", "--pictures", "-1"], "pictures is -1"),
        (["bench", "objects", "--out", "x", "--guidance", "nan"], "guidance is nan"),
        (["bench", "objects", "--out", "x", "--steps", "0"], "steps is 0"),
        (["bench", "objects", "--out", "x", "--seed", "99999999999999999999"], "seed is 99999999999999999999"),
        (["bench", "objects", "--out", "x", "--size", "0"], "size is 0"),
        (["bench", "objects", "--out", "x", "--others", "-3"], "others is -3"),
        (["bench", "objects", "--out", "x", "--captions", "0"], "captions is 0"),
        (["bench", "objects", "--out", "x", "--jobs", "-1"], "jobs is -1"),
    ],
    ids=lambda v: " ".join(v).encode("ascii", "replace").decode() if isinstance(v, list) else "",
)  # fmt: skip
def test_numbers_and_words_of_the_other_commands(arguments: list[str], says: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, (result.output, result.exception)
    assert says in " ".join(result.output.split())
    assert not [p for p in tmp_path.iterdir() if p.name != "cache"], "something was left"
