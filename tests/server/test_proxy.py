"""Fan-out, merging and failure, against an engine of a few lines; the real one is in `test_e2e_*`."""

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from qsharp_core.errors import CriticFailure, GuidanceError
from qsharp_core.vllm_plugin.params import GuidanceParams
from qsharp_core.vllm_plugin.telemetry import CandidateReport, Status
from qsharp_core.wire.guidance import MethodName
from server.request.call import CALL, GuidedCall
from server.request.proxy import GuidedEngineClient
from server.request.telemetry import TelemetryReceiver, TokenReport
from tests.server.test_schema import catalog_of, described

PROMPT: dict[str, Any] = {"type": "token", "prompt_token_ids": [1, 2, 3]}
TOKENS = [7, 8]


class FakeEngine:
    """Draws `TOKENS` for everybody and reports each as the worker would."""

    vllm_config = SimpleNamespace(use_v2_model_runner=False)
    model_config = SimpleNamespace(get_diff_sampling_param=lambda: {"repetition_penalty": 1.1, "top_k": 5})
    marker = "delegated"

    def __init__(self, telemetry: TelemetryReceiver) -> None:
        self.telemetry = telemetry
        self.requests: dict[str, SamplingParams] = {}
        self.ended: list[str] = []
        self.aborted: set[str] = set()
        self.fail_at: int | None = None
        self.candidates: CandidateReport | None = None  # of every step
        self.values = [0.25, 0.5]  # of guided steps; NaN where the critic is not asked
        self.gate = asyncio.Event()
        self.gate.set()

    async def abort(self, request_id: str) -> None:
        self.aborted.add(request_id)

    async def generate(
        self, prompt: Any, params: SamplingParams, request_id: str, **_: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        self.requests[request_id] = params
        final_only = params.output_kind == RequestOutputKind.FINAL_ONLY
        drawn: list[int] = []
        try:
            for i, token in enumerate(TOKENS):
                await self.gate.wait()
                await asyncio.sleep(0)
                self._report(params, i, token)
                await asyncio.sleep(0)
                if request_id in self.aborted:
                    yield _output(request_id, drawn, "abort")
                    return
                drawn.append(token)
                last = i == len(TOKENS) - 1
                if last or not final_only:
                    yield _output(request_id, drawn if final_only else [token], "length" if last else None)
        finally:
            self.ended.append(request_id)

    def _report(self, params: SamplingParams, i: int, token: int) -> None:
        sample = self.telemetry.samples.get((params.extra_args or {}).get("qsharp_id", -1))
        if sample is not None:
            failed = i == self.fail_at
            guided = "qsharp_eta" in (params.extra_args or {})
            value = self.values[i] if guided else math.nan
            status = Status.FAILED if failed else Status.UNGUIDED if math.isnan(value) else Status.GUIDED
            record = TokenReport(
                token, status, 0.0 if math.isnan(value) else 0.5, -1.0, -0.5, value, 1.0, self.candidates
            )
            sample.take(len(PROMPT["prompt_token_ids"]) + i, record, "not_finite" if failed else None)


def _output(request_id: str, tokens: list[int], finish_reason: str | None) -> RequestOutput:
    choice = CompletionOutput(0, "", list(tokens), None, None, finish_reason=finish_reason)
    return RequestOutput(
        request_id, None, list(PROMPT["prompt_token_ids"]), None, [choice], finished=finish_reason is not None
    )


def a_call(**changes: Any) -> GuidedCall:
    critic = catalog_of(described("a", "1")).critics["a@1"]
    call = GuidedCall(GuidanceParams(eta=0.5, critic="a@1"), critic, "summary", False, "prompt")
    for name, value in changes.items():
        setattr(call, name, value)
    return call


def with_engine(test: Callable[[FakeEngine, GuidedEngineClient], Awaitable[None]]) -> None:
    async def run() -> None:
        telemetry = TelemetryReceiver(lambda report: None)
        fake = FakeEngine(telemetry)
        await test(fake, GuidedEngineClient(fake, telemetry, timeout=1.0))
        assert not telemetry.samples
        await telemetry.close()

    asyncio.run(run())


def start(engine: GuidedEngineClient, call: GuidedCall | None, prompt: Any = PROMPT, **params: Any) -> Any:
    token = CALL.set(call)
    try:
        return engine.generate(prompt, SamplingParams(max_tokens=2, **params), "r")
    finally:
        CALL.reset(token)


@pytest.mark.parametrize(("penalty", "by_the_model"), [(1.1, True), (1.2, False)])
def test_a_penalty_that_the_client_has_not_sent_is_told_from_one_that_it_has(
    penalty: float, by_the_model: bool
) -> None:
    async def test(fake: FakeEngine, engine: GuidedEngineClient) -> None:
        with pytest.raises(GuidanceError) as raised:
            start(engine, a_call(), repetition_penalty=penalty)
        assert raised.value.param == "repetition_penalty"
        assert ("by the model's generation config" in str(raised.value)) is by_the_model
        assert ("send repetition_penalty: 1," in str(raised.value)) is by_the_model
        assert not fake.requests

    with_engine(test)


def test_without_a_call_requests_pass_straight_through() -> None:
    async def test(fake: FakeEngine, engine: GuidedEngineClient) -> None:
        assert engine.marker == "delegated"
        assert [o async for o in start(engine, None, n=2)]
        assert fake.requests["r"].extra_args is None
        assert fake.requests["r"].n == 2

    with_engine(test)


def test_unguided_requests_are_counted_and_left_to_vllm() -> None:
    async def test(fake: FakeEngine, engine: GuidedEngineClient) -> None:
        call = a_call(params=None, critic=None)
        assert [o async for o in start(engine, call, n=2)]
        assert fake.requests["r"].n == 2
        assert fake.requests["r"].extra_args is None
        assert call.results[0].dump() == {
            "eta": None, "critic": None, "kl": 0.0, "value": None, "tokens_guided": 0, "tokens_total": 2,
        }  # fmt: skip

    with_engine(test)


def test_every_sample_is_a_request_of_its_own() -> None:
    async def test(fake: FakeEngine, engine: GuidedEngineClient) -> None:
        call = a_call()
        outputs = [o async for o in start(engine, call, n=3, seed=5, output_kind=RequestOutputKind.FINAL_ONLY)]
        assert [[c.index for c in o.outputs] for o in outputs] == [[0, 1, 2]]
        assert outputs[0].finished
        sent = list(fake.requests.values())
        assert [p.seed for p in sent] == [5, 6, 7]
        assert [p.n for p in sent] == [1, 1, 1]
        assert len({(p.extra_args or {})["qsharp_id"] for p in sent}) == 3
        assert all((p.extra_args or {})["qsharp_critic"] == "a@1" for p in sent)
        assert {i: r.tokens_guided for i, r in call.results.items()} == {0: 2, 1: 2, 2: 2}
        assert call.results[0].kl == 1.0
        assert call.results[0].value == 0.25

    with_engine(test)


@pytest.mark.parametrize(
    ("values", "first"), [([0.25, 0.5], 0.25), ([math.nan, 0.5], 0.5), ([math.nan, math.nan], None)]
)
def test_a_choices_value_is_that_of_the_first_step_that_asked(values: list[float], first: float | None) -> None:
    async def test(fake: FakeEngine, engine: GuidedEngineClient) -> None:
        fake.values = values
        call = a_call(detail="tokens")
        assert [o async for o in start(engine, call)]
        assert call.results[0].value == first
        shown = [None if math.isnan(value) else value for value in values]
        assert [token.value for token in call.results[0].tokens or []] == shown

    with_engine(test)


@pytest.mark.parametrize(
    ("method", "values", "wanted"),
    [("qsharp", [0.25, 0.625], [0.125]), ("qsharp", [0.25, math.nan], []), ("cd", [0.25, 0.625], [])],
)
def test_residuals_of_a_choice_are_counted_once(method: MethodName, values: list[float], wanted: list[float]) -> None:
    name, labels = "qsharp_bellman_residual", {"name": "a", "version": "1"}

    async def test(fake: FakeEngine, engine: GuidedEngineClient) -> None:
        fake.values = values
        before = [REGISTRY.get_sample_value(f"{name}_{part}", labels) or 0.0 for part in ("sum", "count")]
        call = a_call(params=GuidanceParams(eta=0.5, critic="a@1", method=method))
        assert [o async for o in start(engine, call, n=2)]
        after = [REGISTRY.get_sample_value(f"{name}_{part}", labels) or 0.0 for part in ("sum", "count")]
        # 0.625 - 0.25 - 0.5 * (-0.5 + 1), of each of two choices
        assert [b - a for a, b in zip(before, after, strict=True)] == [2 * sum(wanted), 2 * len(wanted)]

    with_engine(test)


def test_a_second_prompts_choices_follow_the_firsts() -> None:
    async def test(fake: FakeEngine, engine: GuidedEngineClient) -> None:
        call = a_call()
        for outputs in [start(engine, call, n=2), start(engine, call, n=2)]:
            assert [o async for o in outputs]
        assert sorted(call.results) == [0, 1, 2, 3]

    with_engine(test)


def test_streams_pass_on_deltas_with_their_index() -> None:
    async def test(fake: FakeEngine, engine: GuidedEngineClient) -> None:
        outputs = [o async for o in start(engine, a_call(), n=2, output_kind=RequestOutputKind.DELTA)]
        tokens: dict[int, list[int]] = {0: [], 1: []}
        for output in outputs:
            (choice,) = output.outputs
            tokens[choice.index].extend(choice.token_ids)
        assert tokens == {0: TOKENS, 1: TOKENS}
        assert [o.finished for o in outputs].count(True) == 1
        assert outputs[-1].finished

    with_engine(test)


def test_observed_tokens_of_an_unguided_request() -> None:
    async def test(fake: FakeEngine, engine: GuidedEngineClient) -> None:
        call = a_call(params=None, critic=None, detail="tokens")
        assert [o async for o in start(engine, call)]
        (sent,) = fake.requests.values()
        assert set(sent.extra_args or {}) == {"qsharp_id"}
        assert [t.token_id for t in call.results[0].tokens or []] == TOKENS
        assert call.results[0].value is None
        assert call.results[0].tokens_guided == 0

    with_engine(test)


def test_candidates_are_reported_of_guided_tokens() -> None:
    async def test(fake: FakeEngine, engine: GuidedEngineClient) -> None:
        fake.candidates = CandidateReport([7, 5], [-0.5, -2.0], [[0.25], [-1.0]])
        call = a_call(params=GuidanceParams(eta=0.5, critic="a@1", report_candidates=True), detail="candidates")
        assert [o async for o in start(engine, call)]
        (sent,) = fake.requests.values()
        assert (sent.extra_args or {})["qsharp_report_candidates"] is True
        dumped = call.results[0].dump()
        assert dumped["distribution"] == {"kind": "bernoulli", "atoms": [0.0, 1.0], "reward_range": (0.0, 1.0)}
        first, second = dumped["tokens"]
        assert first["candidates"]["token_ids"] == second["candidates"]["token_ids"] == [7, 5]
        assert first["candidates"]["outputs"] == [[0.25], [-1.0]]
        assert first["candidates"]["tail_mass"] == pytest.approx(1 - math.exp(-0.5) - math.exp(-2.0))
        assert first["text"] == ""  # this engine has no tokenizer

    with_engine(test)


def test_candidates_of_an_unguided_request_are_none() -> None:
    async def test(fake: FakeEngine, engine: GuidedEngineClient) -> None:
        call = a_call(params=None, critic=None, detail="candidates")
        assert [o async for o in start(engine, call)]
        dumped = call.results[0].dump()
        assert [token["candidates"] for token in dumped["tokens"]] == [None, None]
        assert "distribution" not in dumped

    with_engine(test)


def test_a_limit_that_nobody_asked_for_is_cut_to_what_is_reported() -> None:
    async def test(fake: FakeEngine, engine: GuidedEngineClient) -> None:
        params = GuidanceParams(eta=0.5, critic="a@1", candidates=200, report_candidates=True)
        call = a_call(params=params, detail="candidates", samples=1000)
        assert [o async for o in start(engine, call)]
        (sent,) = fake.requests.values()
        assert sent.max_tokens == 1
        with pytest.raises(GuidanceError, match="at most 1 with") as raised:
            start(engine, a_call(params=params, detail="candidates", samples=1000, limit_given=True))
        assert raised.value.param == "max_tokens"

    with_engine(test)


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY])
@pytest.mark.parametrize("fail_at", [0, 1])
def test_a_failing_critic_ends_all_samples(kind: RequestOutputKind, fail_at: int) -> None:
    async def test(fake: FakeEngine, engine: GuidedEngineClient) -> None:
        fake.fail_at = fail_at
        with pytest.raises(CriticFailure):
            assert [o async for o in start(engine, a_call(), n=2, output_kind=kind)]
        await asyncio.sleep(0.01)
        assert len(fake.ended) == 2
        assert fake.aborted

    with_engine(test)


def test_cancelling_ends_all_samples() -> None:
    async def test(fake: FakeEngine, engine: GuidedEngineClient) -> None:
        fake.gate.clear()

        async def consume() -> None:
            assert [o async for o in start(engine, a_call(), n=3)]

        task = asyncio.create_task(consume())
        await asyncio.sleep(0.01)
        assert len(fake.requests) == 3
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.01)
        assert len(fake.ended) == 3

    with_engine(test)


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [
        ({"type": "embeds", "prompt_embeds": None}, {}, "prompt_embeds"),
        ({"type": "multimodal", "prompt_token_ids": [1]}, {}, "prompt"),
        ({"type": "token", "prompt_token_ids": [1] * 65}, {}, "prompt"),
        ({"type": "token", "prompt_token_ids": [1] * 64}, {}, "max_tokens"),
        (PROMPT, {"presence_penalty": 0.5}, "presence_penalty"),
    ],
)
def test_what_cannot_be_guided_is_refused_before_anything_starts(
    prompt: dict[str, Any], params: dict[str, Any], param: str
) -> None:
    async def test(fake: FakeEngine, engine: GuidedEngineClient) -> None:
        with pytest.raises(GuidanceError) as raised:
            start(engine, a_call(limit_given=True), prompt, **params)
        assert raised.value.param == param
        assert not fake.requests

    with_engine(test)


def test_a_limit_that_nobody_asked_for_is_cut_to_the_critics() -> None:
    async def test(fake: FakeEngine, engine: GuidedEngineClient) -> None:
        call = a_call(detail="none")
        assert [o async for o in start(engine, call, {**PROMPT, "prompt_token_ids": [1] * 64})]
        (sent,) = fake.requests.values()
        assert sent.max_tokens == 1  # the last token is drawn from what 64 tokens say, and not scored itself

    with_engine(test)
