"""A sample: one engine request of one choice, whose tokens the workers report."""

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams

from qsharp_core.errors import CriticFailure
from qsharp_core.vllm_plugin.params import GuidanceParams
from server import metrics
from server.errors import SampleFailure
from server.request.telemetry import ReportedSample, TelemetryReceiver, TokenReport

Outputs = AsyncGenerator[RequestOutput, None]
Generate = Callable[[Any, SamplingParams, str], Outputs]  # prompt, parameters, the engine request's id


@dataclass(frozen=True)
class Sampler:
    """Makes samples for one request.

    Attributes:
        generate: of vLLM's engine client.
        abort: ends an engine request, by its id.
        telemetry: receives the workers' reports.
        timeout: seconds to wait for a report.
        request_id: engine requests are named after it.
        guidance: of all samples; None if they are only observed.
    """

    generate: Generate
    abort: Callable[[str], None]
    telemetry: TelemetryReceiver
    timeout: float
    request_id: str
    guidance: GuidanceParams | None

    def sample(
        self,
        prompt: Mapping[str, Any],
        params: SamplingParams,
        *,
        followed: bool = False,
        kl_total: float | None = None,
    ) -> "Sample":
        """A sample that begins when its outputs are asked for.

        Args:
            prompt: of token ids.
            params: of one choice, which is a new one for each output or a whole one.
            followed: whether the reports of each output are waited for, and not only those of the whole sample.
            kl_total: nats that it may spend, in place of what `guidance` says.
        """
        guidance = self.guidance or GuidanceParams()
        return Sample(
            self, prompt, params, guidance if kl_total is None else replace(guidance, kl_total=kl_total), followed
        )


class Sample:
    """One sample; `Sampler.sample` makes it.

    Attributes:
        tokens: what was sampled so far.
        reports: of these tokens, in order: of all when the sample has ended, and if it is followed after each output.
    """

    def __init__(
        self,
        sampler: Sampler,
        prompt: Mapping[str, Any],
        params: SamplingParams,
        guidance: GuidanceParams,
        followed: bool,
    ) -> None:
        self.tokens: list[int] = []
        self.reports: list[TokenReport] = []
        self._sampler = sampler
        self._prompt = prompt
        self._params = params
        self._guidance = guidance
        self._followed = followed
        self._received = 0
        self._reported: ReportedSample | None = None

    @property
    def spent(self) -> int:
        """How many tokens the engine has sampled for it, as far as that is known; more than `tokens` if it was cut."""
        return max(self._received, 0 if self._reported is None else self._reported.steps)

    async def outputs(self) -> Outputs:
        """Samples, and yields vLLM's outputs; with the last one there are the reports of all tokens.

        Raises:
            SampleFailure: the critic failed.
            GuidanceError: the request left no token that can be sampled.
        """
        sampler = self._sampler
        self._reported = reported = sampler.telemetry.register()
        # vLLM aborts by the id it is given, which clients may repeat: make it unlike any other.
        unique = f"{sampler.request_id}-{reported.id:x}"
        reported.on_failure = lambda: sampler.abort(unique)
        params = copy(self._params)
        params.extra_args = extra_args(params, self._guidance, reported.id)
        try:
            async with aclosing(sampler.generate(dict(self._prompt), params, unique)) as outputs:
                async for output in outputs:
                    (choice,) = output.outputs
                    self.tokens.extend(choice.token_ids)
                    self._received += len(choice.token_ids)
                    length = len(output.prompt_token_ids or ())
                    if choice.finish_reason == "abort":
                        reported.check()  # a failed step may be why it was aborted
                    if choice.finish_reason is not None or self._followed:
                        await self._read(reported, length)
                    else:
                        reported.check(length + len(self.tokens))
                    yield output
        except CriticFailure as failure:
            metrics.FAILURES.labels(failure.reason).inc()
            raise SampleFailure(str(failure), failure.reason) from failure
        finally:
            reported.close()

    def cut(self, length: int) -> None:
        """Drops all tokens after the first `length`, and their reports."""
        del self.tokens[length:]
        del self.reports[length:]

    async def _read(self, reported: ReportedSample, length: int) -> None:
        """Waits for the reports of the tokens that have none yet; `length` is the prompt's."""
        known = len(self.reports)
        self.reports += await reported.wait(length + known, self.tokens[known:], self._sampler.timeout)


def one_of(params: SamplingParams, index: int) -> SamplingParams:
    """The parameters of the sample `index` of several, as vLLM's own `ParentRequest` makes them."""
    child = copy(params)
    child.n = 1
    if params.seed is not None:
        child.seed = params.seed + index
    return child


def extra_args(params: SamplingParams, guidance: GuidanceParams, sample_id: int) -> dict[str, Any]:
    """The parameters' `extra_args` with the guidance of a sample."""
    return {**(params.extra_args or {}), **replace(guidance, id=sample_id).to_extra_args()}
