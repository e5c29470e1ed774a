"""Refuses JSON with half of a surrogate pair in a string, which no encoding of Unicode has.

JSON may escape it, and clients do that to a text that they cut in the middle of a character. vLLM hands strings on to
tokenizers, grammars and other processes that cannot encode it, and answers a 500, or a 400 that does not say why.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from qsharp_core.errors import GuidanceError
from qsharp_core.rollouts.text import is_encodable
from server.api.bodies import replayed
from server.errors import response_of

# Ours take such text and store it with a mark, or say themselves what is wrong with it.
OURS = ("/v1/critics", "/v1/rollouts", "/v1/chat/completions/chatcmpl-")
# An escaped surrogate, or one in bytes; a NUL stands in UTF-16 and UTF-32.
SUSPECT = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]|\x00")


class RefuseHalfCharacters:
    """ASGI middleware, which the gate hands bodies in one piece."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one ASGI connection."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"].startswith(OURS):
            await self.app(scope, receive, send)
            return
        body, replay = await replayed(receive)
        param = half_character(body)
        if param is not None:
            error = GuidanceError(f"{param} must be text: it has half of a surrogate pair", param)
            await response_of(error)(scope, receive, send)
            return
        await self.app(scope, replay, send)


def half_character(body: bytes) -> str | None:
    """The first field of a JSON body, as a path, that has half of a surrogate pair; None if none has."""
    if not SUSPECT.search(body):
        return None
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return None  # the route says what is wrong with it
    return next((path or "body" for path, text in _strings(fields) if not is_encodable(text)), None)


def _strings(value: Any) -> Iterator[tuple[str, str]]:
    """All strings of JSON's data, names included, each under its path."""
    waiting = [("", value)]
    while waiting:
        path, node = waiting.pop(0)
        if isinstance(node, str):
            yield path, node
        elif isinstance(node, dict):
            yield from ((path, name) for name in node)
            waiting += [(f"{path}.{name}" if path else name, inner) for name, inner in node.items()]
        elif isinstance(node, list):
            waiting += [(f"{path}[{i}]", inner) for i, inner in enumerate(node)]
