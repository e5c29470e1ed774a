"""Servers of one store are told at once of what was decided, and look by themselves where nobody tells them."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from server.store.critics import Activation, CriticRecords
from server.store.rollouts import RolloutStore
from tests.server.conftest import outside
from tests.support.critic_servers import Server, version
from tests.support.postgres import running_postgres

LONG = 30.0  # nobody who is told waits so long
SHORT = 0.2


@pytest.fixture
def store_on_postgresql(postgresql: str) -> Iterator[RolloutStore]:
    outside(postgresql, "DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
    opened = RolloutStore(postgresql)
    yield opened
    opened.close()


def decisions(records: CriticRecords, folder: Path) -> dict[str, Callable[[], Awaitable[None]]]:
    one, two = version(folder, "1"), version(folder, "2")
    active = Activation("sums", "1", 1.0, False, False, time.time(), "ann", None)
    return {
        "publish": lambda: records.publish(one),
        "publish another": lambda: records.publish(two),
        "activate": lambda: records.activate(active),
        "retire": lambda: records.retire("sums", "2", "ann"),
    }


async def told(changes: AsyncGenerator[None]) -> float:
    """How long it took until the next."""
    began = time.monotonic()
    async with asyncio.timeout(LONG):
        await anext(changes)
    return time.monotonic() - began


def test_every_kind_of_decision_is_told_at_once(store_on_postgresql: RolloutStore, tmp_path: Path) -> None:
    records = store_on_postgresql.critics

    async def main() -> None:
        async with aclosing(records.changes(LONG)) as changes:
            await told(changes)
            for decide in decisions(records, tmp_path).values():
                waiting = asyncio.create_task(told(changes))
                await asyncio.sleep(0.1)
                assert not waiting.done()
                await decide()
                assert await waiting < LONG / 3
            await decisions(records, tmp_path)["publish"]()  # while nobody waits
            assert await told(changes) < LONG / 3

    asyncio.run(main())


def test_it_is_asked_where_nobody_tells(url: str, tmp_path: Path) -> None:
    store = RolloutStore(url)

    async def main() -> None:
        async with aclosing(store.critics.changes(SHORT)) as changes:
            await told(changes)
            for _ in range(3):
                assert SHORT / 2 < await told(changes) < LONG / 3

    asyncio.run(main())
    store.close()


def test_a_lost_connection_is_made_again(store_on_postgresql: RolloutStore, postgresql: str, tmp_path: Path) -> None:
    records = store_on_postgresql.critics
    lose = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query = 'LISTEN qsharp_critics'"

    async def main() -> None:
        async with aclosing(records.changes(LONG)) as changes:
            await told(changes)
            waiting = asyncio.create_task(told(changes))
            await asyncio.sleep(0.1)
            await asyncio.to_thread(outside, postgresql, lose)
            assert await waiting < LONG / 3  # a change may have been missed
            assert await told(changes) < LONG / 3  # it listens again, but may have missed one before
            waiting = asyncio.create_task(told(changes))
            await asyncio.sleep(0.1)
            assert not waiting.done()
            await decisions(records, tmp_path)["publish"]()
            assert await waiting < LONG / 3

    asyncio.run(main())


def test_no_database_is_no_end() -> None:
    with running_postgres() as running:
        store = RolloutStore(running.url)

        async def main() -> None:
            async with aclosing(store.critics.changes(SHORT)) as changes:
                await told(changes)
                await asyncio.to_thread(running.stop)
                for _ in range(4):
                    await told(changes)
                await asyncio.to_thread(running.start)
                for _ in range(4):
                    await told(changes)

        asyncio.run(main())
        store.close()


def test_servers_that_follow_are_woken(
    store_on_postgresql: RolloutStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.critics.following.SECONDS", LONG)
    records = store_on_postgresql.critics
    decide = decisions(records, tmp_path)

    async def until(seen: Callable[[Server], bool]) -> None:
        async with asyncio.timeout(LONG / 2):
            while not all(map(seen, servers)):
                await asyncio.sleep(0.05)

    servers = [Server(tmp_path, records) for _ in range(2)]

    async def main() -> None:
        following = [asyncio.create_task(one.follower.follow()) for one in servers]
        await asyncio.sleep(1)
        await decide["publish"]()
        await until(lambda one: "sums@1" in one.workers.loaded)
        await asyncio.sleep(0.5)  # what was loaded is compared with what was published
        await decide["activate"]()
        await until(lambda one: one.critics.catalog.active == {"sums": "sums@1"})
        for one in following:
            one.cancel()
        await asyncio.gather(*following, return_exceptions=True)

    asyncio.run(main())
