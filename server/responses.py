"""Puts each choice's `guidance` on vLLM's own responses."""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from server.calls import CALL, GuidedCall
from server.engine import GuidedEngineClient

# Stands, unescaped, only in chunks that end a choice: within JSON strings quotes have a backslash.
ENDS_A_CHOICE = '"finish_reason":"'


def install(handler: Any, method: str, engine: GuidedEngineClient) -> None:
    """Has one of vLLM's handlers sample through `engine`, and report what was done for each choice.

    Args:
        handler: `OpenAIServingCompletion` or `OpenAIServingChat`.
        method: the name of its method that serves a request.
        engine: the proxy.
    """
    original = getattr(handler, method)

    async def create(request: Any, raw_request: Any = None) -> Any:
        response = await original(request, raw_request)
        call = CALL.get()
        if call is None:
            return response
        if hasattr(response, "__aiter__"):
            return attach_to_stream(response, call)
        for choice in getattr(response, "choices", ()):  # an ErrorResponse has none
            attach_to_choice(choice, call)
        return response

    handler.engine_client = engine
    setattr(handler, method, create)


def attach_to_choice(choice: Any, call: GuidedCall) -> None:
    """Sets `guidance` on a choice of a whole response; vLLM's models carry extra fields along."""
    result = call.results.get(choice.index)
    if call.detail != "none" and result is not None:
        choice.guidance = result.dump()


async def attach_to_stream(events: AsyncGenerator[str, None], call: GuidedCall) -> AsyncGenerator[str, None]:
    """Sets `guidance` on the chunk that ends each choice; other events pass as they are."""
    try:
        async with aclosing(events):
            async for event in events:
                yield _attached(event, call) if call.detail != "none" and ENDS_A_CHOICE in event else event
    finally:
        call.release()


def _attached(event: str, call: GuidedCall) -> str:
    chunk = json.loads(event.removeprefix("data: "))
    for choice in chunk["choices"]:
        result = call.results.get(choice["index"])
        if choice.get("finish_reason") is not None and result is not None:
            choice["guidance"] = result.dump()
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"
