"""Choices that end where their value falls: what is passed on, and what is not."""

import asyncio
import math
from collections.abc import Sequence
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from server.request.search.stop import watched
from server.upstream import Decoded
from tests.server.search.engine import PROMPT, Drawn, ScriptedEngine, letter


def run(values: Sequence[float], below: float, *, whole: bool) -> tuple[list[RequestOutput], int, int]:
    """What is yielded, how many tokens have a report, and how many were spent."""

    def law(history: Sequence[int], seed: int | None) -> Drawn:
        made = len(history) - len(PROMPT["prompt_token_ids"])
        return Drawn(made, values[made], made == len(values) - 1)

    def decode(tokens: Sequence[int], ends_by_token: bool) -> Decoded:
        return Decoded("".join(map(letter, tokens)), len(tokens), None)

    async def main() -> tuple[list[RequestOutput], int, int]:
        engine = ScriptedEngine(law)
        params = SamplingParams(max_tokens=100, output_kind=RequestOutputKind.DELTA)
        sample = engine.sampler().sample(PROMPT, params, followed=True)
        outputs = [output async for output in watched(sample, below, decode, whole=whole)]
        await engine.end()
        return outputs, len(sample.reports), sample.spent

    return asyncio.run(main())


@given(
    st.lists(st.one_of(st.floats(-2, 2), st.just(math.nan)), min_size=1, max_size=12), st.floats(-2, 2), st.booleans()
)
def test_the_token_before_which_the_value_fell_is_the_last(values: list[float], below: float, whole: bool) -> None:
    outputs, reports, spent = run(values, below, whole=whole)
    fallen = next((i for i, value in enumerate(values) if value < below), None)
    length = len(values) if fallen is None else fallen + 1
    tokens = [token for output in outputs for token in output.outputs[0].token_ids]
    assert tokens == list(range(length))
    assert reports == length <= spent
    assert "".join(output.outputs[0].text for output in outputs) == "".join(map(letter, tokens))
    last = outputs[-1].outputs[0]
    assert (last.finish_reason, last.stop_reason) == ("stop", None if fallen is None else "value")
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert not whole or len(outputs) == 1


@pytest.mark.parametrize("whole", [True, False])
def test_engines_that_are_ahead_are_cut_back(whole: bool) -> None:
    """Outputs of several tokens, as vLLM puts together what is not fetched in time."""

    class Chunks(ScriptedEngine):
        async def generate(self, prompt, params, request_id):  # type: ignore[no-untyped-def]
            held: list[RequestOutput] = []
            async with aclosing(super().generate(prompt, params, request_id)) as outputs:
                async for output in outputs:
                    held.append(output)
                    if len(held) == 3 or output.finished:
                        for more in held[1:]:
                            held[0].add(more, aggregate=True)
                        yield held[0]
                        held = []

    values = [0.5, 0.5, 0.5, 0.5, 0.1, 0.5, 0.5]

    async def main() -> list[RequestOutput]:
        engine = Chunks(lambda history, seed: Drawn(len(history) - 3, values[len(history) - 3], len(history) == 9))
        params = SamplingParams(max_tokens=100, output_kind=RequestOutputKind.DELTA)
        sample = engine.sampler().sample(PROMPT, params, followed=True)

        def decode(tokens: Sequence[int], ends_by_token: bool) -> Decoded:
            return Decoded("".join(map(letter, tokens)), len(tokens), None)

        outputs = [output async for output in watched(sample, 0.2, decode, whole=whole)]
        await engine.end()
        return outputs

    outputs = asyncio.run(main())
    assert [token for output in outputs for token in output.outputs[0].token_ids] == [0, 1, 2, 3, 4]
    assert "".join(output.outputs[0].text for output in outputs) == "abcde"
