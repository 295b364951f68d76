"""Graphs over ComfyUI's HTTP API: queue, wait, fetch."""

from __future__ import annotations

import time
from typing import Any

import httpx


def queue(url: str, graph: dict) -> str:
    """Queues a graph that the server finds nothing wrong with; returns its id."""
    answer = httpx.post(f"{url}/prompt", json={"prompt": graph}, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["node_errors"] == {}
    return answer.json()["prompt_id"]


def wait(url: str, key: str, seconds: float = 180) -> dict[str, Any]:
    """The history of a queued graph, once it is there."""
    end = time.time() + seconds
    while time.time() < end:
        history = httpx.get(f"{url}/history/{key}", timeout=30).json()
        if key in history:
            return history[key]
        time.sleep(0.1)
    raise AssertionError(f"the graph did not finish in {seconds:.0f} s")


def fetch(url: str, item: dict[str, str]) -> bytes:
    """A file that a node has shown or saved."""
    answer = httpx.get(f"{url}/view", params=item, timeout=60)
    assert answer.status_code == 200
    return answer.content
