"""The engine as vLLM's handlers for completions and chat see it: each choice is guided and reported on its own.

A guided request with `n > 1` becomes `n` engine requests, because vLLM's own children share one `extra_args`, and each
choice needs an id for its reports.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from copy import copy
from functools import partial
from typing import Any

from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.utils.async_utils import merge_async_iterators

from qsharp_core.errors import GuidanceError
from qsharp_core.vllm_plugin.params import GuidanceParams
from qsharp_core.vllm_plugin.processors import processor_class
from qsharp_core.vllm_plugin.telemetry import Status
from qsharp_core.wire.guidance import PREFIX
from qsharp_core.wire.reports import ChoiceGuidance, SearchReport
from server import metrics
from server.request.call import CALL, UNGUIDED, GuidedCall
from server.request.candidates import TokenTexts, limit_tokens
from server.request.masks import check_masks
from server.request.sample import Generate, Outputs, Sampler, extra_args, one_of
from server.request.search.best_of import best_of
from server.request.search.checks import check as check_search
from server.request.search.fields import BestOfSearch, ParticleSearch, StopSearch
from server.request.search.found import Decode, Terms, estimate
from server.request.search.particles import particles
from server.request.search.stop import watched
from server.request.summary import choice_guidance, residuals, with_candidates
from server.request.telemetry import TelemetryReceiver, TokenReport
from server.upstream import Decoded, decoded


class GuidedEngineClient:
    """Passes everything on to vLLM's `EngineClient`, and does `generate` in our way.

    Args:
        engine_client: vLLM's client.
        telemetry: receives the workers' reports.
        timeout: seconds to wait at the end of a choice for its last reports.
        guides_all: whether a request that came by an unknown way is refused, because the server guides by default.
    """

    def __init__(
        self, engine_client: Any, telemetry: TelemetryReceiver, timeout: float, guides_all: bool = False
    ) -> None:
        self._engine = engine_client
        self._telemetry = telemetry
        self._timeout = timeout
        self._guides_all = guides_all
        self.told_to_stop = False
        self._processor: Any = processor_class(engine_client.vllm_config)
        self._aborts: set[asyncio.Task[None]] = set()
        self._texts = TokenTexts(getattr(engine_client, "tokenizer", None))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def shutdown(self, *args: Any, **kwargs: Any) -> None:
        """As `EngineClient.shutdown`; vLLM's server calls it when it is told to end, and not when the engine died."""
        self.told_to_stop = True
        self._engine.shutdown(*args, **kwargs)

    def stand_before(self, handlers: Iterable[Any]) -> None:
        """Puts itself in the engine client's place in all handlers that have it, whatever else they do."""
        for handler in handlers:
            if getattr(handler, "engine_client", None) is self._engine:
                handler.engine_client = self

    def generate(self, prompt: Any, sampling_params: SamplingParams, request_id: str, **kwargs: Any) -> Outputs:
        """As `EngineClient.generate`, guided as the request in `CALL` asks for.

        This is a plain function and no coroutine: handlers call it within their request, where `CALL` is set, and
        iterate over the result elsewhere.

        Raises:
            GuidanceError: guidance cannot be combined with something else in the request, or the request leaves no
                token to sample.
        """
        call = CALL.get()
        generate: Generate = partial(self._engine.generate, **kwargs)
        sampling_params = without_ours(sampling_params)
        check_masks(self._engine, sampling_params)
        if call is None:
            if self._guides_all and not UNGUIDED.get():
                raise GuidanceError(
                    "this server guides by default (--default-eta), and this route cannot be guided: send the request "
                    "to /v1/completions or /v1/chat/completions",
                    "eta",
                )
            return generate(prompt, sampling_params, request_id)
        first = call.prompts * sampling_params.n
        call.prompts += 1
        if call.recording is None:
            return self._generate(call, first, prompt, sampling_params, request_id, generate)
        call.recording.check_prompt(prompt)
        outputs = self._generate(call, first, prompt, sampling_params, request_id, generate)
        return call.recording.watch(first, prompt, sampling_params, outputs)

    def _generate(
        self,
        call: GuidedCall,
        first: int,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,
        generate: Generate,
    ) -> Outputs:
        if not call.observed:
            return _counted(call, first, generate(prompt, sampling_params, request_id))
        params = self._admit(call, prompt, sampling_params)
        sampler = Sampler(generate, self._abort, self._telemetry, self._timeout, request_id, call.params)
        if call.search is not None and call.search.kind != "stop":
            return self._searched(call, call.search, first, sampler, prompt, params)
        samples = [
            self._sampled(call, first + i, sampler, prompt, one_of(params, i))
            if call.search is None
            else self._watched(call, call.search, first + i, sampler, prompt, one_of(params, i))
            for i in range(params.n)
        ]
        merged = merge_async_iterators(*samples)
        if params.output_kind == RequestOutputKind.FINAL_ONLY:
            return _collected(merged, params.n)
        return _streamed(merged, params.n)

    def _admit(self, call: GuidedCall, prompt: Any, params: SamplingParams) -> SamplingParams:
        """The sampling parameters, after a check that this prompt can be guided; `max_tokens` may be lowered.

        Raises:
            GuidanceError: names the field that stands against it.
        """
        if prompt.get("type") != "token":
            param = "prompt_embeds" if prompt.get("type") == "embeds" else call.prompt_field
            raise GuidanceError(f"guidance needs a prompt of text or token ids: {param} cannot be combined", param)
        params = copy(params)
        one = one_of(params, 0)
        one.extra_args = extra_args(one, call.params or GuidanceParams(), sample_id=0)
        try:
            self._processor.validate_params(one)
            if call.search is not None:
                check_search(call.search, params)
        except GuidanceError as error:
            raise self._with_source(error, params) from error
        if call.critic is not None:
            length, most = len(prompt["prompt_token_ids"]), call.critic.max_length
            room = most - length + 1  # the last token is drawn, and not scored any more
            if room < 1:
                raise GuidanceError(
                    f"{call.prompt_field} has {length} tokens, and critic {call.critic.key} takes {most}",
                    call.prompt_field,
                )
            if params.max_tokens > room and call.limit_given:
                raise GuidanceError(
                    f"max_tokens must be at most {room} with critic {call.critic.key}, which takes {most} tokens: "
                    f"{call.prompt_field} has {length}; got {params.max_tokens}",
                    "max_tokens",
                )
            params.max_tokens = min(params.max_tokens, room)
        if call.params is not None and call.params.report_candidates:
            params.max_tokens = limit_tokens(call, params.max_tokens)
        return params

    def _with_source(self, error: GuidanceError, params: SamplingParams) -> GuidanceError:
        """The error, with what to do where it is about a value that the client has not sent."""
        name, own = error.param, self._engine.model_config.get_diff_sampling_param()
        if name is None or name not in own or own[name] != getattr(params, name):
            return error
        neutral = getattr(SamplingParams(), name)
        return GuidanceError(
            f"{error}. {name} is {getattr(params, name):g} by the model's generation config: send {name}: {neutral:g}, "
            "or start the server with --generation-config vllm",
            name,
        )

    async def _sampled(
        self, call: GuidedCall, index: int, sampler: Sampler, prompt: Any, params: SamplingParams
    ) -> Outputs:
        """Samples one choice."""
        sample = sampler.sample(prompt, params)
        async with aclosing(sample.outputs()) as outputs:
            async for output in outputs:
                if (reason := output.outputs[0].finish_reason) is not None:
                    await self._note(call, index, prompt, reason, sample.reports)
                yield output

    async def _watched(
        self, call: GuidedCall, search: StopSearch, index: int, sampler: Sampler, prompt: Any, params: SamplingParams
    ) -> Outputs:
        """Samples one choice, which ends where its value falls."""
        whole = params.output_kind == RequestOutputKind.FINAL_ONLY
        params.output_kind = RequestOutputKind.DELTA
        sample = sampler.sample(prompt, params, followed=True)
        decode = self._decode(prompt, params)
        async with aclosing(watched(sample, search.below, decode, whole=whole)) as outputs:
            async for output in outputs:
                if (reason := output.outputs[0].finish_reason) is not None:
                    metrics.observe_search(search.kind, sample.spent)
                    report = SearchReport(
                        kind=search.kind,
                        n=1,
                        sample=0,
                        estimate=estimate(sample.reports, _terms(call).eta),
                        tokens_spent=sample.spent,
                    )
                    await self._note(call, index, prompt, reason, sample.reports, report)
                yield output

    async def _searched(
        self,
        call: GuidedCall,
        search: BestOfSearch | ParticleSearch,
        first: int,
        sampler: Sampler,
        prompt: Any,
        params: SamplingParams,
    ) -> Outputs:
        """Samples more than there are choices, and yields the choices when they are found."""
        terms = _terms(call)
        if search.kind == "best_of":
            found = await best_of(search, params.n, sampler, prompt, params, terms)
        else:
            found = await particles(search, params.n, sampler, prompt, params, terms, self._decode(prompt, params))
        report = found[0].report
        metrics.observe_search(search.kind, report.tokens_spent, report.rejected, report.resamplings)
        for i, one in enumerate(found):
            (choice,) = one.output.outputs
            choice.index = i
            assert choice.finish_reason is not None
            await self._note(call, first + i, prompt, choice.finish_reason, one.reports, one.report)
        output = found[0].output
        output.outputs = [one.output.outputs[0] for one in found]
        output.finished = True
        yield output

    def _decode(self, prompt: Any, params: SamplingParams) -> Decode:
        """What makes text of tokens after this prompt."""

        def decode(tokens: Sequence[int], ends_by_token: bool) -> Decoded:
            ids = prompt["prompt_token_ids"]
            return decoded(self._engine.tokenizer, ids, tokens, params, ends_by_token=ends_by_token)

        return decode

    async def _note(
        self,
        call: GuidedCall,
        index: int,
        prompt: Any,
        finish_reason: str,
        reports: list[TokenReport],
        search: SearchReport | None = None,
    ) -> None:
        """Notes what was done for a choice that has ended."""
        result = choice_guidance(call, reports, search)
        if call.detail == "candidates":  # decoding many tokens takes a while
            ids = prompt["prompt_token_ids"]
            result = await asyncio.to_thread(with_candidates, call, result, reports, ids, self._texts)
        call.results[index] = result
        metrics.observe_choice(
            guided=call.params is not None,
            finish_reason=finish_reason,
            token_kls=[report.kl for report in reports if report.status == Status.GUIDED],
            value=result.value,
            residuals=residuals(call, reports),
            critic=result.critic,
            clipped=result.steps_clipped,
            budget=call.params.kl_total if call.params is not None else None,
        )

    def _abort(self, request_id: str) -> None:
        task = asyncio.ensure_future(self._engine.abort(request_id))
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)


def without_ours(params: SamplingParams) -> SamplingParams:
    """The parameters without the worker's arguments, which are not for clients to send, however they came there."""
    extra = getattr(params, "extra_args", None)
    if not extra or not any(name.startswith(PREFIX) for name in extra):
        return params
    params = copy(params)
    params.extra_args = {name: value for name, value in extra.items() if not name.startswith(PREFIX)} or None
    return params


def _terms(call: GuidedCall) -> Terms:
    """What the values of a search's critic mean."""
    assert call.params is not None
    assert call.params.eta is not None
    assert call.critic is not None
    return Terms(call.params.eta, call.critic.status.reward_range)


async def _streamed(merged: AsyncGenerator[tuple[int, RequestOutput], None], n: int) -> Outputs:
    unfinished = n
    async with aclosing(merged):
        async for i, output in merged:
            unfinished -= output.finished
            output.outputs[0].index = i
            output.finished = unfinished == 0
            yield output


async def _collected(merged: AsyncGenerator[tuple[int, RequestOutput], None], n: int) -> Outputs:
    outputs: list[RequestOutput | None] = [None] * n
    async with aclosing(merged):
        async for i, output in merged:
            output.outputs[0].index = i
            outputs[i] = output
    first = outputs[0]
    assert first is not None
    first.outputs = [output.outputs[0] for output in outputs if output is not None]
    assert len(first.outputs) == n
    yield first


async def _counted(call: GuidedCall, first: int, outputs: Outputs) -> Outputs:
    """Counts the tokens of a request that is neither guided nor observed."""
    tokens: Counter[int] = Counter()
    async with aclosing(outputs):
        async for output in outputs:
            for choice in output.outputs:
                tokens[choice.index] += len(choice.token_ids)
                if choice.finish_reason is not None:
                    call.results[first + choice.index] = ChoiceGuidance(tokens_total=tokens[choice.index])
                    metrics.observe_choice(guided=False, finish_reason=choice.finish_reason)
            yield output
