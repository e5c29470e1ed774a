"""Refuses `eta`, `guidance` and `store` on routes that do not support them.

vLLM has more routes that sample than our two, and ignores fields that it does not know. Without this, a request for
guidance that was sent to one of them would be served unguided, and nobody would notice.
"""

import json
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from qsharp_core.errors import GuidanceError
from qsharp_core.wire.guidance import PREFIX
from server.api import completions
from server.errors import response_of

# Routes that sample, and know nothing of our fields.
UNAWARE = (
    "/v1/chat/completions/batch",
    "/v1/responses",
    "/v1/messages",
    "/v1/systemone",
    "/generative_scoring",
    "/inference/v1/generate",
)
STORES_ITSELF = "/v1/responses"  # has a `store` of its own


class RefuseUnsupported:
    """ASGI middleware: parses the body of POSTs to these routes as they do, and searches it for our fields."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one ASGI connection."""
        if scope["type"] != "http" or scope["method"] != "POST" or _path(scope) not in UNAWARE:
            await self.app(scope, receive, send)
            return
        message = await receive()  # the gate has read the body to its end
        param = _our_field(message.get("body", b""), _path(scope))
        if param is not None:
            error = GuidanceError(f"{param} is not supported here: send it to {' or '.join(completions.PATHS)}", param)
            await response_of(error)(scope, receive, send)
            return
        waiting = [message]

        async def replay() -> Any:
            return waiting.pop() if waiting else await receive()

        await self.app(scope, replay, send)


def _path(scope: Scope) -> str:
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path.rstrip("/")


def _our_field(body: bytes, path: str) -> str | None:
    try:
        fields: Any = json.loads(body)
    except (ValueError, RecursionError):
        return None  # the route says what is wrong with it
    if not isinstance(fields, dict):
        return None
    for holder in (fields, fields.get("sampling_params")):
        for name in ("vllm_xargs", "extra_args"):
            extra = holder.get(name) if isinstance(holder, dict) else None
            if isinstance(extra, dict) and any(key.startswith(PREFIX) for key in extra):
                return name
    if fields.get("store") is True and path != STORES_ITSELF:
        return "store"
    return next((name for name in ("eta", "guidance") if fields.get(name) is not None), None)
