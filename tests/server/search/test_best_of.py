"""The best of several samples: which are returned, which are ended on the way, and what is counted."""

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams

from qsharp_core.errors import CriticFailure
from server.request.search.best_of import best_of
from server.request.search.fields import BestOfSearch
from server.request.search.found import Found, Terms
from tests.server.search.engine import ETA, PROMPT, Drawn, ScriptedEngine

TERMS = Terms(ETA, (0.0, 1.0))
GAIN = 0.125  # of a token over the value before it


def engine_of(values: Sequence[float], lengths: Sequence[int] | None = None) -> ScriptedEngine:
    """Sample `i` has this value all along, and this many tokens."""

    def law(history: Sequence[int], seed: int | None) -> Drawn:
        assert seed is not None
        made = len(history) - len(PROMPT["prompt_token_ids"]) + 1
        return Drawn(seed % 26, values[seed], lengths is not None and made == lengths[seed])

    return ScriptedEngine(law)


def run(engine: ScriptedEngine, wanted: int = 1, tokens: int = 12, **options: Any) -> list[Found]:
    async def main() -> list[Found]:
        search = BestOfSearch.model_validate({"kind": "best_of", **options})
        params = SamplingParams(max_tokens=tokens, seed=0, n=wanted)
        try:
            return await best_of(search, wanted, engine.sampler(), PROMPT, params, TERMS)
        finally:
            await engine.end()

    return asyncio.run(main())


def test_the_best_by_value_in_order() -> None:
    found = run(engine_of([0.2, 0.9, 0.5, 0.7]), wanted=2, n=4)
    assert [one.report.sample for one in found] == [1, 3]
    assert [one.report.estimate for one in found] == pytest.approx([0.9 + GAIN, 0.7 + GAIN])
    for one in found:
        assert one.report.tokens_spent == 48
        assert one.report.rejected == 0
        assert [report.token for report in one.reports] == list(one.output.outputs[0].token_ids)


def test_seeds_count_up() -> None:
    engine = engine_of([0.1] * 5)
    run(engine, n=5)
    assert sorted(params.seed or 0 for _, params in engine.requests) == [0, 1, 2, 3, 4]
    assert {params.n for _, params in engine.requests} == {1}


def test_the_least_promising_are_ended_on_the_way() -> None:
    engine = engine_of([0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6])
    (found,) = run(engine, n=8, tokens=40, reject={"every": 4, "keep": 0.5})
    assert found.report.sample == 1
    assert found.report.rejected == 7
    assert len(found.output.outputs[0].token_ids) == 40
    # 8 samples of about 4 tokens, 4 of about 4 more, 2 of about 4 more, and the rest of one.
    assert 40 + 4 * 7 + 4 * 3 + 4 <= found.report.tokens_spent <= 40 + 4 * 7 + 4 * 3 + 4 + 7 * 3


@given(
    st.lists(st.integers(0, 1000).map(lambda x: x / 1000), min_size=1, max_size=9, unique=True),
    st.integers(1, 6),
    st.floats(0.05, 0.95),
    st.integers(1, 4),
    st.integers(0, 2**32),
)
def test_who_is_rejected_does_not_depend_on_who_is_fast(
    values: list[float], every: int, keep: float, wanted: int, seed: int
) -> None:
    wanted = min(wanted, len(values))
    lengths = [1 + (seed >> (3 * i)) % 12 for i in range(len(values))]
    asked: dict[str, Any] = {"n": len(values), "reject": {"every": every, "keep": keep}}
    chosen = []
    for turns in (lambda seed: 1, lambda seed: 1 + 5 * (seed % 3), lambda seed: 1 + 7 * (-seed % 4)):
        engine = engine_of(values, lengths)
        engine.turns = turns
        found = run(engine, wanted, 12, **asked)
        assert len(found) == wanted
        chosen.append(([one.report.sample for one in found], found[0].report.rejected))
        assert all(len(one.reports) == lengths[one.report.sample or 0] for one in found)
    assert chosen[0] == chosen[1] == chosen[2]
    # Values never change here, so that the best are never rejected.
    best = sorted(range(len(values)), key=lambda i: -values[i])[:wanted]
    assert chosen[0][0] == best


def test_majority_goes_by_what_texts_say() -> None:
    # A sample's text is its letter, as many times as it has tokens: votes of whole texts.
    def law(history: Sequence[int], seed: int | None) -> Drawn:
        assert seed is not None
        return Drawn([0, 1, 1, 2][seed], [0.9, 0.1, 0.2, 0.3][seed])

    found = run(ScriptedEngine(law), wanted=3, n=4, by="majority", vote="text", tokens=2)
    assert [one.report.sample for one in found] == [2, 1, 0]  # both of the majority, the better one first
    found = run(ScriptedEngine(law), wanted=3, n=4, by="weighted", vote="text", tokens=2)
    assert [one.report.sample for one in found] == [0, 2, 1]  # 1 against 0.225 + 0.325 and 0.425


def test_samples_of_which_the_critic_says_nothing() -> None:
    (found,) = run(engine_of([math.nan, math.nan, math.nan]), n=3)
    assert found.report.sample == 0
    assert found.report.estimate is None
    (found,) = run(engine_of([0.1, math.nan, 0.2]), n=3)
    assert found.report.sample == 2


@pytest.mark.parametrize("reject", [None, {"every": 3, "keep": 0.5}])
def test_a_failure_of_one_sample_ends_all(reject: Any) -> None:
    engine = engine_of([0.1, 0.2, 0.3, 0.4])
    engine.fails = lambda seed, position: seed == 2 and position == 4
    with pytest.raises(CriticFailure):
        run(engine, n=4, reject=reject)


@pytest.mark.parametrize("reject", [None, {"every": 3, "keep": 0.5}])
def test_cancelling_ends_all_samples(reject: Any) -> None:
    engine = engine_of([0.1, 0.2, 0.3, 0.4])
    engine.turns = lambda seed: 1000

    async def main() -> None:
        search = BestOfSearch.model_validate({"kind": "best_of", "n": 4, "reject": reject})
        params = SamplingParams(max_tokens=12, seed=0)
        task = asyncio.create_task(best_of(search, 1, engine.sampler(), PROMPT, params, TERMS))
        while engine.running < 4:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await engine.end()

    asyncio.run(main())
