"""The page and its few routes, and who may use them.

| route | body | answer |
|---|---|---|
| ``GET /`` | | the page: one document, nothing external |
| ``POST /join`` | ``name`` | the key of a new annotator's link |
| ``POST /state`` | | what to show now |
| ``POST /answer`` | an answer with an id | what to show next, once the answer is on the disk |
| ``POST /undo`` | ``showing`` | what to show now |

Refused before anything is read: a ``Host`` that is not this server's (DNS rebinding), an ``Origin`` that is not that
host or a missing CSRF token (other sites' pages), off loopback a missing token of the link, and bodies over `MAX_BODY`.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from benchmarks.annotate.project import Annotator, Answer, StoreError
from benchmarks.annotate.store import Store
from rlaif_env.api import DataError, RLAIFError
from rlaif_env.data.jsonl import json_object
from rlaif_env.servers.limits import is_loopback

MAX_BODY = 32_768
"""Longest body of a request in bytes: a comment of `MAX_COMMENT` characters in its longest JSON form fits."""

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_POLICY = (
    "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on a name or an address; port 0 is any that is free.

    Raises:
        RLAIFError: If the port is in use or may not be had, or the host is none of this machine's.
    """
    if not 0 <= port <= 65_535:
        raise RLAIFError(f"expected a port from 0 to 65535, found {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # asyncio sends at once only where the protocol is named; socket.create_server names none, which costs 40 ms
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(128)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        raise RLAIFError(
            f"expected to listen on port {port} of {host}, found: {error.strerror or error}; name another (--port; 0 "
            "is any that is free)"
        ) from error
    return sock


def serve(app: Starlette, sock: socket.socket) -> None:
    """Serve until Ctrl-C or a termination signal; requests that are being answered are finished first."""
    limits: Any = {"h11_max_incomplete_event_size": 16_384, "limit_concurrency": 256, "timeout_graceful_shutdown": 5}
    plain: Any = {"http": "h11", "lifespan": "off", "loop": "asyncio", "ws": "none", "proxy_headers": False}
    quiet: Any = {"access_log": False, "log_level": "warning", "server_header": False}
    uvicorn.Server(uvicorn.Config(app, **limits, **plain, **quiet)).run(sockets=[sock])


def application(store: Store, *, host: str, token: str | None = None, joining: bool = True) -> Starlette:
    """The ASGI application.

    Args:
        store: Where answers go.
        host: The address it listens on: off loopback other names than loopback's are good too.
        token: What the link must carry; None for nothing.
        joining: Whether whoever opens the page may give a name and begin.
    """
    page = files("benchmarks.annotate").joinpath("page.html").read_text(encoding="utf-8")
    settings = {"form": store.plan.form, "criterion": store.plan.criterion, "csrf": store.csrf, "joining": joining}
    settings["project"] = store.fingerprint[:16]
    shown = json.dumps(settings).replace("<", "\\u003c")  # no text in it can end the script element

    async def index(request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        body = page.replace("{{nonce}}", nonce).replace("{{settings}}", shown)
        return HTMLResponse(body, headers={"Content-Security-Policy": _POLICY.format(nonce)})

    async def join(request: Request) -> Response:
        body = await _body(request)
        if not joining:
            raise StoreError("expected an annotator's link, found none: this project is by invitation", 403)
        return JSONResponse({"key": (await run_in_threadpool(store.join, _field(body, "name", str))).key}, 201)

    actions: dict[str, Callable[[Annotator, dict[str, Any]], dict[str, Any]]] = {
        "/state": lambda who, body: store.state(who),
        "/answer": lambda who, body: store.answer(who, _answer(body)),
        "/undo": lambda who, body: store.undo(who, _field(body, "showing", int)),
    }

    async def act(request: Request) -> Response:
        body = await _body(request)
        key, action = request.headers.get("x-annotator", ""), actions[request.url.path]
        return JSONResponse(await run_in_threadpool(lambda: action(store.annotator(key), body)))

    machine = socket.gethostname().lower()
    names = _LOOPBACK if is_loopback(host) else _LOOPBACK | {host.lower(), machine, f"{machine}.local"}
    guard = Middleware(_Guard, names=names, addresses=not is_loopback(host), token=token, csrf=store.csrf)
    posts = {"/join": join, **dict.fromkeys(actions, act)}
    return Starlette(
        routes=[Route("/", index), *(Route(path, endpoint, methods=["POST"]) for path, endpoint in posts.items())],
        middleware=[guard],
        exception_handlers={RLAIFError: _refused, HTTPException: _refused},
    )


@dataclass
class _Guard:
    """Lets only requests of the page's own kind through, and puts the security headers on every answer."""

    app: ASGIApp
    names: frozenset[str]  # host names that are this server's
    addresses: bool  # whether any numeric address is too (a rebound name is never one)
    token: str | None  # what the link must carry; None for nothing
    csrf: str  # what the page's requests carry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                headers.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
            await send(message)

        if scope["type"] != "http":
            return
        problem = self._problem(scope)
        app = self.app if problem is None else JSONResponse({"error": problem}, 403)
        await app(scope, receive, secured)

    def _problem(self, scope: Scope) -> str | None:
        """Why a request is refused; None if it is not."""
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        if not self._ours(host):
            return "expected this server's own address in the request, found another: open the link that was printed"
        if self.token is not None:
            query = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
            if not _same(self.token, headers.get("x-token") or query):
                return "expected the token of the link, found none or another: open the whole link that was printed"
        if scope["method"] in ("GET", "HEAD"):
            return None
        if headers.get("origin", "").lower() not in (f"http://{host}", f"https://{host}"):
            return "expected a request of this page, found one of another origin"
        same_site = headers.get("sec-fetch-site", "same-origin") == "same-origin"
        if not same_site or not _same(self.csrf, headers.get("x-csrf", "")):
            return "expected a request of this page, found none of its marks: reload the page"
        if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return "expected a body of application/json"
        return None

    def _ours(self, host: str) -> bool:
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if name in self.names:
            return True
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return self.addresses


def _same(secret: str, given: str) -> bool:
    return hmac.compare_digest(secret.encode(), given.encode("utf-8", "surrogateescape"))


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object a request carries; no more of it is read than may be."""
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY:
            raise HTTPException(413, f"expected at most {MAX_BODY} bytes, found more")
    try:
        return json_object(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise StoreError(f"expected UTF-8, found the byte 0x{data[error.start]:02x}") from error


def _field(body: dict[str, Any], name: str, *kinds: type[Any]) -> Any:
    """A field of one of some types; whole numbers as SQLite can hold them."""
    value = body.get(name)
    if not isinstance(value, kinds) or isinstance(value, bool) or (isinstance(value, int) and abs(value) >= 1 << 63):
        raise DataError(f"expected {name} of type {' or '.join(k.__name__ for k in kinds)}, found {str(value)[:40]!r}")
    return value


def _answer(body: dict[str, Any]) -> Answer:
    texts = {name: _field(body, name, str) for name in ("id", "choice", "strength", "comment")}
    return Answer(**texts, showing=_field(body, "showing", int), seconds=float(_field(body, "seconds", int, float)))


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)
    return JSONResponse({"error": str(error)}, getattr(error, "status", 400))
