"""uvicorn's HTTP protocol with limits on a request's head: its size, and how long it may take to arrive.

vLLM's own limit holds for another parser than the one that uvicorn chooses, so that a head of any size was taken in.
"""

import asyncio
from typing import Any

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.errors import HeadTooLargeError, response_of

HEAD_BYTES = 64 * 1024  # request line and headers
HEAD_SECONDS = 20.0  # from the connection, or from the first byte of a further request on it


class GuardedProtocol(HttpToolsProtocol):
    """Answers a head that is too large with 431, and closes a connection whose head does not arrive."""

    _timer: asyncio.TimerHandle | None = None
    _head = 0  # bytes of a head that is incomplete

    def connection_made(self, transport: Any) -> None:
        """Starts the clock."""
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Parses what has come, and gives up where it is too much of a head."""
        super().data_received(data)
        if self._timer is not None:
            self._head += len(data)
            if self._head > HEAD_BYTES:
                self._settle()
                self.send_400_response(f"The request's head must be at most {HEAD_BYTES} bytes.")

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the clock."""
        self._settle()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Starts the clock for a further request of this connection."""
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        """Hands the request to the app, or to the refusal if its head is too large after all."""
        self._settle()
        app = self.app
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > HEAD_BYTES:
            self.app = _refuse
        try:
            super().on_headers_complete()
        finally:
            self.app = app

    def _await_head(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _settle(self) -> None:
        self._head = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    error = HeadTooLargeError(f"the request line and headers must be at most {HEAD_BYTES} bytes")
    await response_of(error)(scope, receive, send)
