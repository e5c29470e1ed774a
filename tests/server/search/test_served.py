"""Searches behind the engine proxy: what handlers of vLLM are given, what is noted of choices, what is refused."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY
from pydantic import TypeAdapter
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from qsharp_core.errors import GuidanceError
from qsharp_core.vllm_plugin.params import GuidanceParams
from server.request.call import CALL, GuidedCall
from server.request.proxy import GuidedEngineClient
from server.request.search.fields import Search
from tests.server.search.engine import ETA, PROMPT, Drawn, ScriptedEngine
from tests.server.test_schema import catalog_of, described

KINDS = [
    {"kind": "stop", "below": 0.45},
    {"kind": "best_of", "n": 5},
    {"kind": "best_of", "n": 5, "reject": {"every": 2, "keep": 0.5}},
    {"kind": "particles", "n": 5, "every": 3, "resample_below": 1.0},
]
OUTPUTS = [RequestOutputKind.FINAL_ONLY, RequestOutputKind.DELTA]


class ServedEngine(ScriptedEngine):
    """The same as the proxy needs it."""

    vllm_config = SimpleNamespace(use_v2_model_runner=False)
    model_config = SimpleNamespace(get_diff_sampling_param=lambda: {"top_k": 5})
    tokenizer = None

    async def abort(self, request_id: str) -> None: ...


def law(history: Sequence[int], seed: int | None) -> Drawn:
    rng = random.Random(f"{seed}/{list(history)}")
    return Drawn(rng.randrange(10, 20), rng.uniform(0.4, 1))


def a_call(search: Any, **changes: Any) -> GuidedCall:
    critic = catalog_of(described("a", "1")).critics["a@1"]
    wanted: Any = TypeAdapter(Search).validate_python(search)
    call = GuidedCall(GuidanceParams(eta=ETA, critic="a@1"), critic, "tokens", False, "prompt", search=wanted)
    for name, value in changes.items():
        setattr(call, name, value)
    return call


def served(test: Callable[[GuidedEngineClient], Awaitable[None]]) -> None:
    async def run() -> None:
        engine = ServedEngine(law)
        await test(GuidedEngineClient(engine, engine.telemetry, timeout=1.0))
        await engine.end()

    asyncio.run(run())


def start(engine: GuidedEngineClient, call: GuidedCall, **params: Any) -> Any:
    token = CALL.set(call)
    try:
        return engine.generate(PROMPT, SamplingParams(max_tokens=9, seed=3, **params), "r")
    finally:
        CALL.reset(token)


@pytest.mark.parametrize("search", KINDS)
@pytest.mark.parametrize("kind", OUTPUTS)
def test_handlers_get_the_choices_that_they_expect(search: Any, kind: RequestOutputKind) -> None:
    async def test(engine: GuidedEngineClient) -> None:
        call = a_call(search)
        outputs: list[RequestOutput] = [output async for output in start(engine, call, n=3, output_kind=kind)]
        tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
        reasons = {}
        for output in outputs:
            for choice in output.outputs:
                tokens[choice.index].extend(choice.token_ids)
                if choice.finish_reason is not None:
                    reasons[choice.index] = choice.finish_reason
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        assert kind == RequestOutputKind.DELTA or len(outputs) == 1
        assert reasons.keys() == tokens.keys() == call.results.keys()
        for index, result in call.results.items():
            assert [token.token_id for token in result.tokens or []] == tokens[index]
            assert result.tokens_total == len(tokens[index]) > 0
            assert result.search is not None
            assert result.search.kind == search["kind"]
            assert result.search.tokens_spent >= result.tokens_total

    served(test)


@pytest.mark.parametrize("search", KINDS)
def test_a_second_prompts_choices_follow_the_firsts(search: Any) -> None:
    async def test(engine: GuidedEngineClient) -> None:
        call = a_call(search)
        for outputs in [start(engine, call, n=2), start(engine, call, n=2)]:
            assert [output async for output in outputs]
        assert sorted(call.results) == [0, 1, 2, 3]

    served(test)


@pytest.mark.parametrize("search", KINDS)
def test_choices_count_once_and_searches_with_all_their_tokens(search: Any) -> None:
    names = {
        "tokens": ("qsharp_search_tokens_total", {"kind": search["kind"]}),
        "choices": ("qsharp_completion_kl_nats_count", {}),
        "guided": ("qsharp_guided_tokens_total", {}),
        "rejected": ("qsharp_search_rejections_total", {}),
        "resampled": ("qsharp_search_resamplings_total", {}),
    }

    def now() -> dict[str, float]:
        return {name: REGISTRY.get_sample_value(metric, labels) or 0.0 for name, (metric, labels) in names.items()}

    async def test(engine: GuidedEngineClient) -> None:
        before, call = now(), a_call(search)
        assert [output async for output in start(engine, call, n=2)]
        grown = {name: value - before[name] for name, value in now().items()}
        reports = [result.search for result in call.results.values() if result.search]
        spent = sum(report.tokens_spent for report in reports) if search["kind"] == "stop" else reports[0].tokens_spent
        assert grown == {
            "tokens": spent, "choices": 2, "guided": sum(result.tokens_guided for result in call.results.values()),
            "rejected": reports[0].rejected, "resampled": reports[0].resamplings,
        }  # fmt: skip

    served(test)


@pytest.mark.parametrize("search", KINDS[1:])
@pytest.mark.parametrize(
    ("params", "param"),
    [({"n": 6}, "guidance.search.n"), ({"temperature": 0.0}, "temperature"), ({"top_k": 5}, "top_k")],
)
def test_what_cannot_be_combined_is_refused_before_anything_starts(
    search: Any, params: dict[str, Any], param: str
) -> None:
    async def test(engine: GuidedEngineClient) -> None:
        if param == "top_k" and search["kind"] != "particles":
            assert [output async for output in start(engine, a_call(search), **params)]
            return
        with pytest.raises(GuidanceError) as raised:
            start(engine, a_call(search), **params)
        assert raised.value.param == param
        if param == "top_k":  # which the client has not sent
            assert "by the model's generation config" in str(raised.value)

    served(test)


@pytest.mark.parametrize("search", KINDS)
@pytest.mark.parametrize("kind", OUTPUTS)
def test_whoever_does_not_wait_ends_everything(search: Any, kind: RequestOutputKind) -> None:
    async def run() -> None:
        engine = ServedEngine(law)
        engine.turns = lambda seed: 200
        client = GuidedEngineClient(engine, engine.telemetry, timeout=1.0)

        async def consume() -> None:
            assert [output async for output in start(client, a_call(search), n=2, output_kind=kind)]

        task = asyncio.create_task(consume())
        while engine.running < 2:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)
        await engine.end()

    asyncio.run(run())
