"""What every request passes first: the host's name, the key, the kind and the size of its body."""

from __future__ import annotations

import asyncio
import hmac
import json
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flexquant_rl.agents.server.errors import CLIENT_GONE, ApiError
from flexquant_rl.agents.server.metrics import Metrics
from flexquant_rl.agents.server.settings import Settings

_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
_MOST_DISCARDED = 64 << 20
"""Bytes of a body that is too large that are read all the same, so that its sender gets to read the answer."""
_OPEN_PATHS = ("/", "/health", "/openapi.json")


class Guard:
    """ASGI middleware in front of all routes.

    A body is read here, whole and within its limits, and handed on in one piece. On a loopback address only names of
    this machine are answered, so that no web page reaches the server by a name of its own that leads here.

    Args:
        app: The routes.
        settings: Limits and the key.
        metrics: Counts what is refused.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Checks and hands on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            is_start = message["type"] == "http.response.start"
            # A client that hung up was not refused: the queue counts its requests as disconnected.
            if is_start and message["status"] >= 400 and message["status"] != CLIENT_GONE:
                self._metrics.refused.labels(str(message["status"])).inc()
            await send(message)

        try:
            headers = {name: value for name, value in scope["headers"]}
            self._check_host(headers)
            self._check_key(scope["path"], headers)
            body = await self._body(scope["method"], headers, receive)
        except ApiError as error:
            await error.response()(scope, receive, counted)
            return
        except _GoneError:
            return
        given = False

        async def replayed() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replayed, counted)

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1")
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            name = None
        if self._settings.is_loopback and name not in (*_LOCAL_NAMES, self._settings.host):
            raise ApiError(
                421,
                f"the host {host!r} is not this machine's own; use 127.0.0.1, which a proxy must send as Host too",
                "bad_host",
            )

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        key = self._settings.api_key
        if key is None or path in _OPEN_PATHS:
            return
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() != b"bearer" or not hmac.compare_digest(given.strip(), key.get_secret_value().encode()):
            raise ApiError(401, "the API key is missing or wrong; send it as bearer token", "invalid_api_key")

    async def _body(self, method: str, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        most = self._settings.max_body_bytes
        length = headers.get(b"content-length", b"0")
        timeout_s = self._settings.body_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                body = await _read(receive, most, int(length) if length.isdigit() else 0)
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {timeout_s:g} s; send it at once", "timeout") from None
        if body is None:
            raise ApiError(413, f"the body is larger than {most} bytes; shorten the prompt", "body_too_large")
        if method == "POST":
            kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if kind != b"application/json":
                shown = kind.decode("latin-1") or "none"
                raise ApiError(415, f"the content type is {shown}; send application/json", "not_json")
            _check_json(body)
        return body


class _GoneError(Exception):
    """The client hung up before its request was whole."""


async def _read(receive: Receive, most: int, announced: int) -> bytes | None:
    """A body of at most so many bytes; None if it is larger, once enough of the rest was read and dropped."""
    parts: list[bytes] = []
    size, is_large = 0, announced > most
    if announced > _MOST_DISCARDED:
        return None
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _GoneError
        part = message.get("body", b"")
        size += len(part)
        is_large = is_large or size > most
        if is_large:
            parts.clear()
        else:
            parts.append(part)
        if not message.get("more_body", False):
            return None if is_large else b"".join(parts)
        if size > _MOST_DISCARDED:
            return None


def _check_json(body: bytes) -> None:
    """Raises ApiError unless a body is JSON; what follows reads it once more, and says less of what is wrong."""
    try:
        json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) else "not UTF-8, too deep or a number too long"
        raise ApiError(400, f"the body is not JSON ({reason}); send one object", "invalid_json") from error
