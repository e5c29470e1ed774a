"""Refuses `eta`, `guidance` and `store` on routes that do not support them.

vLLM has more routes that sample than our two, and ignores fields that it does not know. Without this, a request for
guidance that was sent to one of them would be served unguided, and nobody would notice.
"""

import json
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qsharp_core.errors import GuidanceError
from qsharp_core.wire.guidance import PREFIX
from server.api import completions, critics
from server.errors import response_of

# Routes that support the fields, and routes that sample nothing.
SUPPORTING = (*completions.PATHS, critics.PATH)
SAMPLING_NOTHING = ("/render", "/tokenize", "/detokenize")
MARKS = (b'"eta"', b'"guidance"', b'"store"', f'"{PREFIX}'.encode())
STORES_ITSELF = "/v1/responses"  # has a `store` of its own


class RefuseUnsupported:
    """ASGI middleware: searches the body of other POSTs for our fields' names, and parses it only where they occur."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one ASGI connection."""
        if not _may_sample(scope):
            return await self.app(scope, receive, send)
        messages: list[Message] = [await receive()]
        while messages[-1]["type"] == "http.request" and messages[-1].get("more_body", False):
            messages.append(await receive())
        body = b"".join(message.get("body", b"") for message in messages)
        param = _our_field(body, scope["path"])
        if param is not None:
            error = GuidanceError(f"{param} is not supported here: send it to {' or '.join(completions.PATHS)}", param)
            return await response_of(error)(scope, receive, send)
        messages.reverse()

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        return await self.app(scope, replay, send)


def _may_sample(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    if path in SUPPORTING or path.startswith(critics.PATH + "/") or path.endswith(SAMPLING_NOTHING):
        return False
    kind = dict(scope["headers"]).get(b"content-type", b"")
    return b"json" in kind


def _our_field(body: bytes, path: str) -> str | None:
    if not any(mark in body for mark in MARKS):
        return None
    try:
        fields: Any = json.loads(body)
    except ValueError:
        return None  # the route says what is wrong with it
    if not isinstance(fields, dict):
        return None
    extra = fields.get("vllm_xargs")
    if isinstance(extra, dict) and any(name.startswith(PREFIX) for name in extra):
        return "vllm_xargs"
    if fields.get("store") is True and not path.endswith(STORES_ITSELF):
        return "store"
    return next((name for name in ("eta", "guidance") if fields.get(name) is not None), None)
