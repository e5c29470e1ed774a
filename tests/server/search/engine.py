"""An engine of a few lines whose tokens and values are scripted, for searches; the real one is in `tests/e2e`."""

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, NamedTuple

from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from qsharp_core.vllm_plugin.params import GuidanceParams
from qsharp_core.vllm_plugin.telemetry import Status
from server.request.sample import Sampler
from server.request.telemetry import TelemetryReceiver, TokenReport

PROMPT: dict[str, Any] = {"type": "token", "prompt_token_ids": [1, 2, 3]}
ETA = 0.5
REF_LOGPROB, LOGPROB, KL = -1.0, -0.75, 0.1  # so a token adds 0.125 to the value


class Drawn(NamedTuple):
    """A token, the value before it (NaN: not asked), and whether it is the last."""

    token: int
    value: float
    last: bool = False


# What is drawn after a whole history of token ids, with a seed.
Law = Callable[[Sequence[int], int | None], Drawn]


class ScriptedEngine:
    """Draws what the law says, each token taking some turns of the event loop."""

    def __init__(self, law: Law) -> None:
        self.law = law
        self.telemetry = TelemetryReceiver(lambda report: None)
        self.requests: list[tuple[list[int], SamplingParams]] = []
        self.running = 0
        self.turns: Callable[[int | None], int] = lambda seed: 1  # that a token takes
        self.fails: Callable[[int | None, int], bool] = lambda seed, position: False

    def sampler(self, guidance: GuidanceParams | None = None) -> Sampler:
        """Makes samples of it."""
        return Sampler(
            self.generate, lambda request_id: None, self.telemetry, 1.0, "r", guidance or GuidanceParams(eta=ETA)
        )

    async def end(self) -> None:
        """Checks that nothing is left running."""
        await asyncio.sleep(0)
        assert self.running == 0
        assert not self.telemetry.samples
        await self.telemetry.close()

    async def generate(
        self, prompt: Any, params: SamplingParams, request_id: str
    ) -> AsyncGenerator[RequestOutput, None]:
        history = list(prompt["prompt_token_ids"])
        self.requests.append((list(history), params))
        whole = params.output_kind == RequestOutputKind.FINAL_ONLY
        assert params.extra_args is not None
        assert params.max_tokens is not None
        made: list[int] = []
        self.running += 1
        try:
            while True:
                for _ in range(self.turns(params.seed)):
                    await asyncio.sleep(0)
                drawn = self.law(history, params.seed)
                failed = self.fails(params.seed, len(history))
                status = Status.FAILED if failed else Status.UNGUIDED if math.isnan(drawn.value) else Status.GUIDED
                pi = REF_LOGPROB if math.isnan(drawn.value) else LOGPROB
                report = TokenReport(drawn.token, status, KL, REF_LOGPROB, pi, drawn.value)
                sample = self.telemetry.samples.get(params.extra_args["qsharp_id"])
                if sample is not None:
                    sample.take(len(history), report, "not_finite" if failed else None)
                history.append(drawn.token)
                made.append(drawn.token)
                reason = "stop" if drawn.last else "length" if len(made) == params.max_tokens else None
                if reason is not None or not whole:
                    tokens = list(made) if whole else [drawn.token]
                    text = "".join(map(letter, tokens))
                    choice = CompletionOutput(0, text, tokens, None, None, finish_reason=reason)
                    yield RequestOutput(
                        request_id, None, list(prompt["prompt_token_ids"]), None, [choice], finished=reason is not None
                    )
                if reason is not None:
                    return
        finally:
            self.running -= 1


def letter(token: int) -> str:
    """A token's text."""
    return chr(ord("a") + token % 26) if token < 100 else str(token % 10)
