"""A database that fails under the routes: each answer is a 503 that says why; nothing is lost or stored twice."""

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from qsharp_core.errors import StoreError
from server.access.keys import ADMIN
from server.store import failures
from server.store.filters import Filters
from server.store.rollouts import RolloutStore
from tests.server.conftest import outside
from tests.server.test_store import made, run
from tests.support.postgres import running_postgres
from tests.support.store_server import error_of, serving

SECRETS = ("SELECT", "INSERT", "rollouts.", "127.0.0.1", "sqlite", "psycopg", "/tmp")


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[RolloutStore]:
    opened = RolloutStore(str(tmp_path / "rollouts.db"))
    yield opened
    opened.close()


def with_pragma(store: RolloutStore, *pragmas: str) -> Callable[[], None]:
    """Has all connections made from now on begin with these; the function that is returned ends that."""

    def begin(connection: Any, _: Any) -> None:
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}")

    event.listen(store._engine, "connect", begin)
    store._engine.dispose()

    def end() -> None:
        event.remove(store._engine, "connect", begin)
        store._engine.dispose()

    return end


def told(why: str, answers: list[Any]) -> None:
    for answer in answers:
        message = str(error_of(answer, 503)["message"])
        assert "rollout store failed" in message
        assert message.endswith(why), message
        assert not any(word in message for word in SECRETS), message


@pytest.mark.parametrize(
    ("pragmas", "why"),
    [(["query_only=ON"], failures.READ_ONLY), (["max_page_count=1"], failures.FULL)],
    ids=["read-only", "full"],
)
def test_a_database_that_cannot_be_written(sqlite: RolloutStore, pragmas: list[str], why: str) -> None:
    kept = made()
    run(sqlite.add([kept]))
    end = with_pragma(sqlite, *pragmas)
    lost = made(completion_text="x" * 500_000)
    with pytest.raises(StoreError, match=why):
        run(sqlite.add([lost]))
    with serving(sqlite) as served:
        http = served.client(ADMIN)
        if why == failures.READ_ONLY:  # a reward fits into a page that is there
            told(why, [http.post(f"/v1/rollouts/{kept.id}/reward", json={"reward": 1})])
        assert http.get(f"/v1/rollouts/{kept.id}").status_code == 200  # what can be read is
        end()
        assert http.post(f"/v1/rollouts/{kept.id}/reward", json={"reward": 1}).status_code == 200
        assert http.get("/v1/rollouts/count").json()["count"] == 1
    assert sqlite.get(lost.id, owner=None) is None


def test_a_lock_that_is_held_longer_than_the_store_waits(sqlite: RolloutStore, tmp_path: Path) -> None:
    kept = made()
    run(sqlite.add([kept]))
    end = with_pragma(sqlite, "busy_timeout=300")
    other = sqlite3.connect(tmp_path / "rollouts.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with serving(sqlite) as served:
        http = served.client(ADMIN)
        told(failures.LOCKED, [http.post(f"/v1/rollouts/{kept.id}/reward", json={"reward": 1})])
        assert http.get(f"/v1/rollouts/{kept.id}").json()["reward"] is None
        other.execute("ROLLBACK")
        assert http.post(f"/v1/rollouts/{kept.id}/reward", json={"reward": 1}).status_code == 200
    other.close()
    end()


def test_a_postgresql_that_is_read_only(postgresql: str) -> None:
    outside(postgresql, "DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
    store = RolloutStore(postgresql)
    kept = made()
    run(store.add([kept]))
    outside(postgresql, "ALTER DATABASE postgres SET default_transaction_read_only = on")
    store._engine.dispose()
    try:
        with serving(store) as served:
            http = served.client(ADMIN)
            told(failures.READ_ONLY, [http.post(f"/v1/rollouts/{kept.id}/reward", json={"reward": 1})])
            assert http.get(f"/v1/rollouts/{kept.id}").status_code == 200
    finally:
        outside(
            postgresql,
            "SET TRANSACTION READ WRITE",
            "ALTER DATABASE postgres RESET default_transaction_read_only",
        )
        store.close()


def test_a_postgresql_that_is_stopped_and_started_under_load() -> None:
    """Writers and readers of every route go on through two stops: no answer but 200 and 503, and each 200 is true."""
    with running_postgres() as postgres:
        store = RolloutStore(postgres.url)
        first = made(route="chat", request_id="chatcmpl-1")
        run(store.add([first]))
        over = threading.Event()
        confirmed: list[str] = []
        failed: list[Exception] = []
        statuses: list[tuple[str, int]] = []
        messages: set[str] = set()

        def write() -> None:
            async def loop() -> None:
                while not over.is_set():
                    one = made()
                    try:
                        await store.add([one])
                        confirmed.append(one.id)
                    except Exception as error:
                        failed.append(error)
                        await asyncio.sleep(0.02)

            asyncio.run(loop())

        def read(http: Any) -> None:
            while not over.is_set():
                for method, path in (
                    ("GET", "/v1/rollouts?limit=3"), ("GET", "/v1/rollouts/count"), ("GET", f"/v1/rollouts/{first.id}"),
                    ("GET", "/v1/chat/completions/chatcmpl-1"), ("GET", "/v1/chat/completions"),
                    ("POST", f"/v1/rollouts/{first.id}/reward"),
                ):  # fmt: skip
                    answer = http.request(method, path, json={"reward": 1} if method == "POST" else None)
                    statuses.append((path, answer.status_code))
                    if answer.status_code == 503:
                        messages.add(answer.json()["error"]["message"])

        with serving(store) as served:
            threads = [threading.Thread(target=write)]
            threads += [threading.Thread(target=read, args=[served.client(ADMIN)]) for _ in range(3)]
            for thread in threads:
                thread.start()
            for _ in range(2):
                time.sleep(1)
                postgres.stop()
                time.sleep(1)
                postgres.start()
            time.sleep(2)
            over.set()
            for thread in threads:
                thread.join(60)
                assert not thread.is_alive()
            assert served.client(ADMIN).get("/v1/rollouts/count").status_code == 200
        seen = {status for _, status in statuses}
        assert seen == {200, 503}, seen
        assert failed
        assert all(isinstance(error, StoreError) for error in failed)
        assert all(message.endswith(failures.AWAY) for message in messages), messages
        assert not any(word in message for word in SECRETS for message in messages)
        stored = [rollout.id for batch in store.batches(Filters(), 500, owner=None) for rollout in batch]
        assert len(stored) == len(set(stored))
        assert set(confirmed) <= set(stored)
        assert [status for path, status in statuses[-6:]] == [200] * 6  # it has come back by itself
        store.close()
