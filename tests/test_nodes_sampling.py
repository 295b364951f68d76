"""ComfyUI's nodes on models that carry sampling patches: the network is asked at its own timesteps, or it is said."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import host_packages, require_comfyui
from tests.nodes_sampling import OTHERS, SCHEDULES

pytestmark = pytest.mark.comfyui

#: patches that leave the schedule below them, or whose own the network knows
FIT = ("eps", "v_prediction", "x0", "lcm", "eps zsnr", "other discrete", "every fifth")
UNFIT = (*(name for name in SCHEDULES if name not in FIT), "blind fifth")
STRANGERS = ("picture prompt", "attention", "unet wrapper", "cfg function", "wrapper")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    root, python = require_comfyui()
    folder: Path = tmp_path_factory.mktemp("sampling")
    script, out = Path(__file__).with_name("nodes_sampling.py"), folder / "answers.json"
    environment = os.environ | host_packages(folder) | {"XDG_CACHE_HOME": str(folder)}
    command = [str(python), str(script), str(root), str(out)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, encoding="utf-8", timeout=1800)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text(encoding="utf-8"))


def test_all_are_tried(found) -> None:
    assert set(found) == {"nothing", "nothing again", *FIT, *UNFIT, *OTHERS, *STRANGERS}


@pytest.mark.parametrize("name", ["nothing", *FIT, *OTHERS, *STRANGERS, "nothing again"])
def test_the_network_is_asked_at_its_own_timesteps(found, name: str) -> None:
    answers = found[name]
    assert "refused" not in answers
    assert answers["told"] <= 0.5, "latents of one timestep are shown as another's"
    assert answers["loud"] < 0.02, "what the network sees is not of the variance that it was trained on"
    assert (answers["train"], answers["pictures"]) == ("nothing", "nothing")
    assert answers["kept"], "the patch is gone from the edited model"


@pytest.mark.parametrize("name", ["lcm", "every fifth"])
def test_a_patch_that_picks_steps_changes_no_number(found, name: str) -> None:
    for key in ("noise", "alphas", "timesteps"):
        assert found[name][key] == pytest.approx(found["nothing"][key], rel=1e-5)


def test_what_another_prediction_or_schedule_means_is_kept(found) -> None:
    assert found["eps zsnr"]["alphas"][0] < 0.9 * found["nothing"]["alphas"][0]
    assert found["v_prediction"]["noise"] != pytest.approx(found["nothing"]["noise"], rel=1e-2)


@pytest.mark.parametrize("name", UNFIT)
def test_a_schedule_that_the_network_does_not_know_is_named(found, name: str) -> None:
    answers = found[name]
    assert answers["kept"], "a closed form needs no schedule"
    assert answers["refused"] == answers["train"] == answers["pictures"]
    assert "sampling patch (" in answers["refused"]
    assert "remove it before the erasure, or put it behind it" in answers["refused"]
    named = {"img_to_img": "IMG_TO_IMG", "continuous v": "ContinuousV", "cascade": "StableCascade", "lcm zsnr": "LCM",
             "sd3": "DiscreteFlow", "edm eps": "ContinuousEDM"}.get(name, "")  # fmt: skip
    assert named in answers["refused"]
    assert "damaged" not in answers["refused"]


def test_patches_leave_no_trace(found) -> None:
    for key in ("noise", "alphas", "timesteps"):
        assert found["nothing again"][key] == found["nothing"][key]
