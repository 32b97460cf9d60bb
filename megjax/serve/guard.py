"""What every request passes before the application sees it: who asks, from where, how much, how long."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from megjax.serve.config import ServeConfig, is_loopback
from megjax.serve.metrics import Metrics

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

ALWAYS = "/healthz"
"""The route that asks for no token."""

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}
_HEADERS = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]


def guarded(app: App, config: ServeConfig, metrics: Metrics, routes: frozenset[str]) -> App:
    """Wrap an application: token, host, media type, body size and time; security headers on every answer.

    Args:
        app: the application.
        config: see `ServeConfig`.
        metrics: counts every answer.
        routes: paths that are counted by name.
    """

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            # No route has a web socket: the application closes it.
            return await app(scope, receive, send)
        path = scope["path"]

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name for name, _ in message.get("headers", [])}
                extra = [pair for pair in _HEADERS if pair[0] not in present]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
                route = path if path in routes else "other"
                metrics.requests.labels(route, str(message["status"])).inc()
            await send(message)

        headers = dict(scope["headers"])
        if path != ALWAYS:
            if config.token is not None and not allowed(headers.get(b"authorization", b""), config.token):
                challenge = {"WWW-Authenticate": 'Basic realm="MegJAX", charset="UTF-8"'}
                return await refuse(counted, 401, "a valid token is needed", challenge)
            if config.token is None and not _local(headers.get(b"host", b"")):
                # Another site's name that was pointed at this machine, to reach past its firewall.
                return await refuse(counted, 400, "host: not a name of this machine")
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            if headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers:
                return await refuse(counted, 400, f"body: {scope['method']} has none")
            return await app(scope, receive, counted)
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if kind != b"application/json":
            # A browser sends it across origins only if the server allows it, and this one never does.
            return await refuse(counted, 415, "Content-Type: only application/json is read")
        try:
            body = await asyncio.wait_for(read(receive, headers, config.body_bytes), config.receive_s)
        except TimeoutError:
            return await refuse(counted, 408, f"body: not there within {config.receive_s:g} s")
        if body is None:
            return None
        if len(body) > config.body_bytes:
            return await refuse(counted, 413, f"body: at most {config.body_bytes} bytes are read")
        await app(scope, _replay(body, receive), counted)

    return guard


def allowed(authorization: bytes, token: str) -> bool:
    """Whether a header carries the token, as bearer or as Basic's password; takes as long for any other."""
    scheme, _, credentials = authorization.partition(b" ")
    given = credentials.strip()
    if scheme.lower() == b"basic":
        try:
            given = base64.b64decode(given, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            given = b""
    elif scheme.lower() != b"bearer":
        given = b""
    return hmac.compare_digest(given, token.encode())


async def read(receive: Receive, headers: MutableMapping[bytes, bytes], most: int) -> bytes | None:
    """A request's body, or a little more than `most` bytes of it; None if the client left."""
    declared = headers.get(b"content-length", b"0")
    if not declared.isdigit() or len(declared) > 18 or int(declared) > most:
        return b"-" * (most + 1)
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > most or not message.get("more_body", False):
            return bytes(body)


async def refuse(send: Send, status: int, error: str, headers: dict[str, str] | None = None) -> None:
    """Answer with an error as JSON, and hang up: a body that nobody reads may never end."""
    body = json.dumps({"error": error}).encode()
    pairs = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
    pairs |= headers or {}
    raw = [(name.lower().encode(), value.encode()) for name, value in pairs.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _local(host: bytes) -> bool:
    try:
        name = host.decode("ascii").lower()
    except UnicodeDecodeError:
        return False
    if name.startswith("["):
        name = name[1 : name.find("]")]
    else:
        name = name.rsplit(":", 1)[0]
    return is_loopback(name)


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def replayed() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
