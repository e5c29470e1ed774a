"""Every reach into vLLM's internals, each pinned by `tests/core/vllm_plugin/test_upstream.py`.

vLLM's logits processors are told neither which token was sampled nor, under the V1 runner, which rows belong to an
unfinished chunked prefill, whose sample is discarded. Both are known where a runner samples. Therefore one method of
each runner is wrapped:

    V1  vllm.v1.worker.gpu_model_runner.GPUModelRunner._sample(logits, spec_decode_metadata) -> SamplerOutput
    V2  vllm.v1.worker.gpu.model_runner.GPUModelRunner.sample(hidden_states, input_batch, grammar_output)
            -> (SamplerOutput, …)

If the runner has a logits processor of ours, the wrapper calls its `before_sample(runner, hidden)` and
`after_sample(sampled_token_ids)`.

`hidden` returns the hidden states that the step's logits were computed from, row by row. V2 passes them to `sample`. V1
has them in `execute_model_state`, which its `sample_tokens` clears before it calls `_sample`; `sample_tokens` is
therefore wrapped, too. They are never those of a prompt's log-probabilities or of a dummy run, which compute logits
elsewhere. They may be views of a buffer that the next step overwrites.

Besides:

- `AsyncLLM.collective_rpc` returns the answer of the first engine only. Under data parallelism every engine's matters.
- Each tensor-parallel rank samples on its own, from logits that every rank has (`Platform.use_all_gather`). The ranks'
  process group is that of `vllm.distributed.parallel_state.get_tp_group`.
- A call that reaches an engine while it ends is never answered. Whoever waits must see that vLLM has begun to stop.

The command line of `vllm serve` is reached for in `server/upstream.py`.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, Protocol

from torch import Tensor


class SampleListener(Protocol):
    """A logits processor that is called before and after its runner samples."""

    def before_sample(self, runner: Any, hidden: Callable[[], Tensor]) -> None:
        """Called before sampling, and so before `apply`. `hidden` returns `[rows, D]`, as long as the step runs."""

    def after_sample(self, sampled_token_ids: Tensor) -> None:
        """Called with the tokens that were sampled."""


def listen_v1(kind: type) -> None:
    """Wraps the V1 runner, so that it calls processors of this class around sampling. May be repeated."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    _keep_hidden_v1(GPUModelRunner)
    _wrap(GPUModelRunner, "_sample", kind, hidden_v1)


def listen_v2(kind: type) -> None:
    """Wraps the V2 runner, so that it calls processors of this class around sampling. May be repeated."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    _wrap(GPUModelRunner, "sample", kind, hidden_v2)


def processor_of(runner: Any, kind: type) -> Any | None:
    """The runner's logits processor of this class; None if it has none."""
    if hasattr(runner, "req_states"):  # V2
        processors = runner.sampler.logits_processors if runner.sampler is not None else ()
    else:
        processors = runner.input_batch.logitsprocs.all
    return next((p for p in processors if isinstance(p, kind)), None)


def hidden_v1(runner: Any, *_: Any) -> Tensor:
    """The hidden states `[rows, D]` that the logits of the V1 runner's running step were computed from."""
    return runner._qsharp_hidden


def hidden_v2(runner: Any, hidden_states: Tensor, input_batch: Any, *_: Any) -> Tensor:
    """The hidden states `[rows, D]` that logits were computed from, from the arguments of the V2 runner's `sample`."""
    return hidden_states[input_batch.logits_indices]


def discarded_rows_v1(runner: Any) -> list[bool]:
    """For each row of the running step, whether the V1 runner discards its sample."""
    return runner.discard_request_mask.np[: runner.input_batch.num_reqs].tolist()


def spare_cpu_generators_v1(runner: Any, spared: dict[str, Any]) -> None:
    """Takes the generators of rows whose sample is discarded out of the batch. Call it before sampling.

    vLLM rewinds the generator of such a row by its offset, which generators on CPU do not have. A seeded request whose
    prompt is prefilled in chunks therefore ended the whole engine (`CPU Generator does not use offset`). Without a
    generator of its own the row draws from the common one, and there is nothing to rewind.

    Args:
        runner: the V1 runner.
        spared: generators that were taken out at earlier steps, by request id. They are put back here as soon as they
            are needed.
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
    """The slots of the V2 runner that hold a request."""
    return set(runner.req_states.index_to_req_id)


def tensor_parallel_group(vllm_config: Any) -> Any | None:
    """The process group of this worker's tensor-parallel ranks, for tensors on its device; None for one rank."""
    if vllm_config.parallel_config.tensor_parallel_size == 1:
        return None
    from vllm.distributed.parallel_state import get_tp_group

    return get_tp_group().device_group


def engines_of(engine_client: Any) -> list[Any]:
    """The engines behind vLLM's `AsyncLLM`, one per data-parallel rank."""
    return list(engine_client.engine_core.core_engines)


async def call_engine(engine_client: Any, engine: Any, method: str, *args: Any) -> list[Any]:
    """Calls a method of the workers of one engine by `collective_rpc`, and returns their answers."""
    core = engine_client.engine_core
    return await core._call_utility_async("collective_rpc", method, None, args, None, engine=engine)


def is_stopping(engine_client: Any) -> bool:
    """Whether vLLM has begun to stop its engines, even if they still finish the requests that they have."""
    return not engine_client.engine_core._finalizer.alive


def has_died(engine_client: Any) -> bool:
    """Whether an engine's process ended without being told to."""
    return bool(engine_client.engine_core.resources.engine_dead)


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
