"""Calls to the critics in the engine's workers (`qsharp_core.vllm_plugin.worker`)."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from pydantic import TypeAdapter
from vllm.v1.engine.exceptions import EngineDeadError

from qsharp_core import errors
from qsharp_core.errors import QSharpError
from qsharp_core.vllm_plugin import upstream
from qsharp_core.vllm_plugin.telemetry import Keys
from qsharp_core.wire.critics import CriticStatus, WorkerAnswer, WorkerError
from server.errors import UnavailableError

LOAD_POLL_SECONDS = 0.1
# Calls wait for the running step, which may hold a long prefill; an engine that takes longer is stuck.
CALL_SECONDS = 120.0
STOPPING_POLL_SECONDS = 1.0
STATUSES = TypeAdapter(list[CriticStatus])


class Workers:
    """The workers of all engines of this server: one engine, or one per data-parallel rank.

    Args:
        engine_client: vLLM's `AsyncLLM`.

    Every call raises the worker's own `QSharpError`, or `UnavailableError` where an engine does not answer.
    """

    def __init__(self, engine_client: Any) -> None:
        self._client = engine_client
        self._engines = upstream.engines_of(engine_client)

    @property
    def stopping(self) -> bool:
        """Whether vLLM has begun to stop its engines, even if they still finish the requests that they have."""
        return upstream.is_stopping(self._client)

    async def describe(self, timeout: float = CALL_SECONDS) -> list[CriticStatus]:
        """The loaded versions; with several engines, `users`, `kv_blocks` and `kv_blocks_used` are sums over them."""
        merged: dict[str, CriticStatus] = {}
        answers = await asyncio.gather(*(self._describe(engine, timeout) for engine in self._engines))
        for statuses in answers:
            for status in statuses:  # a version that is being unloaded may be gone from some engines only
                total = merged.setdefault(status.key, status)
                if total is not status:
                    total.users += status.users
                    total.kv_blocks = _sum(total.kv_blocks, status.kv_blocks)
                    total.kv_blocks_used = _sum(total.kv_blocks_used, status.kv_blocks_used)
        return list(merged.values())

    async def describe_each(self, timeout: float) -> list[list[CriticStatus] | None]:
        """The loaded versions of each engine; None for an engine that does not answer within `timeout` seconds."""
        calls = (self._describe(engine, timeout) for engine in self._engines)
        answers = await asyncio.gather(*calls, return_exceptions=True)
        return [None if isinstance(answer, BaseException) else answer for answer in answers]

    async def connect(self, address: str, keys: Keys | None) -> None:
        """Makes all workers send their step reports to this ZeroMQ address."""
        await self._call_all("qsharp_connect", address, None if keys is None else list(keys))

    async def load(self, path: str, name: str | None) -> str:
        """Loads a critic beside the running engine and returns its `name@version`.

        If one engine cannot load it, the others unload it again.

        Args:
            path: the critic's folder.
            name: replaces the name in its card.
        """
        answers = await asyncio.gather(
            *(self._load(engine, path, name) for engine in self._engines), return_exceptions=True
        )
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        if failures:
            for engine, answer in zip(self._engines, answers, strict=True):
                if isinstance(answer, str):
                    await self._call(engine, "qsharp_unload", answer)
            raise failures[0]
        return str(answers[0])

    async def activate(self, key: str) -> None:
        """Makes the version `key` the one that its bare name means."""
        await self._call_all("qsharp_activate", key)

    async def unload(self, key: str) -> None:
        """Frees the version `key` as soon as no request uses it."""
        await self._call_all("qsharp_unload", key)

    async def score(self, key: str, prompt: list[int], completion: list[int]) -> list[float]:
        """`E[Z]` after each token of the completion, in units of reward, by the version `key`."""
        values: list[list[float]] = await self._call(self._engines[0], "qsharp_score", key, [prompt], [completion])
        return values[0]

    async def _describe(self, engine: Any, timeout: float) -> list[CriticStatus]:
        return STATUSES.validate_python(await self._call(engine, "qsharp_describe", timeout=timeout))

    async def _load(self, engine: Any, path: str, name: str | None) -> str:
        while (key := await self._call(engine, "qsharp_load", path, name)) is None:
            await asyncio.sleep(LOAD_POLL_SECONDS)
        return str(key)

    async def _call_all(self, method: str, *args: Any) -> list[Any]:
        return await asyncio.gather(*(self._call(engine, method, *args) for engine in self._engines))

    async def _call(self, engine: Any, method: str, *args: Any, timeout: float = CALL_SECONDS) -> Any:
        try:
            async with asyncio.timeout(timeout):
                answers = await self._answers(upstream.call_engine(self._client, engine, method, *args))
        except TimeoutError as error:
            raise UnavailableError(f"the engine did not answer within {timeout:g} s") from error
        except EngineDeadError as error:
            raise UnavailableError("the engine has died") from error
        parsed = [WorkerAnswer.model_validate(answer) for answer in answers]
        for answer in parsed:
            if answer.error is not None:
                raise _error_of(answer.error)
        return parsed[0].ok  # only the first tensor-parallel rank has something to say

    async def _answers(self, call: Coroutine[Any, Any, list[Any]]) -> list[Any]:
        """What a call returns, unless the server is stopped meanwhile: an engine may end without an answer."""
        task = asyncio.ensure_future(call)
        try:
            while not self.stopping:
                done, _ = await asyncio.wait({task}, timeout=STOPPING_POLL_SECONDS)
                if done and not self.stopping:  # a stopping engine's refusals have any form
                    return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        raise UnavailableError("the server is shutting down")


def _sum(total: int | None, more: int | None) -> int | None:
    return None if total is None or more is None else total + more


def _error_of(answer: WorkerError) -> QSharpError:
    kind = getattr(errors, answer.type)
    assert issubclass(kind, QSharpError)
    if issubclass(kind, errors.GuidanceError):
        return kind(answer.message, answer.param)
    return kind(answer.message)
