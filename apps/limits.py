"""What the server refuses before anything reads it: bodies that are too large, and being used to fetch other addresses."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote

UPLOAD_MB = 12
BODY = (UPLOAD_MB + 1) * 2**20  # an upload with its frame; every other request is far smaller
TOO_LARGE = f"more than {UPLOAD_MB} MB; give a smaller picture".encode()
_FETCH = re.compile(r"/(file=|file/|proxy=)\s*[a-z][a-z0-9+.-]*:", re.IGNORECASE)


class Limits:
    """ASGI middleware. A body beyond `BODY` bytes ends with 413, announced or not; a request for a file on another host with 403."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if _FETCH.search(unquote(unquote(scope["path"]))):
            return await _answer(send, 403, b"this server fetches nothing from elsewhere")
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > BODY:
            return await _answer(send, 413, TOO_LARGE)
        seen, state, whole = 0, "waiting", False

        async def counted() -> dict:
            nonlocal seen, state, whole
            message = await receive()
            seen += len(message.get("body", b""))
            whole = whole or not message.get("more_body", False)
            if seen <= BODY:
                return message
            if state == "waiting":
                state = "refused"
                await _answer(send, 413, TOO_LARGE)
            return {"type": "http.disconnect"}  # the rest of the body is not taken

        async def unless_refused(message: dict) -> None:
            nonlocal state
            if state == "refused":
                return
            state = "answering"
            if message["type"] == "http.response.start" and not whole and scope["method"] == "POST":
                # An answer before the body's end: without this the server would go on taking the rest.
                message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
            await send(message)

        try:
            return await self.app(scope, counted, unless_refused)
        except Exception:
            if state != "refused":  # else: what the app makes of a body that ends early
                raise


async def _answer(send: Any, status: int, text: bytes) -> None:
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(text)).encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text})
