"""Worker extension: what the API process can ask of the critics in a running engine, by `collective_rpc`.

    vllm serve MODEL --worker-extension-cls qsharp_core.vllm_plugin.worker.CriticWorker …

Every answer is plain data (`qsharp_core.wire.critics.WorkerAnswer`): `{"ok": …}`, or `{"error": …}` with the class name
of a `QSharpError`, because vLLM passes exceptions of workers on as text alone. Calls run between two steps.

Of several tensor-parallel ranks the first has the critics, and its answer comes first; the others answer
`{"ok": None}` and have nothing to do.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

from qsharp_core.errors import CriticError, GuidanceError, QSharpError
from qsharp_core.vllm_plugin import upstream
from qsharp_core.vllm_plugin.core import GuidanceCore
from qsharp_core.vllm_plugin.registry import LoadedCritic
from qsharp_core.wire.critics import WorkerError

P = ParamSpec("P")


def answer(
    method: Callable[Concatenate["CriticWorker", P], Any],
) -> Callable[Concatenate["CriticWorker", P], dict[str, Any]]:
    """Turns a method's value or `QSharpError` into plain data."""

    @wraps(method)
    def wrapped(self: "CriticWorker", /, *args: P.args, **kwargs: P.kwargs) -> dict[str, Any]:
        try:
            if not self._qsharp_core().ranks.leads:
                return {"ok": None}
            return {"ok": method(self, *args, **kwargs)}
        except QSharpError as error:
            param = getattr(error, "param", None)
            return {"error": WorkerError(type=type(error).__name__, message=str(error), param=param).model_dump()}

    return wrapped


class CriticWorker:
    """Mixed into vLLM's worker, so `self.model_runner` is the runner."""

    model_runner: Any

    @answer
    def qsharp_describe(self) -> list[dict[str, Any]]:
        """The critics in this worker; also the sign that it is alive and has our processor."""
        core = self._qsharp_core()
        core.registry.collect()
        core.report_audits()
        return [status.model_dump() for status in core.registry.describe()]

    @answer
    def qsharp_connect(self, address: str) -> None:
        """Sends telemetry to this address from now on."""
        self._qsharp_core().sender.connect(address)

    @answer
    def qsharp_load(self, path: str, name: str | None) -> str | None:
        """Loads a critic beside the running engine: None while at it, then its key. To be called until it answers.

        Reading and checking happen in a thread; only the result is taken in between two steps.
        """
        core = self._qsharp_core()
        loads: dict[tuple[str, str | None], Future[LoadedCritic]] = self.__dict__.setdefault("_qsharp_loads", {})
        load = loads.get((path, name))
        if load is None:
            pool = ThreadPoolExecutor(1, "qsharp-load")
            loads[path, name] = pool.submit(core.registry.load, Path(path), name)
            pool.shutdown(wait=False)
            return None
        if not load.done():
            return None
        return core.registry.add(loads.pop((path, name)).result())

    @answer
    def qsharp_activate(self, key: str) -> None:
        """Makes a loaded version the one that its name means."""
        self._qsharp_core().registry.activate(key)

    @answer
    def qsharp_unload(self, key: str) -> None:
        """Frees a version as soon as no request uses it."""
        self._qsharp_core().registry.unload(key)

    @answer
    def qsharp_score(
        self, name: str | None, prompts: list[list[int]], completions: list[list[int]]
    ) -> list[list[float]]:
        """`E[Z]` after each completion token, by plain forward passes."""
        critic = self._qsharp_core().registry.resolve(name)
        engine = critic.engine
        if engine is None:
            raise GuidanceError(f"{critic.card.key} cannot score a text: it has no model of its own", "critic")
        values = []
        for prompt, completion in zip(prompts, completions, strict=True):
            tokens = prompt + completion
            if len(tokens) > engine.capacity:
                raise CriticError(f"{len(tokens)} tokens, and {critic.card.key} takes {engine.capacity}")
            if not 0 <= min(tokens) <= max(tokens) < engine.vocab:
                raise CriticError(f"token ids must be from 0 to {engine.vocab - 1}")
            outputs = engine.score_plain(tokens)
            values.append(engine.distribution.mean(outputs[len(prompt) :].double()).tolist())
        return values

    def _qsharp_core(self) -> GuidanceCore:
        from qsharp_core.vllm_plugin.processors import processor_class

        processor = upstream.processor_of(self.model_runner, processor_class(self.model_runner.vllm_config))
        if processor is None:
            raise CriticError("this engine runs without our logits processor: start it with --logits-processors")
        processor.release_ended(self.model_runner)
        return processor.core
