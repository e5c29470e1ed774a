"""The plans of both databases for all that is asked of a store: none reads every rollout. And they can be seen to."""

import asyncio
import random
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from sqlalchemy import Engine, func, select

from benchmarks.store_at_size.filling import fill
from benchmarks.store_at_size.measuring import Figures, exports, pruned, reads
from benchmarks.store_at_size.plans import Statements, whole_reads
from benchmarks.store_at_size.queries import LISTS, Times
from server.api.queries import DELETED
from server.store.filters import Filters
from server.store.rewards import GivenReward
from server.store.rollouts import RolloutStore
from server.store.tables import rewards, rollouts
from tests.server.conftest import outside

SEED = random.randrange(2**31)


class Filled:
    """A store with many rollouts, the last of which is new."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.store = RolloutStore(url)
        fill(self.engine, random.Random(SEED).randint(18_000, 22_000), SEED)
        self.times = Times(time.time())

    @property
    def engine(self) -> Engine:
        return self.store._engine

    def statements(self) -> Statements:
        """What is sent for every list, count and export, and for deletions."""
        sent = Statements()
        old = replace(self.times.old, trained=False)
        with sent.listening(self.engine):
            reads(self.store, self.times, Figures(), 1)
            for filters in (self.times.last_day, LISTS["metadata, one run"]):
                exports(self.store, filters, Figures(), 1)
            for filters in (old, replace(old, trained_until=self.times.now)):
                asyncio.run(self.store.prune(filters, 20, owner=None))
        return sent

    def whole_reads(self) -> set[str]:
        found = whole_reads(self.engine, self.statements())
        # SQLite has no index for entries of a JSON object.
        return {one.statement for one in found if "json_each" not in one.statement}


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def filled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filled]:
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path_factory.mktemp('store') / 'rollouts.db'}"
    else:
        url = request.getfixturevalue("postgresql")
        outside(url, "DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
    one = Filled(url)
    yield one
    one.store.close()


def test_no_plan_reads_every_rollout(filled: Filled) -> None:
    assert filled.whole_reads() == set(), SEED


def test_a_plan_that_reads_every_rollout_is_seen(filled: Filled) -> None:
    (index,) = [one for one in rollouts.indexes if one.name == "ix_rollouts_trainable"]
    index.drop(filled.engine)
    try:
        assert any("count(*)" in statement for statement in filled.whole_reads()), SEED
    finally:
        index.create(filled.engine)


def test_what_is_stored_late_is_counted_by_what_is_new(filled: Filled) -> None:
    """A look of a watch reads the rewards that are new, and no others."""
    place = filled.store.last_reward()
    trainable = Filters(has_reward=True, has_valid_position=True)
    unjudged = filled.store.page(
        Filters(has_reward=False, has_valid_position=True), limit=random.Random(SEED).randint(3, 9), owner=None
    ).data
    before = filled.store.count(trainable, owner=None)
    given = [GivenReward(one.id, 1.0, "late") for one in unjudged]
    asyncio.run(filled.store.add_rewards(given, owner=None, given_by="me"))
    assert filled.store.count(trainable, owner=None) == before + len(given)
    sent = Statements()
    with sent.listening(filled.engine):
        assert filled.store.count(replace(trainable, rewarded_after=place), owner=None) == len(given)
    assert whole_reads(filled.engine, sent, ("rollouts", "rewards")) == []


def test_many_are_pruned_with_their_rewards(filled: Filled) -> None:
    old = filled.times.old
    number, all_of_them = filled.store.count(old, owner=None), filled.store.count(Filters(), owner=None)
    deleted, _ = asyncio.run(pruned(filled.store, replace(old, trained=False), DELETED, Figures()))
    assert deleted == number > DELETED
    assert filled.store.count(Filters(), owner=None) == all_of_them - number
    with filled.engine.connect() as connection:
        orphans = select(func.count()).select_from(rewards).where(rewards.c.rollout_id.not_in(select(rollouts.c.id)))
        assert connection.scalar(orphans) == 0
