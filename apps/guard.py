"""What reaches the server: requests to its own hosts, from its own pages, for known paths, not too large."""

from __future__ import annotations

import functools
import json
import logging
import re
import socket
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import psutil
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response

from vfmlab.config.files import nesting

LOG = logging.getLogger("vfmlab.app")
UPLOAD_MB = 12  # of one file
BODY = (UPLOAD_MB + 1) * 2**20  # bytes of an upload with its frame
JSON_BODY = 2**18  # bytes of any other body
DEPTH = 12  # of nested JSON
WAITING = 16  # jobs of one client that may wait, of the queue's 64
UPLOADED = 128 * 2**20, 3600.0  # bytes that one client may upload in so many seconds
PASSWORDS = 5, 60.0  # wrong passwords that one client may send in so many seconds
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
PATHS = re.compile(
    r"/|/(login|config|theme\.css|favicon\.ico|manifest\.json|robots\.txt|logout|pwa_icon(/\d+)?)/?"
    r"|/(assets|static|svelte)/(?!.*\.\.)[\w./@+-]+"
    r"|/gradio_api/(info|app_id|user|login_check|token|startup-events|theme\.css|upload_progress)/?"
    r"|/gradio_api/(queue/(status|data|join)|cancel|reset|upload)/?|/gradio_api/heartbeat/[\w-]{1,64}"
    r"|/gradio_api/call/(v2/)?\w{1,64}(/[0-9a-f]{32}|/?)|/gradio_api/file=/.+"
)
HEADERS = {
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
}
FORM = Path(__file__).with_name("login.html").read_text()


class Refused(Exception):
    """A request that is answered with `status` and one line, and goes no further."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class Budget:
    """So much of something for each client in a span of seconds."""

    def __init__(self, most: float, seconds: float):
        self.most, self.seconds = most, seconds
        self.spent: dict[str, list[tuple[float, float]]] = {}

    def spend(self, client: str, amount: float = 1) -> bool:
        """Whether the client had `amount` left; then it is taken."""
        since = time.monotonic() - self.seconds
        self.spent = {who: recent for who, spent in self.spent.items()
                      if (recent := [one for one in spent if one[0] > since])}
        mine = self.spent.setdefault(client, [])
        if sum(spent for _, spent in mine) + amount > self.most:
            return False
        mine.append((time.monotonic(), amount))
        return True

    def give_back(self, client: str) -> None:
        if self.spent.get(client):
            self.spent[client].pop()


def hosts(host: str, names: Iterable[str] = ()) -> list[str]:
    """Names of a server on `host`: its own, the machine's where it is open to the network, and `names`."""
    own = [host]
    if host in ("0.0.0.0", "::", ""):
        addresses = [one.address for card in psutil.net_if_addrs().values() for one in card]
        own = [socket.gethostname(), *(address.partition("%")[0] for address in addresses)]
    every = (*LOOPBACK, *own, *names)
    return [f"[{name}]" if name.count(":") > 1 and name[0] != "[" else name for name in every]


class Guard:
    """ASGI middleware. What is refused gets a 4xx and one line in the log; no answer may be framed.

    Args:
        folder: the only folder whose files are served. listening: counts the open streams of answers, by
            session and by job. mcp: whether its endpoint is served. uploads, passwords: a client's shares.
    """

    def __init__(self, app: Any, folder: Path, listening: Counter[str], mcp: bool = False,
                 uploads: tuple[float, float] = UPLOADED, passwords: tuple[float, float] = PASSWORDS):
        self.app, self.folder, self.listening, self.mcp = app, folder, listening, mcp
        self.uploads, self.passwords = Budget(*uploads), Budget(*passwords)

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            lifespan = scope["type"] == "lifespan"
            return await (self.app(scope, receive, send) if lifespan else send({"type": "websocket.close"}))
        request, started = Request(scope, receive), False

        async def framed(message: dict) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                # an answer before the body's end: without "close" the server would go on taking the rest
                early = {} if scope.get("whole", request.method != "POST") else {"connection": "close"}
                extra = [(name.lower().encode(), value.encode()) for name, value in (HEADERS | early).items()]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
                if request.scope["path"].startswith("/login") and message["status"] == 200:
                    self.passwords.give_back(_client(request))
            await send(message)

        try:
            answer = self._refuse(request)
            receive = receive if answer else await self._body(request, receive)
            await self._pass(request, answer or self.app, receive, framed)
        except Refused as refused:
            await self._answer(request, refused.status, str(refused), framed, started)
        except Exception as error:  # nonsense that gradio does not catch itself
            reason = f"this cannot be answered ({type(error).__name__})"
            await self._answer(request, 400, reason, framed, started)

    async def _pass(self, request: Request, app: Any, receive: Any, send: Any) -> None:
        stream = re.fullmatch(r"/gradio_api/(?:queue/data|call/(?:v2/)?\w+/(\w+))", request.scope["path"])
        key = stream and (stream[1] or request.query_params.get("session_hash", ""))
        if key:
            self.listening[key] += 1
        try:
            await app(request.scope, receive, send)
        finally:
            if key:
                self.listening[key] -= 1
                self.listening += Counter()  # drops what is zero

    async def _answer(self, request: Request, status: int, reason: str, send: Any, started: bool) -> None:
        path = ascii(request.scope["path"])[:90]
        LOG.warning("vfmlab app: %d %s %s: %s", status, request.method, path, ascii(reason)[:200])
        if not started:
            request.scope["whole"] = False
            answer = PlainTextResponse(reason, status)
            await answer(request.scope, request.receive, send)

    def _refuse(self, request: Request) -> Response | None:
        """The form of the login where it is due, None for what may pass; :class:`Refused` for all else."""
        path, method, headers = request.scope["path"], request.method, request.headers
        origin = headers.get("origin")
        foreign = origin is not None and urlsplit(origin).netloc.lower() != headers.get("host", "").lower()
        page = method in ("GET", "HEAD") and path == "/"
        way = headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")
        followed = page and way == ("navigate", "document")
        across = headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        if foreign or (across and not followed):
            raise Refused(403, "requests come from this server's own pages only")
        inside = request.scope["app"]
        # gradio's own start asks for the second, which holds nothing
        open_to_all = path.startswith("/login") or path == "/gradio_api/startup-events"
        if inside.auth is not None and not open_to_all:
            names = (f"access-token{kind}-{inside.cookie_id}" for kind in ("", "-unsecure"))
            if not any(inside.tokens.get(request.cookies.get(name)) for name in names):
                if page:
                    return HTMLResponse(FORM, 401)
                raise Refused(401, "log in first")
        ours = self.mcp and path.startswith("/gradio_api/mcp")
        if not ours and not PATHS.fullmatch(path):
            raise Refused(404, "there is nothing here")
        if not re.fullmatch(r"(bytes=\d*-\d*)?", headers.get("range", "")):
            raise Refused(416, "one range of bytes at a time")
        if len(request.scope["query_string"]) > 16_000:
            raise Refused(414, "the address is too long")
        if page and "state" in request.query_params:
            _parse(request.query_params["state"])
        if path.startswith("/login") and method == "POST" and not self.passwords.spend(_client(request)):
            raise Refused(429, "too many wrong passwords; wait a minute")
        if path.startswith("/gradio_api/file="):
            name = unquote(path.partition("=")[2])  # links are followed before it is looked where it lies
            if "\0" in name or len(name) > 1000 or not Path(name).resolve().is_relative_to(self.folder):
                raise Refused(403, "only results and uploads are served")
        return None

    async def _body(self, request: Request, receive: Any) -> Any:
        """The `receive` for the app: uploads are counted on the way, other bodies are read and checked."""
        if request.method != "POST":
            return receive
        upload = request.scope["path"].startswith("/gradio_api/upload")
        most, client, size = BODY if upload else JSON_BODY, _client(request), 0
        reason = f"more than {UPLOAD_MB} MB; give a smaller picture" if upload else "the request is too large"
        too_large = Refused(413, reason)
        if int(request.headers.get("content-length", 0)) > most:
            raise too_large

        async def counted() -> dict:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            request.scope["whole"] = not message.get("more_body", False)
            if size > most:
                raise too_large
            if upload and not self.uploads.spend(client, len(message.get("body", b""))):
                share, minutes = self.uploads.most / 2**20, self.uploads.seconds / 60
                raise Refused(429, f"at most {share:.0f} MB of uploads in {minutes:.0f} minutes")
            return message

        if upload:
            return counted
        parts, more = [], True
        while more:
            message = await counted()
            if message["type"] == "http.disconnect":
                return receive
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
        body = b"".join(parts)
        if not request.scope["path"].startswith("/login"):
            self._check(request, body)
        waiting = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def again() -> dict:
            return next(waiting, None) or await receive()

        return again

    def _check(self, request: Request, body: bytes) -> None:
        """What gradio takes and fails on in the queue is refused here, as is one job too many of a client."""
        call, page, path = _parse(body), request.scope["app"].get_blocks(), request.scope["path"]
        if not isinstance(call, dict) or (self.mcp and path.startswith("/gradio_api/mcp")):
            return
        known = call.get("trigger_id") in (None, page._id, *page.blocks)
        if not known or not isinstance(call.get("event_data") or {}, dict) or len(call.get("data", ())) > 32:
            raise Refused(400, "trigger_id, event_data or the number of values is none of this page's")
        queues = page._queue.event_queue_per_concurrency_id.values()
        clients = [_client(event.request) for queue in queues for event in queue.queue if event.request]
        mine = clients.count(_client(request))
        if re.search("/call/|/join", path) and mine >= WAITING:
            raise Refused(429, f"{mine} of your jobs wait already; let one end first")


def _client(request: Request) -> str:
    return request.client.host if request.client else ""


def _parse(text: str | bytes) -> Any:
    """JSON that nests at most DEPTH levels; None for what is no JSON where a person may have typed it."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise Refused(400, "JSON nested too deep") from None
    except ValueError:
        return None
    if nesting(value) > DEPTH + 1:
        raise Refused(400, "JSON nested too deep")
    return value


def middleware(host: str, names: Iterable[str], **options: Any) -> list[Middleware]:
    """For a server on `host`, also addressed by `names`; options: those of :class:`Guard`."""
    trusted = Middleware(TrustedHostMiddleware, allowed_hosts=hosts(host, names), www_redirect=False)
    return [trusted, Middleware(functools.partial(Guard, **options))]
