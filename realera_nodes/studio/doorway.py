"""The studio under a WebUI's own address: a page that says what is going on, and the studio's page passed on behind it.

What the WebUI's server has, the studio has as well: --listen, --share, --subpath, certificates, and its login. The studio itself
listens on this machine alone. Runs on the WebUI's FastAPI and httpx, which its Gradio brings.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse

from .opening import Opening

#: where the page is, below the WebUI's own
PATH = "/realera-studio"
#: where the studio's pages are, below that
STUDIO = "/app"
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
#: of one connection, not of the message
HOP = {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding", "upgrade"}
#: an own header, which a page of another origin cannot send unasked
OURS = "x-realera"
#: seconds between looks at whether the WebUI wants to end, while a stream says nothing
PACE = 0.5
PAGE = (Path(__file__).parent / "doorway.html").read_text(encoding="utf-8")


def add_doorway(app: FastAPI, opening: Opening, warning: str = "", ends: Callable[[], bool] = lambda: False) -> None:
    """Adds the page to a WebUI's application, before its own routes and behind its login.

    Args:
        warning: a sentence that the page shows, such as that everybody in the network can open it
        ends: whether the WebUI's server wants to end: streams end then, for which it would wait for ever
    """
    client: list[httpx.AsyncClient] = []

    def page() -> Response:
        return HTMLResponse(PAGE.replace("<!--warning-->", warning), headers={"cache-control": "no-store"})

    def with_slash(request: Request) -> Response:
        return RedirectResponse(f"{PATH[1:]}/" + (f"?{request.url.query}" if request.url.query else ""))

    def state() -> Response:
        return JSONResponse(opening.state(), headers={"cache-control": "no-store"})

    def start(request: Request, anew: bool = False) -> Response:
        if OURS not in request.headers:
            raise HTTPException(403, f"The request lacks the header {OURS}.")
        opening.begin(anew)
        return JSONResponse(opening.state())

    async def passed_on(request: Request) -> Response:
        if not opening.ready:
            return HTMLResponse("The studio is not open.", 503, {"cache-control": "no-store"})
        if not client:  # here, as it belongs to the loop that this runs in
            client.append(httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None), trust_env=False))
        body = request.stream() if request.headers.get("content-length", "0") != "0" or _chunked(request) else None
        asked = client[0].build_request(
            request.method, _target(request, opening.sidecar.url), headers=_headers(request), content=body
        )
        try:
            answer = await client[0].send(asked, stream=True)
        except httpx.TransportError as error:
            return HTMLResponse(f"The studio does not answer ({type(error).__name__}).", 502)
        reply = StreamingResponse(_pieces(answer, ends), answer.status_code)
        headers = [(k.lower(), v) for k, v in answer.headers.raw if k.lower().decode() not in HOP]
        if answer.headers.get("content-type", "").startswith("text/event-stream") and "content-encoding" not in answer.headers:
            headers.append((b"content-encoding", b"identity"))  # else the WebUI's compression holds events back
        reply.raw_headers = headers
        return reply

    checks = [Depends(check) for check in _logins(app)]
    add: Any = app.router.add_api_route
    for path, endpoint, methods in (
        (f"{PATH}{STUDIO}/{{path:path}}", passed_on, METHODS),
        (f"{PATH}/start", start, ["POST"]),
        (f"{PATH}/state", state, ["GET"]),
        (f"{PATH}/", page, ["GET"]),
        (PATH, with_slash, ["GET"]),
    ):
        add(path, endpoint, methods=methods, dependencies=checks, include_in_schema=False, response_model=None)
        app.router.routes.insert(0, app.router.routes.pop())


def _logins(app: Any) -> list[Callable[..., Any]]:
    """The WebUI's own check of who asks, as its Gradio has it; one that lets nobody in where there is a login but no check."""
    found = [route.endpoint for route in app.routes if getattr(route, "path", "") == "/login_check"]
    if found:
        return found[:1]

    def nobody() -> None:
        if getattr(app, "auth", None) is not None:
            raise HTTPException(401, "This WebUI has a login that the studio does not know.")

    return [nobody]


def _chunked(request: Request) -> bool:
    return "transfer-encoding" in request.headers


def _target(request: Request, url: str) -> httpx.URL:
    """The studio's address of what was asked for, byte for byte."""
    raw = request.scope.get("raw_path") or quote(request.scope["path"]).encode()
    place = raw.split(b"?")[0].partition(f"{PATH}{STUDIO}".encode())[2]
    query = request.scope.get("query_string", b"")
    return httpx.URL(url).copy_with(raw_path=place + (b"?" + query if query else b""))


def _headers(request: Request) -> list[tuple[bytes, bytes]]:
    """The request's headers, and the address that the browser sees: a tunnel or proxy in front may not say it."""
    hidden = {*HOP, "x-forwarded-host", "x-forwarded-proto", "x-gradio-server"}
    kept = [(k, v) for k, v in request.headers.raw if k.decode("latin-1") not in hidden]
    seen = urlsplit(request.headers.get("referer", ""))
    if not (seen.netloc and seen.scheme in ("http", "https") and PATH in seen.path):
        proto = request.headers.get("x-forwarded-proto", request.url.scheme).split(",")[0].strip()
        host = request.headers.get("x-forwarded-host", request.headers.get("host", "")).split(",")[0].strip()
        seen = urlsplit(f"{proto}://{host}")
    return [*kept, (b"x-forwarded-host", seen.netloc.encode("latin-1")), (b"x-forwarded-proto", seen.scheme.encode())]


async def _pieces(answer: httpx.Response, ends: Callable[[], bool]) -> AsyncIterator[bytes]:
    """A body as it comes, until it or the WebUI ends."""
    source = answer.aiter_raw()
    coming: asyncio.Task[bytes] | None = None
    try:
        while True:
            coming = asyncio.ensure_future(source.__anext__())
            while not (await asyncio.wait({coming}, timeout=PACE))[0]:
                if ends():
                    return
            try:
                yield coming.result()
            except (StopAsyncIteration, httpx.TransportError):
                return  # a studio that ends cuts its streams
    finally:
        if coming is not None and not coming.done():
            coming.cancel()
            await asyncio.wait({coming})
        await answer.aclose()
