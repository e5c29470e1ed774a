"""Which critics servers are to have: versions and activations on SQLite and PostgreSQL."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from qsharp_core.errors import CriticError
from server.store.critics import Activation, Desired, PublishedVersion
from server.store.rollouts import RolloutStore


class Records:
    """The records of one database."""

    def __init__(self, url: str) -> None:
        self.store = RolloutStore(url)
        self.critics = self.store.critics

    def publish(self, version: str, digest: str = "d", name: str = "sums") -> None:
        one = PublishedVersion(name, version, f"/critics/{name}/{version}", digest, {"auc": 0.8}, None, "ann")
        asyncio.run(self.critics.publish(one))

    def activate(
        self, version: str, share: float = 1.0, name: str = "sums", *, default: bool = False, rolled_back: bool = False
    ) -> None:
        asyncio.run(self.critics.activate(Activation(name, version, share, default, rolled_back, 1.0, "ann", None)))

    def roll_back(self) -> str | None:
        version = self.critics.previous("sums")
        if version is not None:
            self.activate(version, rolled_back=True)
        return version

    def retire(self, version: str, name: str = "sums") -> None:
        asyncio.run(self.critics.retire(name, version, "bob"))

    @property
    def now(self) -> Desired:
        return self.critics.desired()


@pytest.fixture
def records(url: str) -> Iterator[Records]:
    made = Records(url)
    yield made
    made.store.close()


def test_nothing_is_wanted_of_an_empty_store(records: Records) -> None:
    assert records.now == Desired()


def test_servers_are_to_have_what_was_published_and_activated(records: Records) -> None:
    for version in ("1", "2"):
        records.publish(version)
    records.publish("1", name="other")
    records.activate("2")
    records.activate("1", name="other")
    now = records.now
    assert list(now.versions) == ["sums@1", "sums@2", "other@1"]
    assert now.versions["sums@2"].location == "/critics/sums/2"
    assert now.versions["sums@2"].metrics == {"auc": 0.8}
    assert (now.active, now.trials, now.default) == ({"sums": "2", "other": "1"}, {}, "sums")
    records.activate("1", name="other", default=True)
    assert records.now.default == "other"
    assert [one.version for one in records.critics.history("other")] == ["1", "1"]


def test_a_trial_stands_beside_the_active_version_until_it_ends(records: Records) -> None:
    for version in ("1", "2"):
        records.publish(version)
    records.activate("1")
    records.activate("2", share=0.1)
    assert (records.now.active, records.now.trials) == ({"sums": "1"}, {"sums": ("2", 0.1)})
    records.activate("2", share=0.5)
    assert records.now.trials == {"sums": ("2", 0.5)}
    records.activate("2", share=0.0)
    assert (records.now.active, records.now.trials) == ({"sums": "1"}, {})
    records.activate("2", share=0.1)
    records.activate("2")
    assert (records.now.active, records.now.trials) == ({"sums": "2"}, {})


def test_a_version_never_changes(records: Records) -> None:
    records.publish("1", digest="abc")
    records.publish("1", digest="abc")
    with pytest.raises(CriticError, match="sums@1 is published with other files"):
        records.publish("1", digest="xyz")
    assert records.now.versions["sums@1"].digest == "abc"


@pytest.mark.parametrize("act", [lambda r: r.activate("9"), lambda r: r.retire("9")])
def test_what_is_not_published_cannot_be_used(records: Records, act: Any) -> None:
    records.publish("1")
    with pytest.raises(CriticError, match="sums@9 is not published"):
        act(records)


def test_retiring(records: Records) -> None:
    for version in ("1", "2"):
        records.publish(version)
    records.activate("2")
    with pytest.raises(CriticError, match="sums@2 is active: activate another version"):
        records.retire("2")
    records.retire("1")
    assert list(records.now.versions) == ["sums@2"]
    records.retire("2")  # the last one may go
    assert (dict(records.now.versions), dict(records.now.active)) == ({}, {})
    records.publish("2")  # and come back, with what was decided about it
    assert dict(records.now.active) == {"sums": "2"}


def test_a_trial_ends_with_its_version(records: Records) -> None:
    """And does not come back when that is loaded again."""
    for version in ("1", "2"):
        records.publish(version)
    records.activate("1")
    records.activate("2", share=0.1)
    records.retire("2")
    records.publish("2")
    assert (dict(records.now.active), dict(records.now.trials)) == ({"sums": "1"}, {})
    end = records.critics.history("sums")[-1]
    assert (end.version, end.share, end.given_by, end.why) == ("2", 0.0, "bob", "it is unloaded")
    records.retire("2")
    assert records.critics.history("sums")[-1] == end


def test_rolling_back_again_goes_further_back(records: Records) -> None:
    for version in ("1", "2", "3", "4"):
        records.publish(version)
        records.activate(version)
    records.activate("4")
    records.activate("1", share=0.5)  # a trial is no step
    records.retire("2")
    assert [records.roll_back() for _ in range(3)] == ["3", "1", None]
    records.activate("4")
    assert [records.roll_back() for _ in range(2)] == ["1", None]
    assert dict(records.now.active) == {"sums": "1"}


def test_one_refusal_does_not_fail_what_shares_its_transaction(records: Records) -> None:
    async def together() -> list[Any]:
        versions = [
            PublishedVersion("sums", str(i % 3), "/x", "same" if i < 3 else f"other {i}", {}, None, "ann")
            for i in range(6)
        ]
        return await asyncio.gather(*(records.critics.publish(v) for v in versions), return_exceptions=True)

    results = asyncio.run(together())
    assert results[:3] == [None] * 3
    assert all(isinstance(one, CriticError) for one in results[3:])
    assert len(records.now.versions) == 3
