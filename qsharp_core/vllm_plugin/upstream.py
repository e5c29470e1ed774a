"""Every reach into vLLM's internals, each pinned by `tests/test_upstream.py`.

vLLM's logits processors learn neither which token was sampled nor, under the V1 runner, which rows belong to an
unfinished chunked prefill (their sample is discarded). Both are known where a runner samples, so that one method of
each runner is wrapped:

    V1  vllm.v1.worker.gpu_model_runner.GPUModelRunner._sample(logits, spec_decode_metadata) -> SamplerOutput
    V2  vllm.v1.worker.gpu.model_runner.GPUModelRunner.sample(hidden_states, input_batch, grammar_output)
            -> (SamplerOutput, …)

The wrapper calls `before_sample(runner, hidden)` and `after_sample(sampled_token_ids)` of the runner's own processor of
ours, if it has one.

`hidden` gives the hidden states that the step's logits were computed from, row by row. V2 hands them to `sample`. V1
has them in the `execute_model_state` that its `sample_tokens` takes over before it calls `_sample`, so that method is
wrapped, too. Neither is ever that of a prompt's log-probabilities or of a dummy run, which compute logits elsewhere.
They may be views of a buffer that the next step overwrites.

`AsyncLLM.collective_rpc` hands on the first engine's answer alone; under data parallelism every engine's matters.

Tensor-parallel ranks meet in their group (`vllm.distributed.parallel_state.get_tp_group`), and each samples
on its own, from logits that every rank has (`Platform.use_all_gather`).

And a call that an engine gets while it ends is never answered: whoever waits must see that vLLM has begun to stop.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, Protocol

from torch import Tensor


class SampleListener(Protocol):
    """A logits processor that is told of the sampling around its `apply`."""

    def before_sample(self, runner: Any, hidden: Callable[[], Tensor]) -> None: ...

    def after_sample(self, sampled_token_ids: Tensor) -> None: ...


def listen_v1(kind: type) -> None:
    """Has processors of this class told by the V1 runner. Harmless when repeated."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    _keep_hidden_v1(GPUModelRunner)
    _wrap(GPUModelRunner, "_sample", kind, hidden_v1)


def listen_v2(kind: type) -> None:
    """Has processors of this class told by the V2 runner. Harmless when repeated."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    _wrap(GPUModelRunner, "sample", kind, hidden_v2)


def processor_of(runner: Any, kind: type) -> Any | None:
    """The runner's logits processor of this class."""
    if hasattr(runner, "req_states"):  # V2
        processors = runner.sampler.logits_processors if runner.sampler is not None else ()
    else:
        processors = runner.input_batch.logitsprocs.all
    return next((p for p in processors if isinstance(p, kind)), None)


def hidden_v1(runner: Any, *_: Any) -> Tensor:
    """What the logits of the running step were computed from, `[rows, D]`."""
    return runner._qsharp_hidden


def hidden_v2(runner: Any, hidden_states: Tensor, input_batch: Any, *_: Any) -> Tensor:
    """The same, of the arguments of the V2 runner's `sample`."""
    return hidden_states[input_batch.logits_indices]


def discarded_rows_v1(runner: Any) -> list[bool]:
    """Which rows of the running step get a sample that the V1 runner throws away."""
    return runner.discard_request_mask.np[: runner.input_batch.num_reqs].tolist()


def spare_cpu_generators_v1(runner: Any, spared: dict[str, Any]) -> None:
    """Keeps rows whose sample is discarded from drawing with their own seed; call before sampling.

    vLLM rewinds such a row's generator by its offset, which generators on CPU do not have: a seeded request whose
    prompt is prefilled in chunks ended the whole engine (`CPU Generator does not use offset`). Without its generator
    for that step the row draws from the common one, and there is nothing to rewind.

    Args:
        spared: generators taken out at earlier steps, by request id; put back here as soon as they are wanted.
    """
    batch = runner.input_batch
    for request_id in list(spared):
        generator = spared.pop(request_id)
        index = batch.req_id_to_index.get(request_id)
        if index is not None:
            batch.generators[index] = generator
    for index, discarded in enumerate(discarded_rows_v1(runner)):
        if discarded and index in batch.generators:
            spared[batch.req_ids[index]] = batch.generators.pop(index)


def occupied_slots_v2(runner: Any) -> set[int]:
    """Request slots of the V2 runner that hold a request."""
    return set(runner.req_states.index_to_req_id)


def tensor_parallel_group(vllm_config: Any) -> Any | None:
    """The process group of this worker's tensor-parallel ranks, for tensors on its device; None if it is alone."""
    if vllm_config.parallel_config.tensor_parallel_size == 1:
        return None
    from vllm.distributed.parallel_state import get_tp_group

    return get_tp_group().device_group


def engines_of(engine_client: Any) -> list[Any]:
    """The engines behind vLLM's `AsyncLLM`: one, or one per data-parallel rank."""
    return list(engine_client.engine_core.core_engines)


async def call_engine(engine_client: Any, engine: Any, method: str, *args: Any) -> list[Any]:
    """`collective_rpc` of one engine: its workers' answers."""
    core = engine_client.engine_core
    return await core._call_utility_async("collective_rpc", method, None, args, None, engine=engine)


def is_stopping(engine_client: Any) -> bool:
    """Whether vLLM has begun to stop its engines, be it that they still end the requests they have."""
    return not engine_client.engine_core._finalizer.alive


def _keep_hidden_v1(runner_class: type) -> None:
    original = runner_class.sample_tokens  # type: ignore[attr-defined]
    if getattr(original, "_qsharp", False):
        return

    @wraps(original)
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = self.execute_model_state
        self._qsharp_hidden = None if state is None else state.sample_hidden_states
        try:
            return original(self, *args, **kwargs)
        finally:
            self._qsharp_hidden = None

    sample_tokens._qsharp = True  # type: ignore[attr-defined]
    runner_class.sample_tokens = sample_tokens  # type: ignore[attr-defined]


def _wrap(runner_class: type, name: str, kind: type, hidden_of: Callable[..., Tensor]) -> None:
    original = getattr(runner_class, name)
    if getattr(original, "_qsharp", False):
        return

    @wraps(original)
    def sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        listener: SampleListener | None = processor_of(self, kind)
        if listener is None:
            return original(self, *args, **kwargs)
        listener.before_sample(self, cache(lambda: hidden_of(self, *args, **kwargs)))
        output = original(self, *args, **kwargs)
        sampler_output = output[0] if isinstance(output, tuple) else output
        listener.after_sample(sampler_output.sampled_token_ids)
        return output

    sample._qsharp = True  # type: ignore[attr-defined]
    setattr(runner_class, name, sample)
