"""Refuses uploads that are no safetensors while they arrive: gradio itself would store anything."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

SENTENCE = "Only .safetensors checkpoints can be uploaded, as other formats can run code."
#: a safetensors header is shorter than this
LONGEST_HEADER = 100_000_000
Message = dict[str, Any]


class Refused(Exception):
    """A part of an upload is not what it must be."""


class Parts:
    """Reads a multipart body as it passes by. Raises ``Refused`` at a file of another kind, by its name or first bytes."""

    def __init__(self, boundary: bytes):
        from python_multipart.multipart import MultipartParser

        self._field, self._value, self._names, self._start = b"", b"", b"", b""
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin, "on_header_field": self._header_field, "on_header_value": self._header_value,
                "on_header_end": self._header, "on_headers_finished": self._headers, "on_part_data": self._data,
                "on_part_end": self._end,
            },
        )  # fmt: skip

    def feed(self, chunk: bytes) -> None:
        self._parser.write(chunk)

    def _begin(self) -> None:
        self._names, self._start, self._checked = b"", b"", False

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._names = self._value
        self._field, self._value = b"", b""

    def _headers(self) -> None:
        from python_multipart.multipart import parse_options_header

        _, options = parse_options_header(self._names)
        if not options.get(b"filename", b"").lower().endswith(b".safetensors"):
            raise Refused

    def _data(self, data: bytes, start: int, end: int) -> None:
        if not self._checked:
            self._start += data[start : min(end, start + 16)]
            if len(self._start) >= 9:
                self._check()

    def _check(self) -> None:
        length = int.from_bytes(self._start[:8], "little")
        if len(self._start) < 9 or not 2 <= length <= LONGEST_HEADER or self._start[8:9] != b"{":
            raise Refused
        self._checked = True

    def _end(self) -> None:
        if not self._checked:
            self._check()


class UploadGuard:
    """ASGI middleware on the upload address."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app

    @classmethod
    def entry(cls) -> Any:
        """As Starlette's list of middleware takes it."""
        from starlette.middleware import Middleware

        return Middleware(cls)

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].rstrip("/").endswith("/upload"):
            await self.app(scope, receive, send)
            return
        from python_multipart.exceptions import FormParserError
        from python_multipart.multipart import parse_options_header

        headers = dict(scope["headers"])
        kind, options = parse_options_header(headers.get(b"content-type", b""))
        parts = Parts(options[b"boundary"]) if kind == b"multipart/form-data" and options.get(b"boundary") else None
        refused = answered = False

        async def checked() -> Message:
            nonlocal refused
            message = await receive()
            if message["type"] == "http.request":
                try:
                    if parts is None:
                        raise Refused
                    parts.feed(message.get("body", b""))
                except (Refused, FormParserError):
                    refused = True
                    return {"type": "http.disconnect"}  # what arrived is thrown away by who reads it
            return message

        async def answer(message: Message) -> None:
            nonlocal answered
            if refused:
                return
            answered = True
            await send(message)

        try:
            await self.app(scope, checked, answer)
        except Exception:
            if not refused:
                raise
        if refused and not answered:
            body = json.dumps({"error": SENTENCE, "detail": SENTENCE}).encode()
            await send({"type": "http.response.start", "status": 415, "headers": [(b"content-type", b"application/json")]})
            await send({"type": "http.response.body", "body": body})
