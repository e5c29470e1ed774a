"""`guidance` on vLLM's responses: on the chunk that ends a choice, and nowhere else."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

from vllm.entrypoints.openai.completion.protocol import (
    CompletionResponse,
    CompletionResponseChoice,
    CompletionResponseStreamChoice,
    CompletionStreamResponse,
)
from vllm.entrypoints.serve.engine.protocol import UsageInfo

from qsharp_core.wire.guidance import Detail
from qsharp_core.wire.reports import ChoiceGuidance
from server.request.call import GuidedCall
from server.request.responses import attach_to_choice, attach_to_stream


def a_call(detail: Detail = "summary") -> GuidedCall:
    call = GuidedCall(None, None, detail, False, "prompt")
    call.results = {i: ChoiceGuidance(tokens_total=10 + i) for i in range(2)}
    return call


def chunk(index: int, text: str, finish_reason: str | None) -> str:
    choice = CompletionResponseStreamChoice(index=index, text=text, finish_reason=finish_reason)
    made = CompletionStreamResponse(id="c", model="m", choices=[choice])
    return f"data: {made.model_dump_json(exclude_unset=True)}\n\n"


def streamed(events: list[str], call: GuidedCall) -> list[str]:
    async def source() -> AsyncGenerator[str, None]:
        for event in events:
            yield event

    async def run() -> list[str]:
        return [event async for event in attach_to_stream(source(), call)]

    return asyncio.run(run())


def test_only_chunks_that_end_a_choice_are_touched() -> None:
    call = a_call()
    events = [
        chunk(0, 'text with "finish_reason":"stop" in it', None),
        chunk(1, "é 漢", "stop"),
        chunk(0, "", "length"),
        'data: {"error": {"message": "m"}}\n\n',
        ": keep-alive\n\n",
        "data: [DONE]\n\n",
    ]
    got = streamed(events, call)
    assert [got[0], *got[3:]] == [events[0], *events[3:]]
    for event, index in ((got[1], 1), (got[2], 0)):
        choice: dict[str, Any] = json.loads(event.removeprefix("data: "))["choices"][0]
        assert choice.pop("guidance")["tokens_total"] == 10 + index
        assert choice == json.loads(events[2 - index].removeprefix("data: "))["choices"][0]
    assert "é 漢" in got[1]


def test_detail_none_leaves_everything_as_it_is() -> None:
    events = [chunk(0, "x", "stop")]
    assert streamed(events, a_call("none")) == events


def test_whole_responses_carry_it_in_their_dump() -> None:
    choices = [CompletionResponseChoice(index=i, text="x", finish_reason="stop") for i in range(2)]
    response = CompletionResponse(model="m", choices=choices, usage=UsageInfo())
    for choice in response.choices:
        attach_to_choice(choice, a_call())
    assert [c["guidance"]["tokens_total"] for c in response.model_dump()["choices"]] == [10, 11]
