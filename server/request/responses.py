"""Puts each choice's `guidance`, and the id of its rollout, on vLLM's own responses."""

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from qsharp_core.errors import StoreError
from server.errors import body_of
from server.request.call import CALL, GuidedCall
from server.request.messages import Chunk, MessageBuilder

# Stands, unescaped, only in chunks that end a choice: within JSON strings quotes have a backslash.
ENDS_A_CHOICE = '"finish_reason":"'
# Fields of ours on a choice that are not stored with its response: they have columns of their own.
OURS = {"guidance", "rollout_id"}


def install(handler: Any, method: str) -> None:
    """Makes one of vLLM's handlers report what was done for each choice.

    Args:
        handler: `OpenAIServingCompletion` or `OpenAIServingChat`.
        method: the name of its method that serves a request.
    """
    original = getattr(handler, method)

    async def create(request: Any, raw_request: Any = None) -> Any:
        response = await original(request, raw_request)
        call = CALL.get()
        if call is None:
            return response
        if hasattr(response, "__aiter__"):
            return attach_to_stream(response, call)
        choices = getattr(response, "choices", ())  # an ErrorResponse has none
        if call.recording is not None and choices:
            stored = {choice.index: _stored(choice, call) for choice in choices}
            fields = response.model_dump(include={"id", "model", "created", "system_fingerprint"})
            ids = await call.recording.save(stored, call.results, fields)
            for choice in choices:
                choice.rollout_id = ids[choice.index]
        for choice in choices:
            attach_to_choice(choice, call)
        return response

    setattr(handler, method, create)


def attach_to_choice(choice: Any, call: GuidedCall) -> None:
    """Sets `guidance` on a choice of a whole response; vLLM's response models keep extra fields."""
    result = call.results.get(choice.index)
    if call.detail != "none" and result is not None:
        choice.guidance = result.dump()


def attach_to_stream(events: AsyncGenerator[str, None], call: GuidedCall) -> AsyncGenerator[str, None]:
    """Sets `guidance` on the chunk that ends each choice; other events pass unchanged.

    A choice of a request that is stored ends only when its rollout is committed, and its chunk has `rollout_id`, too.
    """
    return _attached(events, call) if call.recording is None else _recorded(events, call)


async def _attached(events: AsyncGenerator[str, None], call: GuidedCall) -> AsyncGenerator[str, None]:
    async with aclosing(events):
        async for event in events:
            yield _event(_chunk(event), call) if call.detail != "none" and ENDS_A_CHOICE in event else event


async def _recorded(events: AsyncGenerator[str, None], call: GuidedCall) -> AsyncGenerator[str, None]:
    """Holds back the chunk that ends a choice until its rollout is committed; if that fails, the stream ends."""
    recording = call.recording
    assert recording is not None
    messages = MessageBuilder() if recording.route == "chat" else None
    async with aclosing(events):
        async for event in events:
            ends = ENDS_A_CHOICE in event
            if (messages is None and not ends) or not event.startswith("data: {"):
                yield event
                continue
            chunk = _chunk(event)
            if messages is not None:
                messages.take(chunk)
            ended = [choice for choice in chunk.get("choices", ()) if choice.get("finish_reason") is not None]
            if not ended:
                yield event
                continue
            stored = {choice["index"]: messages.pop(choice["index"]) if messages else None for choice in ended}
            try:
                ids = await recording.save(stored, call.results, chunk)
            except StoreError as error:
                yield f"data: {json.dumps(body_of(error))}\n\n"
                yield "data: [DONE]\n\n"
                return
            for choice in ended:
                choice["rollout_id"] = ids[choice["index"]]
            yield _event(chunk, call)


def _stored(choice: Any, call: GuidedCall) -> Mapping[str, Any] | None:
    assert call.recording is not None
    return choice.model_dump(exclude=OURS, mode="json") if call.recording.route == "chat" else None


def _chunk(event: str) -> Chunk:
    chunk: Chunk = json.loads(event.removeprefix("data: "))
    return chunk


def _event(chunk: Chunk, call: GuidedCall) -> str:
    for choice in chunk["choices"]:
        result = call.results.get(choice["index"])
        if choice.get("finish_reason") is not None and result is not None and call.detail != "none":
            choice["guidance"] = result.dump()
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"
