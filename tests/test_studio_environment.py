"""The studio's own environment in a WebUI's extension folder: real pip and venv, tiny wheels in place of a network."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from realera_nodes.studio import environment
from realera_nodes.studio.environment import Environment, InstallError, caps_for
from realera_nodes.studio.opening import FAILED, INSTALLING, Opening, told_by_pip
from realera_nodes.studio.sidecar import Sidecar
from tests.studio_server import PATIENCE, ROOT
from tests.wheels import wheel

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def install() -> ModuleType:
    return load("realera_install", ROOT / "install.py")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where pip looks, and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(environment, "THEIR_OTHERS", ())
    return folder


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty environment: to make one takes many times as long as to copy it."""
    folder = tmp_path_factory.mktemp("template") / "environment"
    environment.venv.create(folder, with_pip=True)
    return folder


@pytest.fixture
def quick(template: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def create(folder: Path, clear: bool, with_pip: bool) -> None:
        assert clear
        assert with_pip
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template, folder, symlinks=True)

    monkeypatch.setattr(environment.venv, "create", create)
    return template


def quiet(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, env=environment.own_variables())


# which host


def test_it_knows_its_host(install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert install.webui() is None
    root = tmp_path / "webui"
    (root / "modules").mkdir(parents=True)
    (root / "modules" / "script_callbacks.py").write_text("")
    (root / "webui.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'extension'}{os.pathsep}{root}")
    assert install.webui() == root


def test_for_comfyui_it_checks_and_changes_nothing(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(Environment, "make", lambda *a: pytest.fail("no environment for ComfyUI"))
    assert install.main([]) == 0
    assert "everything needed is installed" in capsys.readouterr().out
    monkeypatch.setattr(install, "NEEDED", {"no_such_module": "no-such-package"})
    assert install.main([]) == 1
    assert "lack no-such-package" in capsys.readouterr().out


def test_a_webuis_start_installs_nothing(tmp_path: Path) -> None:
    """As the hosts run it: in their folder, with theirs and the extension's in PYTHONPATH, their output held back."""
    extension = copied(tmp_path)
    for name in ("modules/script_callbacks.py", "webui.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    variables = os.environ | {"PYTHONPATH": str(tmp_path), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/nowhere"}
    done = subprocess.run(
        [sys.executable, extension / "install.py"], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert "first open the studio" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert not (extension / environment.FOLDER).exists()


def copied(folder: Path) -> Path:
    """An extension with what its installer needs."""
    extension = folder / "extensions" / "realera"
    for name in (
        "install.py",
        "realera_nodes/__init__.py",
        "realera_nodes/studio/__init__.py",
        "realera_nodes/studio/environment.py",
    ):
        (extension / name).parent.mkdir(parents=True, exist_ok=True)
        (extension / name).write_bytes((ROOT / name).read_bytes())
    return extension


# what pip is asked for


def test_the_studio_gets_what_the_package_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    own = (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n")
    wanted = {*filter(None, own), *project["headless"], *project["studio"]} - {"realera-nodes[headless]"}
    assert set(environment.STUDIO) == wanted


@pytest.mark.parametrize(
    ("torch", "old"),
    [("2.1.2", True), ("2.3.1+cu121", True), ("2.4.0", False), ("2.13.0+cpu", False), ("1.13.1", True), ("nightly", False)],
)
def test_old_torch_caps_what_no_longer_runs_on_it(torch: str, old: bool) -> None:
    assert bool(caps_for(torch)) is old


#: of gradio: the version of huggingface-hub that it asks for, as its metadata has it; those before 6.18 take 0.x
GRADIOS = [
    (f"6.{minor}.0", "huggingface-hub<3.0,>=1.2" if minor > 17 else "huggingface-hub<2.0,>=0.33.5") for minor in range(6, 32)
]


def published(index: Path) -> None:
    """What matters of PyPI's packages: who needs which huggingface-hub and numpy."""
    for version in ("0.36.2", "1.3.0", "2.4.0"):
        wheel(index, "huggingface-hub", version)
    for version in ("1.26.4", "2.2.6", "2.4.0"):
        wheel(index, "numpy", version)
    for version, needs in GRADIOS:
        wheel(index, "gradio", version, [needs, "pandas>=1,<4", "numpy>=1,<3"])
    for version, needs in (
        ("4.49.0", "huggingface-hub>=0.26,<1.0"),
        ("4.57.1", "huggingface-hub>=0.34,<1.0"),
        ("5.20.0", "huggingface-hub>=1.3"),
    ):
        wheel(index, "transformers", version, [needs, "numpy>=1.17"])
    for version, needs in (("0.32.2", "huggingface-hub>=0.23.2"), ("0.41.0", "huggingface-hub>=0.34")):
        wheel(index, "diffusers", version, [needs])
    for version, needs in (("2.3.3", "numpy>=1.22"), ("3.0.6", "numpy>=1.26"), ("3.1.1", "numpy>=2.1")):
        wheel(index, "pandas", version, [needs])
    for name, version in (("safetensors", "0.8.0"), ("pillow", "12.0"), ("platformdirs", "4.9"), ("typer", "0.29"),
                          ("rich", "15.0"), ("matplotlib", "3.10"), ("tomli", "2.5"), ("plotly", "7.0")):  # fmt: skip
        wheel(index, name, version)


def asked(made: Environment, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The first command that the environment's pip would be run with, by this Python's pip and without doing anything."""
    commands: list[list[str]] = []
    monkeypatch.setattr(environment.venv, "create", lambda folder, **k: folder.mkdir(parents=True))

    def first(command: list[str]) -> None:
        commands.append(command)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made.make(first)
    first_command = commands[0]
    assert first_command[1:4] == ["-m", "pip", "install"]
    done = subprocess.run(
        [sys.executable, *first_command[1:], "--dry-run", "--ignore-installed"], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    return [Path(line.split()[1]).name for line in done.stdout.splitlines() if line.startswith("Processing ")]


@pytest.mark.parametrize("torch", ["2.1.2", "2.3.1+cpu", "2.13.0"])
def test_pip_loads_one_version_of_each_package(torch: str, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published(index)
    made = Environment(tmp_path / environment.FOLDER, environment.STUDIO, caps_for(torch))
    loaded = asked(made, monkeypatch)
    names = [re.sub(r"-\d.*", "", name) for name in loaded]
    assert sorted(names) == sorted(set(names)), "a wheel was loaded to find out that it does not fit"
    assert "gradio" in names
    assert any(name.startswith(f"transformers-{'4.49' if caps_for(torch) else '5.20'}") for name in loaded)


def test_without_the_caps_of_what_fits_it_would_walk_through_gradio(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test above would miss if the folder of wheels were not like PyPI."""
    published(index)
    made = Environment(tmp_path / environment.FOLDER, environment.STUDIO, ("transformers<4.50", "diffusers<0.33", "numpy<2"))
    assert sum(name.startswith("gradio-") for name in asked(made, monkeypatch)) > 10


# the stamp decides


def test_its_own_packages_come_before_the_hosts(index: Path, tmp_path: Path) -> None:
    wheel(index, "thing", "1.0", files={"both.py": "place = 'own'"})
    behind = tmp_path / "host"
    behind.mkdir()
    (behind / "only_of_the_host.py").write_text("place = 'host'")
    (behind / "both.py").write_text("place = 'host'")
    made = Environment(tmp_path / environment.FOLDER, ("thing",), (), (str(behind),))
    made.make(quiet)
    code = "import only_of_the_host, both; print(only_of_the_host.place, both.place)"
    assert subprocess.run([made.python, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["host", "own"]
    assert made.finished
    made.make(lambda command: pytest.fail("once"))
    for other in (("thing", "more"), ("thing<2",)):
        assert not Environment(made.folder, other, (), made.behind).finished, "of other requirements"
    assert not Environment(made.folder, made.requirements, ("numpy<2",), made.behind).finished
    assert not Environment(made.folder, made.requirements, (), ("/elsewhere",)).finished


@pytest.mark.parametrize("when", ["before", "in the middle", "while it is made anew"])
def test_only_a_finished_installation_counts(when: str, index: Path, quick: Path, tmp_path: Path) -> None:
    wheel(index, "thing", "1.0")
    made = Environment(tmp_path / environment.FOLDER, ("thing", "peft"))
    if when == "while it is made anew":
        wheel(index, "peft", "1.0")
        made.make(quiet)
        assert made.finished
        made.forget()
    count = 0

    def stops(command: list[str]) -> None:
        nonlocal count
        count += 1
        if when == "before" or count == 2:
            raise InstallError("the connection broke")
        quiet(command)

    with pytest.raises(InstallError, match="connection broke"):
        made.make(stops)
    assert made.python.exists(), "which is why its existence says nothing"
    assert not made.finished
    wheel(index, "peft", "1.0")
    made.make(quiet)
    assert made.finished


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InstallError, match="cannot be made"):
        Environment(tmp_path / "file" / "in", ("thing",)).make(quiet)


# by the tab


def opening(tmp_path: Path, made: Environment, template: Path, allowed: bool = True) -> Opening:
    """Whose installer makes ``made`` as install.py does, in a process."""
    sidecar = Sidecar(ROOT, tmp_path / "out", [], {}, made.python)
    found = Opening(sidecar, made, allowed)
    code = (
        "import shutil, sys; from pathlib import Path;"
        f"sys.path.insert(0, {str(ROOT)!r}); import install; from realera_nodes.studio import environment as e;"
        "e.THEIR_OTHERS = (); e.venv.create = lambda folder, **k: (shutil.rmtree(folder, ignore_errors=True),"
        f" shutil.copytree({str(template)!r}, folder, symlinks=True));"
        f"made = e.Environment(Path({str(made.folder)!r}), {made.requirements!r});"
        "install.Environment = type('E', (), {'of_host': staticmethod(lambda folder: made)});"
        "sys.exit(install.main(sys.argv[1:]))"
    )
    found.installer = [sys.executable, "-c", code, "--studio", "--with-parent"]
    return found


def until(found: Opening, phase: str) -> dict:
    end = time.monotonic() + PATIENCE
    while (state := found.state())["phase"] != phase:
        assert time.monotonic() < end, state
        time.sleep(0.05)
    return state


def test_a_failed_installation_is_a_sentence_with_its_log_and_can_be_tried_again(
    index: Path, template: Path, tmp_path: Path
) -> None:  # fmt: skip
    wheel(index, "thing", "1.0", ["absent>=3"])
    made = Environment(tmp_path / environment.FOLDER, ("thing",))
    found = opening(tmp_path, made, template)
    assert found.state()["phase"] == "idle"
    assert not found.state()["installed"]
    found.begin()
    assert found.state()["phase"] == INSTALLING
    state = until(found, FAILED)
    assert state["failed"] == INSTALLING
    assert "could not be installed (No matching distribution found for absent>=3" in state["error"]
    assert "try again" in state["error"]
    assert any("absent" in line for line in state["log"])
    assert "typer" not in state["error"], "what a half-made environment lacks is not the reason"
    wheel(index, "absent", "3.1")
    found.begin()
    state = until(found, FAILED)  # it is installed now, and holds no studio
    assert state["failed"] == "starting"
    assert state["installed"]
    assert "Successfully installed absent-3.1 thing-1.0" in found.install_log.read_text()
    found.begin(anew=True)
    assert until(found, FAILED)["failed"] == "starting"
    assert "Successfully installed" in found.install_log.read_text(), "once more"


def test_with_skip_install_nothing_is_installed(tmp_path: Path) -> None:
    found = opening(tmp_path, Environment(tmp_path / environment.FOLDER, ("thing",)), tmp_path, allowed=False)
    found.begin()
    state = until(found, FAILED)
    assert "--skip-install" in state["error"]
    assert "--studio" in state["error"]
    assert not (tmp_path / environment.FOLDER).exists()


def test_what_pip_says_is_seen_as_it_says_it_and_ends_with_the_host(index: Path, template: Path, tmp_path: Path) -> None:
    """A source package whose build waits: pip has spoken by then, and must not outlive who asked for it."""
    source = index / "slow-1.0"
    source.mkdir()
    (source / "pyproject.toml").write_text('[build-system]\nrequires = []\nbuild-backend = "slow"\nbackend-path = ["."]\n')
    (source / "slow.py").write_text(
        "import os, time\nfrom pathlib import Path\n"
        f"def get_requires_for_build_wheel(s=None):\n    Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "    time.sleep(600)\n"
    )
    made = Environment(tmp_path / environment.FOLDER, (str(source),))
    found = opening(tmp_path, made, template)
    found.begin()
    end = time.monotonic() + PATIENCE
    while not any("Processing" in line for line in found.state()["log"]) or not (tmp_path / "pid").exists():
        assert time.monotonic() < end, found.state()
        time.sleep(0.1)
    assert found.state()["phase"] == INSTALLING
    assert found.state()["seconds"] >= 1
    found.close()
    state = until(found, FAILED)
    assert "could not be installed" in state["error"]
    assert not made.finished


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([], ""),
        (["Collecting numpy>=1.25"], "package 1, looking for numpy"),
        (["Collecting numpy>=1.25", "  Downloading numpy-2.2.6-cp310-cp310-manylinux_2_17_x86_64.whl (16.8 MB)"],
         "package 1, downloading numpy, 16.8 MB"),
        (["Collecting a", "Collecting typing_extensions<5 (from a)", "  Using cached typing_extensions-4.9-py3-none-any.whl"],
         "package 2, typing_extensions, downloaded before"),
        (["Collecting a", "Installing collected packages: a, b, c"], "unpacking 3 packages"),
        (["Installing collected packages: a, b, c", "Successfully installed a-1"], "almost done"),
    ],
)  # fmt: skip
def test_what_is_told_of_pip(lines: list[str], told: str) -> None:
    assert told_by_pip(lines) == told
