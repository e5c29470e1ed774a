"""Calls to the critics in the engine's workers (`qsharp_core.vllm_plugin.worker`)."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from vllm.v1.engine.exceptions import EngineDeadError

from qsharp_core import errors
from qsharp_core.errors import QSharpError
from qsharp_core.vllm_plugin import upstream
from server.errors import UnavailableError

LOAD_POLL_SECONDS = 0.1
# Calls wait for the running step, which may hold a long prefill; an engine that takes longer is stuck.
CALL_SECONDS = 120.0
STOPPING_POLL_SECONDS = 1.0


class Workers:
    """All engines of this server: one, or one per data-parallel rank.

    Args:
        engine_client: vLLM's `AsyncLLM`.

    Calls raise the worker's own `QSharpError`, or `UnavailableError` where an engine does not answer.
    """

    def __init__(self, engine_client: Any) -> None:
        self._client = engine_client
        self._engines = upstream.engines_of(engine_client)

    async def describe(self, timeout: float = CALL_SECONDS) -> list[dict[str, Any]]:
        """The critics; with several engines, users and blocks are sums."""
        merged: dict[tuple[str, str], dict[str, Any]] = {}
        for described in await self._all("qsharp_describe", timeout=timeout):
            for theirs in described:  # one that is being unloaded may be gone from some engines and not from others
                ours = merged.setdefault((theirs["name"], theirs["version"]), theirs)
                if ours is not theirs:
                    for name in ("users", "kv_blocks", "kv_blocks_used"):
                        if theirs[name] is not None:  # of a critic without a cache
                            ours[name] += theirs[name]
        return list(merged.values())

    async def answering(self, timeout: float) -> list[list[dict[str, Any]] | None]:
        """The critics of each engine; None for one whose worker does not answer within so many seconds."""
        asked = (self._ask(engine, "qsharp_describe", timeout=timeout) for engine in self._engines)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        return [None if isinstance(answer, BaseException) else answer for answer in answers]

    async def connect(self, address: str) -> None:
        """Has all workers send telemetry to this address."""
        await self._all("qsharp_connect", address)

    async def load(self, path: str, name: str | None) -> str:
        """Loads a critic beside the running engine, everywhere or nowhere; returns its key."""
        answers = await asyncio.gather(
            *(self._load(engine, path, name) for engine in self._engines), return_exceptions=True
        )
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        if failures:
            for engine, answer in zip(self._engines, answers, strict=True):
                if isinstance(answer, str):
                    await self._ask(engine, "qsharp_unload", answer)
            raise failures[0]
        return str(answers[0])

    async def activate(self, key: str) -> None:
        """Makes a version the one that its name means."""
        await self._all("qsharp_activate", key)

    async def unload(self, key: str) -> None:
        """Frees a version as soon as no request uses it."""
        await self._all("qsharp_unload", key)

    async def score(self, key: str, prompt: list[int], completion: list[int]) -> list[float]:
        """`E[Z]` after each completion token."""
        values: list[list[float]] = await self._ask(self._engines[0], "qsharp_score", key, [prompt], [completion])
        return values[0]

    async def _load(self, engine: Any, path: str, name: str | None) -> str:
        while (key := await self._ask(engine, "qsharp_load", path, name)) is None:
            await asyncio.sleep(LOAD_POLL_SECONDS)
        return str(key)

    async def _all(self, method: str, *args: Any, timeout: float = CALL_SECONDS) -> list[Any]:
        return await asyncio.gather(*(self._ask(engine, method, *args, timeout=timeout) for engine in self._engines))

    async def _ask(self, engine: Any, method: str, *args: Any, timeout: float = CALL_SECONDS) -> Any:
        try:
            async with asyncio.timeout(timeout):
                answers = await self._answers(upstream.call_engine(self._client, engine, method, *args))
        except TimeoutError as error:
            raise UnavailableError(f"the engine did not answer within {timeout:g} s") from error
        except EngineDeadError as error:
            raise UnavailableError("the engine has died") from error
        for answer in answers:
            if "error" in answer:
                raise _error_of(answer["error"])
        return answers[0]["ok"]

    async def _answers(self, call: Coroutine[Any, Any, list[Any]]) -> list[Any]:
        """What a call returns, unless the server stops meanwhile: an engine may end without an answer."""
        task = asyncio.ensure_future(call)
        try:
            while not upstream.is_stopping(self._client):
                done, _ = await asyncio.wait({task}, timeout=STOPPING_POLL_SECONDS)
                if done and not upstream.is_stopping(self._client):  # one that is stopping refuses as it likes
                    return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        raise UnavailableError("the server is shutting down")


def _error_of(answer: dict[str, Any]) -> QSharpError:
    kind = getattr(errors, answer["type"])
    assert issubclass(kind, QSharpError)
    if issubclass(kind, errors.GuidanceError):
        return kind(answer["message"], answer["param"])
    return kind(answer["message"])
