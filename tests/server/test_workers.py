"""Calls to several engines at once, with an engine client that answers by itself."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from server.critics.workers import Workers
from server.errors import UnavailableError


def workers(*answers: Any) -> Workers:
    """Of engines that answer every call with these; None: never."""

    async def call(_: str, method: str, *rest: Any, engine: int) -> list[Any]:
        if answers[engine] is None:
            await asyncio.sleep(60)
        return [{"ok": answers[engine]}]

    core = SimpleNamespace(
        core_engines=list(range(len(answers))), _call_utility_async=call, _finalizer=SimpleNamespace(alive=True)
    )
    return Workers(SimpleNamespace(engine_core=core))


def described(version: str, users: int) -> dict[str, Any]:
    return {
        "name": "c", "version": version, "path": "/x", "active": True, "leaving": False, "users": users,
        "max_length": 64, "native": False, "reward_range": (0.0, 1.0), "kv_blocks": 10, "kv_blocks_used": users,
        "card": {},
    }  # fmt: skip


def test_engines_are_summed_by_version_also_while_one_still_holds_what_another_has_freed() -> None:
    found = asyncio.run(
        workers([described("2", 1)], [described("1", 2), described("2", 3)], [described("2", 0)]).describe()
    )
    assert [(one.version, one.users, one.kv_blocks) for one in found] == [("2", 4, 30), ("1", 2, 10)]


def test_an_engine_that_does_not_answer_is_told_from_one_that_does() -> None:
    assert asyncio.run(workers([], None, []).describe_each(timeout=0.05)) == [[], None, []]


def test_a_call_that_a_stopping_engine_will_never_answer_ends() -> None:
    async def run() -> None:
        asked = workers(None)
        waiting = asyncio.ensure_future(asked.describe())
        await asyncio.sleep(0.05)
        asked._client.engine_core._finalizer.alive = False
        with pytest.raises(UnavailableError, match="shutting down"):
            await asyncio.wait_for(waiting, 5)

    asyncio.run(run())
