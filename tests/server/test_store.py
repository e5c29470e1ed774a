"""The store on SQLite and on a real PostgreSQL: what is written, read, filtered, kept after a kill, and refused."""

import asyncio
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text

from qsharp_core.errors import ConfigError, RolloutError, StoreError
from qsharp_core.rollouts.records import Rollout, Sampling, new_id
from server.store import rewards as store_rewards
from server.store import tables, writer
from server.store.filters import Filters
from server.store.rewards import GivenReward, Prediction, RewardResult
from server.store.rollouts import Imported, RolloutStore
from tests.server.conftest import outside

Result = TypeVar("Result")
# Of what `made` makes.
PREDICTED = Prediction("sums@3", "qsharp", 0.1, 0.5, 1.25, {"candidates": 20, "tail": "floor"})


def made(**fields: Any) -> Rollout:
    """A rollout that uses every field, unless told otherwise."""
    whole: dict[str, Any] = {
        "id": new_id(),
        "request_id": "cmpl-1",
        "choice": 0,
        "route": "completion",
        "created": 1.5,
        "model": "tiny",
        "prompt_token_ids": [1, 2, 3],
        "completion_token_ids": [4, 0, 2**31 - 1],
        "prompt_text": "a\n'\"",
        "completion_text": "é\u2028 ✓",
        "sampling": Sampling(temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, seed=2**60, other={"stop": ["\n"]}),
        "eta": 0.1,
        "method": "qsharp",
        "critic": "sums@3",
        "guidance": {"candidates": 20, "tail": "floor"},
        "kl": 1.25,
        "value": 0.5,
        "finish_reason": "stop",
        "metadata": {"task": "sums"},
    }
    return Rollout(**{**whole, **fields})


def unguided(**fields: Any) -> Rollout:
    none = {"eta": None, "method": None, "critic": None, "guidance": None, "value": None}
    return made(**{**none, "first_valid_position": 0, **fields})


def run(work: Awaitable[Result]) -> Result:
    async def awaited() -> Result:
        return await work

    return asyncio.run(awaited())


# -- what is written is read


def test_every_field_comes_back(store: RolloutStore) -> None:
    chat = made(route="chat", messages=[{"role": "user", "content": "hi"}], response={"choice": {"index": 0}})
    child = unguided(parent_id=chat.id, cut=2, first_valid_position=1, prompt_text=None)
    run(store.add([chat, child]))
    assert store.get(chat.id, owner=None) == chat
    assert store.get(child.id, owner=None) == child
    assert store.get("rol_none", owner=None) is None


def test_text_that_databases_do_not_take_is_stored_with_a_mark(store: RolloutStore) -> None:
    odd = made(completion_text="a\0b\ud800c", messages=[{"content": "\0\\u0000"}], metadata={"k\0": "\udfff"})
    run(store.add([odd]))
    found = store.get(odd.id, owner=None)
    assert found is not None
    assert found.completion_text == "a\ufffdb\ufffdc"
    assert found.messages == [{"content": "\ufffd\\u0000"}]
    assert found.metadata == {"k\ufffd": "\ufffd"}
    assert store.page(Filters(metadata={"k\0": "\udfff"}), owner=None).data == [found]


def test_pages_are_in_the_order_of_commits(store: RolloutStore) -> None:
    several = [made() for _ in range(7)]
    for one in several:
        run(store.add([one]))
    first = store.page(Filters(), limit=3, owner=None)
    assert (first.data, first.more) == (several[:3], True)
    second = store.page(Filters(), after=first.data[-1].id, limit=4, owner=None)
    assert (second.data, second.more) == (several[3:], False)
    assert store.page(Filters(), limit=2, order="desc", owner=None).data == several[:4:-1]
    assert store.page(Filters(), after=several[2].id, limit=9, order="desc", owner=None).data == several[1::-1]
    with pytest.raises(RolloutError, match="after"):
        store.page(Filters(), after="rol_none", owner=None)


@pytest.mark.parametrize(
    ("filters", "wanted"),
    [
        (Filters(), "abcd"),
        (Filters(guided=True), "abc"),
        (Filters(guided=False), "d"),
        (Filters(critic="sums"), "ab"),
        (Filters(critic="sums@2"), "b"),
        (Filters(critic="su_s"), ""),
        (Filters(critic="su"), ""),
        (Filters(has_reward=True), "b"),
        (Filters(has_reward=False), "acd"),
        (Filters(has_valid_position=True), "d"),
        (Filters(has_valid_position=False), "abc"),
        (Filters(has_valid_position=True, has_reward=True), ""),
        (Filters(metadata={"run": "1"}), "ab"),
        (Filters(metadata={"run": "1", 'a"b.c': "%"}), "b"),
        (Filters(metadata={"run": "3"}), ""),
        (Filters(metadata={"none": ""}), ""),
        (Filters(model="other"), "c"),
        (Filters(model="other", guided=False), ""),
    ],
)
def test_filters(store: RolloutStore, filters: Filters, wanted: str) -> None:
    several = {
        "a": made(critic="sums@1", metadata={"run": "1"}),
        "b": made(critic="sums@2", metadata={"run": "1", 'a"b.c': "%"}),
        "c": made(critic="sumsum@1", model="other", metadata={}),
        "d": unguided(metadata={"run": "2"}),
    }
    run(store.add(list(several.values())))
    run(store.add_rewards([GivenReward(several["b"].id, 1.0)], owner=None, given_by="me"))
    found = [r.id for r in store.page(filters, owner=None).data]
    assert found == [several[name].id for name in wanted]
    assert [r.id for batch in store.batches(filters, 2, owner=None) for r in batch] == found
    assert store.count(filters, owner=None) == len(found)


def test_a_position_beyond_the_completion_is_not_valid(store: RolloutStore) -> None:
    """As an import may have it: the last position is the completion's last token."""
    length = len(made().completion_token_ids)
    positions = [None, 0, length - 1, length, length + 1]
    run(store.add([made(first_valid_position=position) for position in positions]))
    valid = [r.first_valid_position for r in store.page(Filters(has_valid_position=True), owner=None).data]
    assert valid == [0, length - 1]
    assert store.count(Filters(has_valid_position=False), owner=None) == 3


def test_batches_are_what_was_there_when_they_began(store: RolloutStore) -> None:
    run(store.add([made() for _ in range(5)]))
    batches = store.batches(Filters(), 2, owner=None)
    sizes = [len(next(batches))]
    run(store.add([made()]))
    sizes += [len(batch) for batch in batches]
    assert sizes == [2, 2, 1]


def test_the_lag_is_how_long_the_oldest_write_has_waited(store: RolloutStore) -> None:
    begun, go = threading.Event(), threading.Event()

    def hang(_: Any, payloads: list[Any]) -> list[Any]:
        begun.set()
        go.wait(10)
        return payloads

    assert store.lag == 0
    future = store._writer.submit(hang, 1)
    begun.wait(10)
    time.sleep(0.1)
    assert 0.1 <= store.lag < 10
    go.set()
    future.result(10)
    run(store.add([made()]))
    assert store.lag < 0.1


# -- rewards


def test_a_reward_that_is_there_is_only_noted_and_another_replaces_it(store: RolloutStore) -> None:
    one = made()
    run(store.add([one]))
    for reward, source, changed in [(0.5, "a", True), (0.5, "b", False), (-1.0, None, True), (0.5, "a", True)]:
        given = run(store.add_rewards([GivenReward(one.id, reward, source)], owner=None, given_by="me"))
        (result,) = given
        assert result is not None
        assert result._replace(history=()) == RewardResult(one.id, reward, changed, PREDICTED)
    found = store.get(one.id, owner=None)
    assert found is not None
    assert found.reward == 0.5
    assert [(r.reward, r.source) for r in found.rewards] == [(0.5, "a"), (0.5, "b"), (-1.0, None), (0.5, "a")]
    assert found.rewards[0].created == pytest.approx(time.time(), abs=60)


def test_a_batch_of_rewards_is_given_whole_or_not(store: RolloutStore) -> None:
    one, two = made(), made()
    run(store.add([one, two]))
    results = run(
        store.add_rewards([GivenReward(one.id, 1.0), GivenReward("rol_none", 1.0)], owner=None, given_by="me")
    )
    assert results[1] is None
    assert [r.reward for r in store.page(Filters(), owner=None).data] == [None, None]
    run(
        store.add_rewards(
            [GivenReward(one.id, 1.0), GivenReward(two.id, 2.0), GivenReward(one.id, 3.0)], owner=None, given_by="me"
        )
    )
    assert [r.reward for r in store.page(Filters(), owner=None).data] == [3.0, 2.0]


def test_one_wrong_batch_does_not_touch_others_in_its_group(store: RolloutStore) -> None:
    one = made()

    async def both() -> list[Any]:
        await store.add([one])
        given = ([GivenReward("rol_none", 1.0), GivenReward(one.id, 1.0)], [GivenReward(one.id, 2.0)])
        return list(await asyncio.gather(*(store.add_rewards(items, owner=None, given_by="me") for items in given)))

    wrong, right = run(both())
    assert wrong[0] is None
    assert [result._replace(history=()) for result in right] == [RewardResult(one.id, 2.0, True, PREDICTED)]
    found = store.get(one.id, owner=None)
    assert found is not None
    assert [r.reward for r in found.rewards] == [2.0]


# -- stored chat completions


def listed(store: RolloutStore, *page: Any) -> tuple[list[str], bool]:
    responses, more = store.responses(*page, owner=None)
    return [choices[0].request_id for choices in responses], more


def test_a_response_is_its_choices(store: RolloutStore) -> None:
    def choices(name: str, created: float, count: int = 2, **fields: Any) -> list[Rollout]:
        return [made(request_id=name, route="chat", created=created, choice=i, **fields) for i in range(count)]

    a, b, c = choices("chatcmpl-a", 1.0), choices("chatcmpl-b", 2.0), choices("chatcmpl-c", 3.0, model="other")
    run(store.add([a[1], b[0]]))
    run(store.add([a[0], b[1], *c, made(request_id="cmpl-d")]))
    assert store.response("chatcmpl-a", owner=None) == a
    assert store.response("cmpl-d", owner=None) == []
    assert listed(store, Filters(), None, 2, "asc") == (["chatcmpl-a", "chatcmpl-b"], True)
    assert listed(store, Filters(), "chatcmpl-b", 2, "asc") == (["chatcmpl-c"], False)
    assert listed(store, Filters(), None, 1, "desc") == (["chatcmpl-c"], True)
    assert listed(store, Filters(model="tiny"), None, 9, "desc") == (["chatcmpl-b", "chatcmpl-a"], False)
    with pytest.raises(RolloutError, match="after"):
        listed(store, Filters(), "cmpl-d", 2, "asc")
    assert run(store.set_metadata("chatcmpl-a", {"x": "y"}, owner=None))
    assert [r.metadata for r in store.response("chatcmpl-a", owner=None)] == [{"x": "y"}] * 2
    assert not run(store.set_metadata("chatcmpl-z", {}, owner=None))
    run(store.add_rewards([GivenReward(b[0].id, 1.0)], owner=None, given_by="me"))
    assert run(store.delete("chatcmpl-b", owner=None))
    assert not run(store.delete("chatcmpl-b", owner=None))
    assert store.get(b[0].id, owner=None) is None
    assert len(store.page(Filters(), owner=None).data) == 5


# -- import


def test_importing_twice_changes_nothing(store: RolloutStore) -> None:
    one, two = made(), made()
    run(store.add([one]))
    run(store.add_rewards([GivenReward(one.id, 1.0, "a"), GivenReward(one.id, 0.0, "b")], owner=None, given_by="me"))
    known = store.get(one.id, owner=None)
    assert known is not None
    other = replace(known, rewards=(), reward=None)
    assert run(store.import_all([other, two, two])) == Imported(1, 2)
    assert run(store.import_all([other, two])) == Imported(0, 2)
    assert store.get(one.id, owner=None) == known
    assert store.get(two.id, owner=None) == two


def test_history_is_imported(store: RolloutStore, tmp_path: Path) -> None:
    one = made()
    run(store.add([one]))
    run(store.add_rewards([GivenReward(one.id, 1.0, "a"), GivenReward(one.id, 0.0, "b")], owner=None, given_by="me"))
    other = RolloutStore(str(tmp_path / "other.db"))
    (batch,) = store.batches(Filters(), 9, owner=None)
    run(other.import_all(batch))
    assert other.get(one.id, owner=None) == store.get(one.id, owner=None)
    other.close()


# -- durability and failures


def test_what_is_there_is_there_after_opening_again(url: str) -> None:
    first = RolloutStore(url)
    one = made()
    run(first.add([one]))
    first.close()
    second = RolloutStore(url)
    assert second.get(one.id, owner=None) == one
    second.close()


def test_writes_are_grouped(store: RolloutStore, url: str) -> None:
    several = [made() for _ in range(300)]
    groups: list[int] = []
    transact = store._writer._transact
    store._writer._transact = lambda group: groups.append(len(group)) or transact(group)  # type: ignore

    async def add() -> None:
        await asyncio.gather(*(store.add([one]) for one in several))

    run(add())
    assert sum(groups) == 300
    assert len(groups) < 100
    assert len(store.page(Filters(), limit=1000, owner=None).data) == 300


def test_a_wrong_write_fails_alone(store: RolloutStore) -> None:
    several = [made() for _ in range(20)]
    several[7] = made(kl=object())  # no database takes it

    async def add() -> list[BaseException | None]:
        return list(await asyncio.gather(*(store.add([one]) for one in several), return_exceptions=True))

    results = run(add())
    assert isinstance(results.pop(7), StoreError)
    assert results == [None] * 19
    assert {r.id for r in store.page(Filters(), limit=100, owner=None).data} == {
        r.id for r in several if r is not several[7]
    }


def test_a_store_that_is_down_says_so_and_comes_back(store: RolloutStore, url: str) -> None:
    one = made()
    outside(url, "ALTER TABLE rollouts RENAME TO gone")
    with pytest.raises(StoreError, match="nothing was written"):
        run(store.add([one]))
    outside(url, "ALTER TABLE gone RENAME TO rollouts")
    run(store.add([one]))
    assert store.get(one.id, owner=None) == one


def test_a_writer_waits_for_another_process(tmp_path: Path) -> None:
    store = RolloutStore(str(tmp_path / "r.db"))
    other = sqlite3.connect(tmp_path / "r.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    async def add() -> None:
        task = asyncio.create_task(store.add([made()]))
        await asyncio.sleep(0.5)
        assert not task.done()
        other.execute("COMMIT")
        await asyncio.wait_for(task, 20)

    asyncio.run(add())
    other.close()
    store.close()


def test_a_cancelled_write_leaves_the_others(store: RolloutStore) -> None:
    several = [made() for _ in range(50)]

    async def add() -> None:
        tasks = [asyncio.create_task(store.add([one])) for one in several]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(add())
    run(store.add([made()]))
    found = {r.id for r in store.page(Filters(), limit=100, owner=None).data}
    assert found >= {one.id for one in several[1::2]}


def test_a_closed_store_refuses(url: str) -> None:
    store = RolloutStore(url)
    store.close()
    with pytest.raises(StoreError, match="closed"):
        run(store.add([made()]))


def test_more_writes_than_the_queue_holds_wait(store: RolloutStore) -> None:
    store._room = asyncio.Semaphore(4)
    several = [made() for _ in range(100)]
    most = 0
    submit: Callable[..., Any] = store._writer.submit
    waiting: set[Any] = set()

    def counted(*arguments: Any) -> Any:
        nonlocal most
        future = submit(*arguments)
        waiting.add(future)
        future.add_done_callback(waiting.discard)
        most = max(most, len(waiting))
        return future

    store._writer.submit = counted  # type: ignore

    async def add() -> None:
        await asyncio.gather(*(store.add([one]) for one in several))

    run(add())
    assert most <= 4
    assert len(store.page(Filters(), limit=1000, owner=None).data) == 100


@pytest.mark.parametrize("count", [1, 3, 4, 5, 13])
def test_sizes_about_the_limits_of_a_statement_and_a_transaction(
    store: RolloutStore, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(store_rewards, "IN", 4)
    monkeypatch.setattr(writer, "GROUP", 3)
    several = [made(request_id=f"cmpl-{i}") for i in range(count)]

    async def add() -> None:
        await asyncio.gather(*(store.add([one]) for one in several))

    run(add())
    results = run(
        store.add_rewards([GivenReward(one.id, float(i)) for i, one in enumerate(several)], owner=None, given_by="me")
    )
    assert [result.reward for result in results if result is not None] == list(map(float, range(count)))
    found = [rollout for batch in store.batches(Filters(), 4, owner=None) for rollout in batch]
    assert {rollout.id: rollout.reward for rollout in found} == {one.id: i for i, one in enumerate(several)}
    assert all(len(rollout.rewards) == 1 for rollout in found)
    pages, after = [], None
    while (page := store.page(Filters(), after=after, limit=4, owner=None)).data:
        pages.append(len(page.data))
        after = page.data[-1].id
    assert (sum(pages), max(pages)) == (count, min(count, 4))


WRITER = """
import asyncio, sys
from server.store.rewards import GivenReward
from server.store.rollouts import RolloutStore
from tests.server.test_store import made

async def client(store):
    while True:
        one = made()
        await store.add([one])
        print(one.id, flush=True)
        await store.add_rewards([GivenReward(one.id, 1.0)], owner=None, given_by="me")
        print(one.id, "1.0", flush=True)

async def main():
    store = RolloutStore(sys.argv[1])
    print("ready", flush=True)
    await asyncio.gather(*(client(store) for _ in range(16)))

asyncio.run(main())
"""


def test_nothing_that_was_confirmed_is_lost_by_a_kill(url: str, tmp_path: Path) -> None:
    """Ten kills at random moments; the database stays the same."""
    told: set[str] = set()
    rewarded: set[str] = set()
    moments = random.Random(5)
    for _ in range(10):
        with (tmp_path / "told").open("wb") as output:
            process = subprocess.Popen([sys.executable, "-c", WRITER, url], stdout=output)
            deadline = time.monotonic() + 60
            while not (tmp_path / "told").stat().st_size and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.4))
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        # The last line may be cut: its reader has not seen it.
        for line in (tmp_path / "told").read_text().split("\n")[1:-1]:
            name, _, reward = line.partition(" ")
            (rewarded if reward else told).add(name)
    store = RolloutStore(url)
    found = [r for batch in store.batches(Filters(), 1000, owner=None) for r in batch]
    store.close()
    assert len(told) > 20
    assert len({r.id for r in found}) == len(found)
    assert told <= {r.id for r in found}
    assert rewarded <= {r.id for r in found if r.reward == 1.0 and len(r.rewards) == 1}


# -- opening


@pytest.mark.filterwarnings(
    "ignore:.*ix_rollouts_metadata.*:UserWarning"
)  # alembic cannot compare it, and SQLite has none
def test_migrations_make_the_schema_that_the_code_has(store: RolloutStore) -> None:
    with store._engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, tables.metadata) == []


def test_sqlite_is_durable(tmp_path: Path) -> None:
    store = RolloutStore(str(tmp_path / "r.db"))
    with store._engine.connect() as connection:
        assert connection.scalar(text("PRAGMA journal_mode")) == "wal"
        assert connection.scalar(text("PRAGMA synchronous")) == 2  # FULL
    store.close()


def test_a_database_of_a_newer_version_is_refused(url: str) -> None:
    RolloutStore(url).close()
    outside(url, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(ConfigError, match="newer version"):
        RolloutStore(url)


def test_programs_that_start_together_migrate_once(url: str) -> None:
    code = "import sys; from server.store.rollouts import RolloutStore; RolloutStore(sys.argv[1]).close()"
    started = [subprocess.Popen([sys.executable, "-c", code, url], stderr=subprocess.PIPE) for _ in range(3)]
    for process in started:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors.decode()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite://", "must be a file"),
        ("sqlite:///:memory:", "must be a file"),
        ("/no/such/folder/r.db", "does not exist"),
        ("mysql://user:secret@host/db", "cannot use mysql"),
        ("x://:y:z", "postgresql://"),
        ("postgresql://qsharp:secret@127.0.0.1:1/none", "cannot be opened"),
    ],
)
def test_wrong_urls(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        RolloutStore(url)
    assert "secret" not in str(raised.value)


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "r.db").write_text(json.dumps({"no": "database"}) * 100)
    with pytest.raises(ConfigError, match="not a database"):
        RolloutStore(str(tmp_path / "r.db"))
