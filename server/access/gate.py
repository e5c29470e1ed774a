"""The gate in front of the whole app: who may use which route, and how much of a body is taken in.

It stands outside of all other middleware, and refuses what it does not know. A request is looked at in the order of
what it costs: its route, the length that it states, its key, its origin, its holder's quota, and then its body.
"""

import asyncio
import time
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import metrics
from server.access.keys import KeyRing
from server.access.principal import SCOPE_KEY, UNNAMED, Principal
from server.access.quotas import Quotas
from server.access.routes import Access, Body, find_rule
from server.errors import (
    ForbiddenError,
    HTTPError,
    NotFoundError,
    SlowRequestError,
    TooLargeError,
    TooManyRequestsError,
    UnauthorizedError,
    UnavailableError,
    response_of,
)

MIB = 2**20
IDLE_SECONDS = 20.0  # that a body may pause
LEAST_BYTES_A_SECOND = 50_000  # of a body, beyond the first pause
LOOPBACK = {"localhost", "127.0.0.1", "::1"}
HELD_KEY = "qsharp.held"
UNTIL_THE_END = ("/liveness", "/metrics", "/version")  # answered while the last requests end
REQUEST_ID = b"x-request-id"
NOBODY = Principal(UNNAMED)


@dataclass(frozen=True)
class Policy:
    """What the gate lets pass.

    Attributes:
        keys: who holds which key.
        quotas: of each holder.
        max_body: most bytes of a body that is read before its route is called.
        open: routes that need no key though others do: `metrics`, `docs`.
        origins: of web pages that may send requests to a server without user keys, besides its own; `*` for all.
        hosts: by which names a server without user keys may be called; None for any.
    """

    keys: KeyRing
    quotas: Quotas
    max_body: int
    open: Collection[str] = ()
    origins: Collection[str] = ()
    hosts: Collection[str] | None = None


class Gate:
    """ASGI app around the whole of another."""

    def __init__(self, inner: ASGIApp, app: FastAPI, policy: Policy) -> None:
        self._inner = inner
        self._app = app
        self._policy = policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one ASGI connection."""
        if scope["type"] not in ("http", "websocket"):
            await self._inner(scope, receive, send)
            return
        # vLLM would name its response after it, and with it overwrite what another client has stored.
        scope["headers"] = [(name, value) for name, value in scope["headers"] if name != REQUEST_ID]
        headers = Headers(scope=scope)
        if scope.get("method") == "OPTIONS" and "access-control-request-method" in headers:
            await self._inner(scope, receive, send)  # a browser asks whether it may send; this does nothing
            return
        # What is taken for a request until its response has ended, by routes, too (`held`).
        with ExitStack() as scope[HELD_KEY]:
            try:
                rule = find_rule(self._app.router.routes, scope)
                self._check_going(scope)
                length = self._stated_length(headers, rule.body)
                scope[SCOPE_KEY] = principal = self._admit(headers, rule.access)
                held(scope).enter_context(self._policy.quotas.request(principal.name))
                if length != 0 and rule.body is Body.WHOLE and scope["type"] == "http":
                    receive = await self._whole(receive)
            except HTTPError as error:
                await _refuse(error, scope, receive, send)
                return
            await self._inner(scope, receive, send)

    def _check_going(self, scope: Scope) -> None:
        """Takes no request any more when the server is about to end, so that what is on its way is all there is."""
        qsharp = getattr(self._app.state, "qsharp", None)
        if qsharp is not None and qsharp.critics.workers.stopping and scope["path"] not in UNTIL_THE_END:
            raise UnavailableError("the server is about to end: send this to another one")

    def _stated_length(self, headers: Headers, body: Body) -> int | None:
        """What the request says of its body's length in bytes: 0 for none, None where it says nothing."""
        stated = headers.get("content-length")
        if stated is None:
            return None if "transfer-encoding" in headers else 0
        if body is Body.WHOLE and int(stated) > self._policy.max_body:
            raise self._too_large()
        return int(stated)

    def _admit(self, headers: Headers, access: Access) -> Principal:
        keys = self._policy.keys
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and key:
            holder = keys.find(key)
        else:
            key, holder = "", None
        if access is Access.OPEN or access.name.lower() in self._policy.open:
            return holder or NOBODY
        if access is Access.CLOSED:
            raise NotFoundError("Not Found")
        if holder is None:
            if keys.guards_users:
                raise UnauthorizedError(
                    "this key is not known" if key else "this needs a key: Authorization: Bearer <key>"
                )
            self._check_page(headers)
            holder = NOBODY
        if access is Access.ADMIN and not holder.admin:
            if not keys.has_admin:
                raise ForbiddenError(
                    "only the admin may do this, and this server has none: start it with --admin-key KEY or "
                    "QSHARP_ADMIN_KEY to allow it"
                )
            if not key:
                raise UnauthorizedError("this needs the admin key: Authorization: Bearer <admin key>")
            raise ForbiddenError("this is not the admin key")
        return holder

    def _check_page(self, headers: Headers) -> None:
        """Refuses what a web page of somebody else sends by its visitor's browser: no key would stop that."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._policy.hosts is not None and _split(f"//{host}").hostname not in self._policy.hosts:
            raise ForbiddenError(
                f"a server without keys answers to {', '.join(sorted(self._policy.hosts))} only; got Host: {host[:80]}"
            )
        if origin is None or "*" in self._policy.origins or origin in self._policy.origins:
            return
        if _split(origin).netloc != host:
            raise ForbiddenError(
                f"a server without keys takes nothing from web pages of {origin[:80]}: start it with "
                "--allowed-origins, or with keys"
            )

    async def _whole(self, receive: Receive) -> Receive:
        """Reads a body to its end; what is returned gives it out in one piece, and then what comes later."""
        size, parts, began = 0, list[bytes](), time.monotonic()
        while True:
            left = IDLE_SECONDS + size / LEAST_BYTES_A_SECOND - (time.monotonic() - began)
            try:
                message = await asyncio.wait_for(receive(), min(IDLE_SECONDS, max(left, 0)))
            except TimeoutError as error:
                raise SlowRequestError("the body did not arrive in time") from error
            if message["type"] != "http.request":
                waiting: list[Message] = [message]
                break
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._policy.max_body:
                raise self._too_large()
            if not message.get("more_body", False):
                waiting = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]
                break

        async def replay() -> Message:
            return waiting.pop() if waiting else await receive()

        return replay

    def _too_large(self) -> TooLargeError:
        return TooLargeError(
            f"the body must be at most {self._policy.max_body} bytes; the server's --max-body-mib sets that"
        )


def held(scope: Scope) -> ExitStack:
    """What is given back when the response to this request has ended; routes may add to it."""
    stack: ExitStack = scope[HELD_KEY]
    return stack


def _split(url: str) -> SplitResult:
    """The parts of a URL; none of one that is malformed."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


async def _refuse(error: HTTPError, scope: Scope, receive: Receive, send: Send) -> None:
    metrics.REFUSED.labels(_reason(error)).inc()
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008, "reason": str(error)})
    else:
        await response_of(error)(scope, receive, send)


def _reason(error: HTTPError) -> str:
    if isinstance(error, TooManyRequestsError):
        return "quota"
    reasons = {
        401: "no_key", 403: "forbidden", 404: "closed", 408: "slow", 413: "too_large", 503: "ending",
    }  # fmt: skip
    return reasons.get(error.status, "other")
