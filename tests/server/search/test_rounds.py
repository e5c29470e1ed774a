"""Particles as engine requests: their rounds, prompts and budgets, and where they end."""

import asyncio
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams

from qsharp_core.errors import CriticFailure
from qsharp_core.vllm_plugin.params import GuidanceParams
from server.request.search.fields import ParticleSearch
from server.request.search.found import Found, Terms
from server.request.search.particles import particles
from server.upstream import Decoded
from tests.server.search.engine import ETA, KL, PROMPT, Drawn, ScriptedEngine, letter

START = len(PROMPT["prompt_token_ids"])


def law(history: Sequence[int], seed: int | None) -> Drawn:
    """Random tokens and values, which the whole history settles together with the seed of the round."""
    rng = random.Random(f"{seed}/{list(history)}")
    value = math.nan if rng.random() < 0.3 else rng.uniform(0, 1)
    return Drawn(rng.randrange(10, 20), value, last=rng.random() < 0.04)


def decode(stops: Sequence[str]) -> Any:
    """Text of letters, cut at the first stop string as vLLM does it."""

    def decoded(tokens: Sequence[int], ends_by_token: bool) -> Decoded:
        text = ""
        for count, token in enumerate(tokens, start=1):
            text += letter(token)
            for stop in stops:
                if text.endswith(stop):
                    return Decoded(text.removesuffix(stop), count, stop)
        return Decoded(text, len(tokens), None)

    return decoded


def run(
    engine: ScriptedEngine, wanted: int = 1, tokens: int = 30, *, seed: int | None = 0, stop: Sequence[str] = (),
    guidance: GuidanceParams | None = None, **options: Any,
) -> list[Found]:  # fmt: skip
    async def main() -> list[Found]:
        search = ParticleSearch.model_validate({"kind": "particles", **options})
        params = SamplingParams(max_tokens=tokens, seed=seed, n=wanted, stop=list(stop))
        try:
            sampler, terms = engine.sampler(guidance), Terms(ETA, (0.0, 1.0))
            return await particles(search, wanted, sampler, PROMPT, params, terms, decode(stop))
        finally:
            await engine.end()

    return asyncio.run(main())


@given(st.integers(1, 9), st.integers(1, 12), st.sampled_from([0.3, 0.9, 1.0]), st.integers(0, 2**31))
def test_every_choice_is_a_path_that_was_sampled(n: int, every: int, below: float, seed: int) -> None:
    engine = ScriptedEngine(law)
    found = run(engine, wanted=min(n, 3), seed=seed, n=n, every=every, resample_below=below)
    histories = {tuple(history) for history, _ in engine.requests}
    for one in found:
        (choice,) = one.output.outputs
        path = list(choice.token_ids)
        assert [report.token for report in one.reports] == path
        assert choice.text == "".join(map(letter, path))
        assert one.output.prompt_token_ids == PROMPT["prompt_token_ids"]
        assert choice.finish_reason == ("length" if len(path) == 30 else "stop") or len(path) == 30
        # Its rounds are engine requests that went on from what it had.
        for start in range(0, len(path), every):
            assert (*PROMPT["prompt_token_ids"], *path[:start]) in histories
        assert one.report.tokens_spent >= len(path)
    assert all((params.max_tokens or 0) <= every for _, params in engine.requests)
    assert {params.n for _, params in engine.requests} == {1}


def test_a_seed_settles_choices_and_no_two_rounds_share_one() -> None:
    def once(seed: int | None) -> tuple[list[list[int]], list[int | None]]:
        engine = ScriptedEngine(law)
        found = run(engine, wanted=4, seed=seed, n=6, every=5, resample_below=1.0)
        seeds = [params.seed for _, params in engine.requests]
        return [list(one.output.outputs[0].token_ids) for one in found], seeds

    chosen, seeds = once(7)
    assert once(7)[0] == chosen
    assert once(8)[0] != chosen
    assert len(set(seeds)) == len(seeds)
    assert set(once(None)[1]) == {None}


def test_losers_are_resampled_and_winners_go_on_apart() -> None:
    """Value 1 after an even first token, 0 after an odd one: soon all particles begin evenly, and differ later."""

    def unequal(history: Sequence[int], seed: int | None) -> Drawn:
        rng = random.Random(f"{seed}/{len(history)}")
        token = rng.randrange(10, 20)
        return Drawn(token, 0.5 if len(history) == START else 1.0 if history[START] % 2 == 0 else 0.0)

    engine = ScriptedEngine(unequal)
    found = run(engine, wanted=8, n=8, every=4, tokens=16, resample_below=0.9)
    assert found[0].report.resamplings >= 1
    paths = [tuple(one.output.outputs[0].token_ids) for one in found]
    assert all(path[0] % 2 == 0 for path in paths)
    assert len({path[0] for path in paths}) < len(set(paths))
    assert found[0].report.tokens_spent == 8 * 16


@pytest.mark.parametrize("below", [0.2, 1.0])
def test_each_path_has_one_budget(below: float) -> None:
    engine = ScriptedEngine(lambda history, seed: law(history, seed)._replace(last=False))
    budget = 12.5 * KL
    run(engine, n=5, every=4, resample_below=below, guidance=GuidanceParams(eta=ETA, kl_total=budget))
    for history, params in engine.requests:
        assert params.extra_args is not None
        spent = (len(history) - START) * KL
        assert params.extra_args["qsharp_kl_total"] == pytest.approx(max(budget - spent, 0), abs=1e-12)
    assert any((params.extra_args or {})["qsharp_kl_total"] == 0 for _, params in engine.requests)


@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_stop_strings_are_found_across_rounds(every: int) -> None:
    def alphabet(history: Sequence[int], seed: int | None) -> Drawn:
        return Drawn(len(history) - START, 0.5)

    (found,) = run(ScriptedEngine(alphabet), n=3, every=every, tokens=20, stop=["efg"])
    (choice,) = found.output.outputs
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("abcd", "stop", "efg")
    assert list(choice.token_ids) == [0, 1, 2, 3, 4, 5, 6]
    assert len(found.reports) == 7
    assert found.report.tokens_spent == 3 * every * math.ceil(7 / every)


def test_the_best_of_particles_are_different_ones_first() -> None:
    """All particles are one of two paths; copies come last, although they are as good."""

    def two(history: Sequence[int], seed: int | None) -> Drawn:
        assert seed is not None
        first = 10 + seed % 2 if len(history) == START else history[START]
        return Drawn(first, 0.9 if first == 10 else 0.8, last=len(history) == START + 3)

    found = run(ScriptedEngine(two), wanted=4, n=8, every=8, by="value")
    paths = [one.output.outputs[0].token_ids for one in found]
    assert paths == [[10] * 4, [11] * 4, [10] * 4, [10] * 4]
    found = run(ScriptedEngine(two), n=8, every=8, by="majority", vote="text")
    assert len(found) == 1


def test_a_failure_of_one_particle_ends_all() -> None:
    engine = ScriptedEngine(lambda history, seed: law(history, seed)._replace(last=False))
    failing: list[int | None] = []

    def fails(seed: int | None, position: int) -> bool:
        if position == START + 5 and not failing:
            failing.append(seed)
        return position == START + 5 and seed == failing[0]

    engine.fails = fails
    with pytest.raises(CriticFailure):
        run(engine, n=5, every=3)


def test_cancelling_ends_all_particles() -> None:
    engine = ScriptedEngine(lambda history, seed: law(history, seed)._replace(last=False))
    engine.turns = lambda seed: 50

    async def main() -> None:
        search = ParticleSearch(kind="particles", n=5, every=4)
        terms, params = Terms(ETA, (0.0, 1.0)), SamplingParams(max_tokens=30, seed=0)
        task = asyncio.create_task(particles(search, 1, engine.sampler(), PROMPT, params, terms, decode(())))
        while len(engine.requests) < 7:  # in the second round
            await asyncio.sleep(0)
        assert engine.running == 5
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await engine.end()

    asyncio.run(main())
