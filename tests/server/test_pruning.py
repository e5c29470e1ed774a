"""What goes when old rollouts are deleted, and what stays: in the store, over HTTP, and by the command."""

import asyncio
import os
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from qsharp_core import cli
from qsharp_core.rollouts.records import Reward, Rollout
from server.access.keys import ADMIN
from server.commands.rollouts import duration
from server.store import rollouts as store_rollouts
from server.store.critics import Activation, PublishedVersion
from server.store.filters import Filters
from server.store.pruning import Pruned
from server.store.rewards import GivenReward
from server.store.rollouts import RolloutStore
from tests.server.test_store import made, run, unguided
from tests.support import fake_server
from tests.support.fake_server import FakeServer
from tests.support.store_server import Served, error_of, serving

SEED = random.randrange(2**31)


def some(store: RolloutStore, count: int) -> list[Rollout]:
    """Rollouts of all kinds, of random times from 0 to 100, as the store has them; some times are equal."""
    rng = random.Random(SEED)
    critics = [None, "sums@1", "sums@2", "sumsum@1", "Sums@1"]
    new = []
    for _ in range(count):
        critic = rng.choice(critics)
        fields = {"created": float(rng.randrange(100)), "owner": rng.choice(["ann", "bob"])}
        new.append(unguided(**fields) if critic is None else made(critic=critic, **fields))
    run(store.add(new))
    for one in rng.sample(new, count // 2):
        given = [GivenReward(one.id, float(rng.randrange(3)), rng.choice(["a", "b"])) for _ in range(rng.randint(1, 3))]
        run(store.add_rewards(given, owner=None, given_by=rng.choice(["judge", "me"])))
    return all_of(store)


def all_of(store: RolloutStore) -> list[Rollout]:
    return [one for batch in store.batches(Filters(), 50, owner=None) for one in batch]


def trainable(one: Rollout) -> bool:
    first = one.first_valid_position
    return one.reward is not None and first is not None and first < len(one.completion_token_ids)


def prune(store: RolloutStore, filters: Filters, limit: int, owner: str | None = None) -> list[Pruned]:
    """Deletes all that the filters leave, and returns each answer."""
    answers = []
    while True:
        answers.append(run(store.prune(filters, limit, owner=owner)))
        if not answers[-1].more:
            return answers
        filters = replace(filters, created_after=answers[-1].until)


def publish(store: RolloutStore, name: str, *, active: bool = False) -> float:
    """Publishes a version now, and returns when that was."""
    version = PublishedVersion(name, "1", f"/critics/{name}", "d", {}, None, "me")
    run(store.critics.publish(version))
    if active:
        run(store.critics.activate(Activation(name, "1", 1.0, False, False, time.time(), "me", None)))
    return time.time()


# -- filters


def test_filters_leave_what_they_say(store: RolloutStore, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(SEED)
    monkeypatch.setattr(store_rollouts, "PLACES", rng.randint(1, 9))
    stored = some(store, rng.randint(40, 70))
    low, high = sorted(float(rng.randrange(100)) for _ in range(2))
    wanted: list[tuple[Filters, Callable[[Rollout], bool]]] = [
        (Filters(created_after=low), lambda one: one.created >= low),
        (Filters(created_before=high), lambda one: one.created < high),
        (Filters(created_after=low, created_before=high), lambda one: low <= one.created < high),
        (Filters(created_after=101.0), lambda one: False),
        (Filters(critic="sums"), lambda one: one.critic in ("sums@1", "sums@2")),
        (Filters(trained=True, trained_until=low), lambda one: trainable(one) and one.created < low),
        (Filters(trained=False, trained_until=low), lambda one: not (trainable(one) and one.created < low)),
        (
            Filters(trained=False, trained_until=high, created_before=low),
            lambda one: one.created < low and not trainable(one),
        ),
        (Filters(trained=False, created_before=low), lambda one: one.created < low),
    ]
    for filters, holds in wanted:
        expected = [one.id for one in stored if holds(one)]
        for owner in (None, "ann"):
            seen = [name for name in expected if owner is None or store.get(name, owner=owner) is not None]
            assert store.count(filters, owner=owner) == len(seen), (filters, SEED)
            assert [r.id for r in store.page(filters, limit=100, owner=owner).data] == seen, (filters, SEED)
            latest = store.page(filters, limit=100, order="desc", owner=owner).data
            assert [r.id for r in latest] == seen[::-1], (filters, SEED)
            assert [r.id for b in store.batches(filters, 7, owner=owner) for r in b] == seen, (filters, SEED)


def test_what_got_its_first_reward_since(store: RolloutStore) -> None:
    rng = random.Random(SEED)
    some(store, rng.randint(30, 50))
    place, before = store.last_reward(), {one.id: one for one in all_of(store)}
    unrewarded = [one for one in before.values() if one.reward is None]
    rewarded = [one for one in before.values() if one.reward is not None]
    late = rng.sample(unrewarded, len(unrewarded) // 2)
    again = rng.sample(rewarded, 3)
    for one in [*late, *again]:
        run(store.add_rewards([GivenReward(one.id, 7.0, "late")], owner=None, given_by="judge"))
    fresh = [unguided(created=1.0, rewards=(Reward(1.0, "a", 1.0, "me"),), reward=1.0) for _ in range(2)]
    run(store.import_all(fresh))
    new = {one.id for one in [*late, *fresh]}
    assert {one.id for one in store.page(Filters(rewarded_after=place), limit=100, owner=None).data} == new
    assert store.count(Filters(rewarded_after=place, has_reward=True), owner=None) == len(new)
    assert store.count(Filters(rewarded_after=store.last_reward()), owner=None) == 0
    # Of the judge's rewards alone: what others have rewarded before is new, too.
    judged = {one.id for one in rewarded if any(entry.given_by == "judge" for entry in one.rewards)}
    theirs = {one.id for one in late} | {one.id for one in again if one.id not in judged}
    found = store.page(Filters(rewarded_after=place, rewarded_by=["judge"], has_reward=True), limit=100, owner=None)
    assert {one.id for one in found.data} == theirs, SEED
    assert {entry.given_by for one in found.data for entry in one.rewards} == {"judge"}


# -- the store


def test_batches_delete_what_the_filters_leave_and_nothing_else(store: RolloutStore) -> None:
    rng = random.Random(SEED)
    stored = some(store, rng.randint(40, 70))
    filters = Filters(created_before=float(rng.randrange(20, 80)), owners=["ann"])
    going = [one for one in stored if one.created < (filters.created_before or 0) and one.owner == "ann"]
    limit = rng.randint(1, 9)
    assert prune(store, filters, limit, owner="bob") == [Pruned(0, None, False)]
    answers = prune(store, filters, limit)
    assert sum(answer.deleted for answer in answers) == len(going), SEED
    assert max(answer.deleted for answer in answers) <= limit
    untils = [answer.until for answer in answers if answer.until is not None]
    assert untils == sorted(untils)
    assert all_of(store) == [one for one in stored if one not in going]


def test_what_may_have_trained_a_version_is_kept_while_it_is_wanted(store: RolloutStore) -> None:
    stored = some(store, 40)
    filters = Filters(created_before=1000.0, trained=False)
    publish(store, "sums")
    publish(store, "other", active=True)
    assert sum(answer.deleted for answer in prune(store, filters, 7)) == sum(not trainable(one) for one in stored)
    kept = all_of(store)
    assert kept == [one for one in stored if trainable(one)]
    assert kept != []
    run(store.critics.retire("sums", "1", "me"))
    assert prune(store, filters, 7) == [Pruned(0, None, False)]  # the active one is wanted, whatever its name
    publish(store, "third")
    run(store.critics.retire("third", "1", "me"))
    run(store.critics.publish(PublishedVersion("other", "2", "/critics", "e", {}, "other@1", "me")))
    run(store.critics.activate(Activation("other", "2", 1.0, False, False, time.time(), "me", None)))
    run(store.critics.retire("other", "1", "me"))
    assert prune(store, filters, 7) == [Pruned(0, None, False)]


def test_what_came_after_the_last_version_goes(store: RolloutStore) -> None:
    before = unguided(created=1.0)
    run(store.add([before]))
    published = publish(store, "sums")
    after = unguided(created=published + 5)
    run(store.add([after]))
    run(store.add_rewards([GivenReward(one.id, 1.0) for one in (before, after)], owner=None, given_by="me"))
    assert [answer.deleted for answer in prune(store, Filters(created_before=published + 9, trained=False), 7)] == [1]
    assert [one.id for one in all_of(store)] == [before.id]


def test_a_reward_that_came_meanwhile_counts(store: RolloutStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look for old rollouts and their removal one of them may become what a version is trained on."""
    one, two = unguided(created=1.0), unguided(created=2.0)
    run(store.add([one, two]))
    publish(store, "sums")
    oldest = store._oldest
    loop: asyncio.AbstractEventLoop

    def slow(*given: object) -> list[tuple[int, float]]:
        found: list[tuple[int, float]] = oldest(*given)  # type: ignore[arg-type]
        give = store.add_rewards([GivenReward(two.id, 1.0)], owner=None, given_by="me")
        asyncio.run_coroutine_threadsafe(give, loop).result(20)
        return found

    async def pruned() -> Pruned:
        nonlocal loop
        loop = asyncio.get_running_loop()
        return await store.prune(Filters(created_before=9.0, trained=False), 5, owner=None)

    monkeypatch.setattr(store, "_oldest", slow)
    assert run(pruned()) == Pruned(1, 2.0, False)
    assert [r.id for r in all_of(store)] == [two.id]


# -- over HTTP


def critic_of(folder: Path, written: float) -> SimpleNamespace:
    """A critic that the server was started with, and of which the store knows nothing."""
    (folder / "critic.json").write_text("{}")
    os.utime(folder / "critic.json", (written, written))
    return SimpleNamespace(status=SimpleNamespace(path=str(folder)))


def ids(place: Served) -> set[str]:
    return {one.id for one in all_of(place.state.store)}


def test_the_admin_alone_deletes(store: RolloutStore) -> None:
    run(store.add([unguided(created=1.0, owner="ann")]))
    with serving(store) as place:
        for name in ("ann", "bob"):
            error_of(place.client(name).delete("/v1/rollouts", params={"created_before": 9}), 403)
        answer = place.client(ADMIN).delete("/v1/rollouts", params={"created_before": 9})
    assert answer.json() == {"object": "rollouts.deleted", "deleted": 1, "until": 1.0, "has_more": False}


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({}, "created_before"),
        ({"created_before": "yesterday"}, "created_before"),
        ({"created_before": "nan"}, "created_before"),
        ({"created_before": "-1"}, "created_before"),
        ({"created_before": "9", "limit": "0"}, "limit"),
        ({"created_before": "9", "limit": "1001"}, "limit"),
        ({"created_before": "9", "owner": ""}, "owner"),  # and not everybody's
        ({"created_before": "9", "owner": ","}, "owner"),
        ({"created_before": "9", "rewarded_by": ""}, "rewarded_by"),
        ({"created_before": "9", "even_trained": "perhaps"}, "even_trained"),
        ({"created_before": "9", "after": "rol_1"}, "after"),
        ({"created_before": "9", "rewarded_after": "-1"}, "rewarded_after"),
    ],
)
def test_a_wrong_query_deletes_nothing(store: RolloutStore, query: dict[str, str], param: str) -> None:
    run(store.add([unguided(created=1.0)]))
    with serving(store) as place:
        assert error_of(place.client(ADMIN).delete("/v1/rollouts", params=query), 400)["param"] == param
        assert len(ids(place)) == 1


def test_the_critics_that_this_server_was_started_with_count(store: RolloutStore, tmp_path: Path) -> None:
    old, young, late = (unguided(created=created) for created in (1.0, 3.0, 7.0))
    run(store.add([old, young, late]))
    run(store.add_rewards([GivenReward(one.id, 1.0) for one in (old, young)], owner=None, given_by="me"))
    with serving(store) as place:
        place.state.critics.catalog.critics["own@1"] = critic_of(tmp_path, 2.0)
        admin, query = place.client(ADMIN), {"created_before": 5}
        assert admin.get("/v1/rollouts/count", params={**query, "trained": "false"}).json()["count"] == 1
        assert admin.get("/v1/rollouts/count", params={**query, "trained": "true"}).json()["count"] == 1
        assert admin.delete("/v1/rollouts", params=query).json()["deleted"] == 1
        assert ids(place) == {old.id, late.id}
        (tmp_path / "critic.json").unlink()  # nobody knows when it was made
        assert admin.delete("/v1/rollouts", params=query).json()["deleted"] == 0
        assert admin.delete("/v1/rollouts", params={**query, "even_trained": "true"}).json()["deleted"] == 1
        assert ids(place) == {late.id}


def test_who_sees_its_own_alone_is_not_told_of_all_rewards(store: RolloutStore) -> None:
    one = unguided(owner="ann")
    run(store.add([one]))
    run(store.add_rewards([GivenReward(one.id, 1.0)], owner=None, given_by="me"))
    with serving(store) as place:
        answers = [place.client(name).get("/v1/rollouts/count").json() for name in ("ann", ADMIN)]
    assert [answer["last_reward"] for answer in answers] == [None, store.last_reward()]
    assert store.last_reward() > 0


# -- the command


def command(fake: FakeServer, *flags: str) -> int:
    return cli.main(["rollouts", "prune", "--url", fake.url, "--admin-key", "x", *flags])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten old rollouts of Ann's and five of Bob's, of which four may have trained a version; and three young ones."""
    prune_few = RolloutStore.prune
    monkeypatch.setattr(RolloutStore, "prune", lambda self, filters, limit, **who: prune_few(self, filters, 3, **who))
    now = time.time()
    old = [unguided(created=now - 40 * 86400 - i, owner="ann" if i < 10 else "bob") for i in range(15)]
    young = [unguided(created=now - 29 * 86400) for _ in range(3)]
    with fake_server.running(f"sqlite:///{tmp_path / 'r.db'}") as fake:
        store = fake.store
        run(store.add([*old, *young]))
        trained = [old[0], old[1], old[10], old[11]]
        run(store.add_rewards([GivenReward(one.id, 1.0) for one in trained], owner=None, given_by="me"))
        publish(store, "sums", active=True)
        assert command(fake, "--older-than", "30d", "--dry-run") == 0
        told = capsys.readouterr().out
        assert "11 rollouts" in told
        assert "4 older ones are kept" in told
        assert len(all_of(store)) == 18
        assert command(fake, "--older-than", "30d", "--owner", "ann", "--metadata", "task=other") == 0
        assert len(all_of(store)) == 18
        assert command(fake, "--older-than", "30d", "--owner", "ann") == 0
        assert "8 rollouts" in capsys.readouterr().out
        assert {one.id for one in all_of(store)} == {one.id for one in [*old[:2], *old[10:], *young]}
        assert command(fake, "--older-than", "4w", "--even-trained") == 0
        assert "10 rollouts" in capsys.readouterr().out  # the young ones are older than that
        assert all_of(store) == []


@pytest.mark.parametrize("text", ["30", "d", "-1d", "0d", "1.5h", "30 d", "1y", "", "٣d", "9999999d"])
def test_a_time_that_is_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["rollouts", "prune", f"--older-than={text}"])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "--older-than: must be a whole number" in told
    assert repr(text) in told


def test_times() -> None:
    assert [duration(text) for text in ("1m", "12h", "30d", "2w")] == [60, 43200, 2592000, 1209600]


def test_a_server_that_is_away(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["rollouts", "prune", "--older-than", "1d", "--url", "http://127.0.0.1:1"]) == 1
    assert "cannot be reached" in capsys.readouterr().err
