"""A studio behind a proxy that has it below a path of its own, whether the proxy takes the path away or not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.studio_server import PATIENCE, ROOT, served

pytest.importorskip("gradio", reason='NO GRADIO: pip install "realera-nodes[studio]"')


def test_its_addresses_begin_with_the_path(tmp_path: Path) -> None:
    with served(tmp_path / "out", ["--root-path", "/a/studio/"]) as server:
        seen = {"Host": "inside:1", "X-Forwarded-Host": "out.example", "X-Forwarded-Proto": "https"}
        for path in ("", "a/studio/"):
            page = httpx.get(server.url + path, headers=seen, timeout=PATIENCE)
            assert page.status_code == 200
            assert '"root":"https://out.example/a/studio"' in page.text, path
            assert httpx.get(f"{server.url}{path}gradio_api/info", timeout=PATIENCE).status_code == 200
        assert '"root":"http://127.0.0.1:' in httpx.get(server.url, timeout=PATIENCE).text


@pytest.mark.parametrize("path", ["studio", "a.example/studio", "ftp://a/b", ""])
def test_what_is_no_path_is_a_sentence(path: str, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "realera_nodes",
        "studio",
        "--no-browser",
        "--root-path",
        path,
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    assert "such as /studio" in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()
