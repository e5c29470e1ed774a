"""Worker extension: what the API process can ask of the critics in a running engine, by `collective_rpc`.

    vllm serve MODEL --worker-extension-cls qsharp_core.vllm_plugin.worker.CriticWorker …

Every answer is plain data (`qsharp_core.wire.critics.WorkerAnswer`): `{"ok": …}`, or `{"error": …}` with the class name
of a `QSharpError`, because vLLM passes exceptions of workers on as text only. Calls run between two steps.

Of several tensor-parallel ranks the first has the critics, and its answer comes first. The others do nothing and answer
`{"ok": None}`.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec

from qsharp_core.errors import CriticError, GuidanceError, QSharpError
from qsharp_core.vllm_plugin import logs, upstream
from qsharp_core.vllm_plugin.loads import CriticLoads
from qsharp_core.vllm_plugin.settings import EngineSettings
from qsharp_core.vllm_plugin.step import StepGuide
from qsharp_core.vllm_plugin.telemetry import Keys
from qsharp_core.wire.critics import WorkerError

logs.without_casts()  # vLLM imports this before it loads the model

P = ParamSpec("P")


def answer(
    method: Callable[Concatenate["CriticWorker", P], Any],
) -> Callable[Concatenate["CriticWorker", P], dict[str, Any]]:
    """Decorates a method of the worker: its value, or its `QSharpError`, becomes plain data."""

    @wraps(method)
    def wrapped(self: "CriticWorker", /, *args: P.args, **kwargs: P.kwargs) -> dict[str, Any]:
        try:
            if not self._qsharp_guide().ranks.leads:
                return {"ok": None}
            return {"ok": method(self, *args, **kwargs)}
        except QSharpError as error:
            param = getattr(error, "param", None)
            return {"error": WorkerError(type=type(error).__name__, message=str(error), param=param).model_dump()}

    return wrapped


class CriticWorker:
    """Methods that vLLM mixes into its worker; `self.model_runner` is the worker's model runner."""

    model_runner: Any

    @answer
    def qsharp_describe(self) -> list[dict[str, Any]]:
        """Describes the critics in this worker. An answer also shows that the worker is alive and has our processor."""
        guide = self._qsharp_guide()
        guide.registry.collect()
        guide.reporter.report_audits()
        return [status.model_dump() for status in guide.registry.describe()]

    @answer
    def qsharp_connect(self, address: str, keys: list[str] | None) -> None:
        """Sends reports of steps to this ZeroMQ address, too, from now on.

        Args:
            address: of the receiver.
            keys: `telemetry.Keys`, where the receiver may be on another host.
        """
        self._qsharp_guide().reporter.sender.connect(address, None if keys is None else Keys(*keys))

    @answer
    def qsharp_load(self, path: str, name: str | None) -> str | None:
        """Loads a critic while the engine runs. To be called again until it returns the critic's key instead of None.

        A thread reads and checks the critic; only the result is added between two steps. A thread that takes longer
        than the settings' `load_seconds` is given up.

        Args:
            path: the critic's folder.
            name: the name that requests use; None for the one on the card.
        """
        registry = self._qsharp_guide().registry
        loads: CriticLoads | None = getattr(self, "_qsharp_loads", None)
        if loads is None:
            patience = EngineSettings.of(self.model_runner.vllm_config).load_seconds
            self._qsharp_loads = loads = CriticLoads(registry.load, patience)
        critic = loads.poll(path, name)
        return None if critic is None else registry.add(critic)

    @answer
    def qsharp_activate(self, key: str) -> None:
        """Makes a loaded version the active one of its name."""
        self._qsharp_guide().registry.activate(key)

    @answer
    def qsharp_unload(self, key: str) -> None:
        """Gives a version to no new request, and frees it as soon as no request uses it."""
        self._qsharp_guide().registry.unload(key)

    @answer
    def qsharp_score(
        self, name: str | None, prompts: list[list[int]], completions: list[list[int]]
    ) -> list[list[float]]:
        """The expected reward `E[z]` after each token of each completion, by plain forward passes.

        Args:
            name: `name` or `name@version`; None is the default critic.
            prompts, completions: token ids, one prompt per completion.
        """
        critic = self._qsharp_guide().registry.resolve(name)
        scorer = critic.cached_scorer
        if scorer is None:
            raise GuidanceError(f"{critic.card.key} cannot score a text: it has no model of its own", "critic")
        values: list[list[float]] = []
        for prompt, completion in zip(prompts, completions, strict=True):
            tokens = prompt + completion
            if not completion:
                values.append([])
                continue
            if len(tokens) > scorer.capacity:
                raise CriticError(f"{len(tokens)} tokens, and {critic.card.key} takes {scorer.capacity}")
            if not 0 <= min(tokens) <= max(tokens) < scorer.vocab:
                raise CriticError(f"token ids must be from 0 to {scorer.vocab - 1}")
            outputs = scorer.score_plain(tokens)
            values.append(scorer.distribution.mean(outputs[len(prompt) :].double()).tolist())
        return values

    def _qsharp_guide(self) -> StepGuide:
        from qsharp_core.vllm_plugin.processors import processor_class

        processor = upstream.processor_of(self.model_runner, processor_class(self.model_runner.vllm_config))
        if processor is None:
            raise CriticError("this engine runs without our logits processor: start it with --logits-processors")
        processor.release_ended(self.model_runner)
        return processor.guide
