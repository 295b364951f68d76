"""The studio under a WebUI's address: what is passed on, and how. The WebUI's server and the studio's are real, both are tiny."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("gradio", reason='NO GRADIO: pip install "realera-nodes[studio]"')
import httpx
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import PlainTextResponse, RedirectResponse, StreamingResponse
from starlette.middleware.gzip import GZipMiddleware

from realera_nodes.studio.doorway import PATH, add_doorway
from tests.studio_server import PATIENCE, free_port

HEADER = {"X-RealEra": "1"}


@contextmanager
def serving(app: FastAPI) -> Iterator[tuple[str, uvicorn.Server]]:
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + PATIENCE
    while not server.started:
        assert time.monotonic() < end
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}", server
    server.should_exit = True
    thread.join(PATIENCE)
    assert not thread.is_alive(), "the server waits for a stream that never ends"


def studio() -> FastAPI:
    """Answers with what it was asked."""
    app = FastAPI()
    app.state.go, app.state.left = threading.Event(), threading.Event()

    @app.get("/events")
    async def events() -> StreamingResponse:
        async def said():
            try:
                yield b"data: first\n\n"
                while not app.state.go.is_set():
                    await asyncio.sleep(0.02)
                yield b"data: second\n\n"
            finally:
                app.state.left.set()

        return StreamingResponse(said(), media_type="text/event-stream")

    @app.post("/upload")
    async def upload(request: Request) -> dict:
        digest, parts = hashlib.sha256(), 0
        async for part in request.stream():
            digest.update(part)
            parts += 1
        return {"sha256": digest.hexdigest(), "parts": parts, "length": request.headers.get("content-length")}

    @app.get("/away")
    async def away() -> RedirectResponse:
        return RedirectResponse("elsewhere", 302)

    @app.api_route("/{path:path}", methods=["GET", "POST", "PUT", "DELETE", "OPTIONS"])
    async def anything(path: str, request: Request) -> PlainTextResponse:
        told = [request.method, request.scope["raw_path"].decode(), request.scope["query_string"].decode()]
        told += [f"{k}: {v}" for k, v in request.headers.items()]
        reply = PlainTextResponse("\n".join([*told, (await request.body()).decode()]))
        reply.set_cookie("a", "1")
        reply.set_cookie("b", "2")
        return reply

    return app


class Host:
    """A WebUI's server with the doorway."""

    def __init__(self, inner: str):
        self.begun: list[bool] = []
        self.opening: Any = SimpleNamespace(
            ready=True, sidecar=SimpleNamespace(url=inner + "/"), state=lambda: {"phase": "ready"}, begin=self.begun.append
        )
        self.app = FastAPI()
        self.ends = False

    def add(self, **options: Any) -> Host:
        add_doorway(self.app, self.opening, ends=lambda: self.ends, **options)

        @self.app.get("/{everything:path}")
        def page(everything: str) -> str:
            return "the WebUI's own"

        self.app.add_middleware(GZipMiddleware, minimum_size=10)
        return self


@pytest.fixture
def inner() -> Iterator[tuple[str, FastAPI]]:
    app = studio()
    with serving(app) as (url, _):
        yield url, app
        app.state.go.set()


@pytest.fixture
def host(inner: tuple[str, FastAPI]) -> Iterator[tuple[httpx.Client, Host]]:
    made = Host(inner[0]).add(warning="Everybody.")
    with serving(made.app) as (url, server), httpx.Client(base_url=url, timeout=PATIENCE) as client:
        made.server = server
        yield client, made
        made.ends = True


def test_it_stands_before_the_webuis_own_pages(host: tuple[httpx.Client, Host]) -> None:
    client, _ = host
    page = client.get(f"{PATH}/")
    assert "RealEra studio" in page.text
    assert "Everybody." in page.text
    assert client.get(PATH).headers["location"] == f"{PATH[1:]}/", "relative, as nobody knows what stands before it"
    assert client.get(f"{PATH}?x=1").headers["location"] == f"{PATH[1:]}/?x=1"
    assert "the WebUI's own" in client.get("/anything").text


@pytest.mark.parametrize(
    "path", ["", "gradio_api/file=/a/b.png", "a%20b/c%25d", "%C3%A4%3F", "file=%2Fout%2Fx?y=%20z&q=a%2Bb", "//double//"]
)
def test_addresses_are_passed_on_byte_for_byte(host: tuple[httpx.Client, Host], path: str) -> None:
    client, _ = host
    told = client.get(f"{PATH}/app/{path}").text.split("\n")
    assert told[:3] == ["GET", "/" + path.partition("?")[0], path.partition("?")[2]]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_methods_bodies_and_cookies(host: tuple[httpx.Client, Host], method: str) -> None:
    client, _ = host
    reply = client.request(method, f"{PATH}/app/x", content=b"words", headers={"Cookie": "mine=3", "Connection": "keep-alive"})
    told = reply.text.split("\n")
    assert told[0] == method
    assert told[-1] == "words"
    assert "cookie: mine=3" in told
    assert reply.headers.get_list("set-cookie") == ["a=1; Path=/; SameSite=lax", "b=2; Path=/; SameSite=lax"]


def test_redirects_and_other_statuses_reach_the_browser(host: tuple[httpx.Client, Host]) -> None:
    client, _ = host
    reply = client.get(f"{PATH}/app/away")
    assert (reply.status_code, reply.headers["location"]) == (302, "elsewhere")


@pytest.mark.parametrize(
    ("headers", "seen"),
    [
        ({"Host": "192.168.7.5:7860"}, ("192.168.7.5:7860", "http")),
        ({"Host": "inside", "X-Forwarded-Host": "out.example", "X-Forwarded-Proto": "https, http"}, ("out.example", "https")),
        ({"Host": "inside", "Referer": f"https://abc.gradio.live{PATH}/app/?x=1"}, ("abc.gradio.live", "https")),
        ({"Host": "here:1", "Referer": "https://evil.example/"}, ("here:1", "http")),
        ({"Host": "here:1", "Referer": f"javascript:{PATH}"}, ("here:1", "http")),
        ({"Host": "here:1", "X-Gradio-Server": "http://evil.example"}, ("here:1", "http")),
    ],
)
def test_the_studio_is_told_what_address_the_browser_sees(host: tuple[httpx.Client, Host], headers: dict, seen: tuple) -> None:
    client, _ = host
    told = client.get(f"{PATH}/app/x", headers=headers).text.split("\n")
    assert [line for line in told if line.startswith("x-forwarded-host")] == [f"x-forwarded-host: {seen[0]}"]
    assert [line for line in told if line.startswith("x-forwarded-proto")] == [f"x-forwarded-proto: {seen[1]}"]
    assert not any("evil" in line for line in told if not line.startswith("referer"))


def test_events_come_as_they_are_said(host: tuple[httpx.Client, Host], inner: tuple[str, FastAPI]) -> None:
    client, _ = host
    with client.stream("GET", f"{PATH}/app/events", headers={"Accept-Encoding": "gzip"}) as reply:
        pieces = reply.iter_bytes()
        assert next(pieces) == b"data: first\n\n", "before the second was said"
        inner[1].state.go.set()
        assert b"".join(pieces) == b"data: second\n\n"


def test_a_browser_that_leaves_ends_the_studios_stream(host: tuple[httpx.Client, Host], inner: tuple[str, FastAPI]) -> None:
    client, _ = host
    with client.stream("GET", f"{PATH}/app/events") as reply:
        next(reply.iter_bytes())
    assert inner[1].state.left.wait(PATIENCE)


def test_a_webui_that_ends_does_not_wait_for_streams(inner: tuple[str, FastAPI]) -> None:
    """uvicorn waits for what is open: "Reload UI" would hang as long as the studio's page is open anywhere."""
    made = Host(inner[0]).add()
    with serving(made.app) as (url, server), httpx.stream("GET", f"{url}{PATH}/app/events", timeout=PATIENCE) as reply:
        pieces = reply.iter_bytes()
        next(pieces)
        server.should_exit = made.ends = True
        assert list(pieces) == []


def test_uploads_are_passed_on_as_they_arrive(host: tuple[httpx.Client, Host]) -> None:
    client, _ = host
    data = bytes(range(256)) * 40_000
    told = client.post(f"{PATH}/app/upload", content=data).json()
    assert told["sha256"] == hashlib.sha256(data).hexdigest()
    assert told["length"] == str(len(data))
    assert told["parts"] > 1, "held back until it was whole"
    pieces = client.post(f"{PATH}/app/upload", content=(data[i : i + 999_983] for i in range(0, len(data), 999_983))).json()
    assert pieces["sha256"] == told["sha256"]


def test_a_studio_that_is_not_there_is_a_sentence(host: tuple[httpx.Client, Host]) -> None:
    client, made = host
    made.opening.ready = False
    assert (client.get(f"{PATH}/app/").status_code, client.get(f"{PATH}/app/").text) == (503, "The studio is not open.")
    made.opening.ready = True
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        made.opening.sidecar.url = f"http://127.0.0.1:{s.getsockname()[1]}/"
        reply = client.get(f"{PATH}/app/")
        assert reply.status_code == 502
        assert "does not answer" in reply.text


def test_starting_needs_what_no_other_site_can_send(host: tuple[httpx.Client, Host]) -> None:
    client, made = host
    assert client.post(f"{PATH}/start").status_code == 403
    assert client.get(f"{PATH}/start", headers=HEADER).text.strip('"') == "the WebUI's own", "a link cannot start it"
    assert made.begun == []
    assert client.post(f"{PATH}/start", headers=HEADER).json() == {"phase": "ready"}
    client.post(f"{PATH}/start?anew=true", headers=HEADER)
    assert made.begun == [False, True]


EVERY = [("GET", PATH), ("GET", f"{PATH}/"), ("GET", f"{PATH}/state"), ("POST", f"{PATH}/start"), ("GET", f"{PATH}/app/"),
         ("POST", f"{PATH}/app/gradio_api/upload"), ("OPTIONS", f"{PATH}/app/x")]  # fmt: skip


def checked(user: Callable[[Request], str | None]) -> FastAPI:
    """As Gradio has its login."""
    app = FastAPI()

    @app.get("/login_check")
    def login_check(request: Request) -> None:
        if user(request) is None:
            raise HTTPException(401, "Not authenticated")

    return app


@pytest.mark.parametrize("gradio", ["with a check", "with a login and no check"])
def test_the_webuis_login_holds_for_all_of_it(inner: tuple[str, FastAPI], gradio: str) -> None:
    made = Host(inner[0])
    if gradio == "with a check":
        made.app = checked(lambda request: request.cookies.get("access-token"))
    else:
        made.app.auth = {"me": "secret"}  # type: ignore[attr-defined]
    made.add()
    with serving(made.app) as (url, _), httpx.Client(base_url=url, timeout=PATIENCE) as client:
        for method, path in EVERY:
            assert client.request(method, path, headers=HEADER).status_code == 401, path
        assert made.begun == []
        if gradio == "with a check":
            for method, path in EVERY:
                assert client.request(method, path, headers={**HEADER, "Cookie": "access-token=x"}).status_code < 400, path
