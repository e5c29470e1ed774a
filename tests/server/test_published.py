"""Decisions about critics reach all servers of a store, and those that start later."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from qsharp_core.errors import QSharpError, StoreError
from qsharp_core.wire.critics import ActivateRequest
from server.errors import ConflictError, NotFoundError
from server.store.critics import Activation, Desired, PublishedVersion
from server.store.rollouts import RolloutStore
from tests.support.critic_servers import Server, settled, version


@dataclass
class Fleet:
    """Servers of one store."""

    folder: Path
    store: RolloutStore
    servers: list[Server] = field(default_factory=list)

    async def start(self, *own: PublishedVersion, default: str | None = None) -> Server:
        """A server that was started with critics of its own."""
        server = Server(self.folder, self.store.critics)
        for one in own:
            await server.workers.load(one.location, one.name)
        await server.critics.refresh()
        await server.follower.settle()
        self.servers.append(server)
        return server

    async def load(self, server: Server, one: PublishedVersion, *, activate: bool = False) -> None:
        info = await server.critics.load(Path(one.location), one.name)
        await server.decisions.loaded(info, "ann", activate=activate)

    async def follow(self) -> None:
        for server in self.servers:
            await server.follower.settle()
        await settled()


class Request:
    """Uses a critic until it is told to have ended."""


@pytest.fixture
def fleet(url: str, tmp_path: Path) -> Iterator[Fleet]:
    store = RolloutStore(url)
    yield Fleet(tmp_path, store)
    store.close()


def test_a_decision_reaches_all_servers(fleet: Fleet) -> None:
    one, two, three = (version(fleet.folder, number) for number in "123")

    async def main() -> None:
        here, there = await fleet.start(), await fleet.start()
        await fleet.load(here, one)
        await fleet.load(here, two)
        await fleet.load(there, three, activate=True)
        await fleet.follow()
        wanted = ({"sums@1", "sums@2", "sums@3"}, {"sums": "sums@3"}, "sums")
        assert here.has == there.has == wanted
        assert (await there.decisions.roll_back("sums", "ann")).key == "sums@1"
        await here.decisions.unload("sums", "2", "ann")
        await fleet.follow()
        assert here.has == there.has == ({"sums@1", "sums@3"}, {"sums": "sums@1"}, "sums")
        late = await fleet.start()
        assert late.has == here.has
        with pytest.raises(ConflictError, match="no version of sums that was active before"):
            await late.decisions.roll_back("sums", "ann")

    asyncio.run(main())
    history = fleet.store.critics.history("sums")
    assert [(one.version, one.rolled_back, one.given_by) for one in history] == [
        ("1", False, "ann"), ("3", False, "ann"), ("1", True, "ann"),
    ]  # fmt: skip


def test_what_is_decided_at_one_can_be_gone_on_with_at_another_at_once(fleet: Fleet) -> None:
    """As a balancer does that sends each request of an admin to another server."""

    async def main() -> None:
        servers = [await fleet.start() for _ in range(random.randint(2, 4))]
        await fleet.load(servers[0], version(fleet.folder, "1"))
        await fleet.load(servers[0], version(fleet.folder, "2"))
        last = servers[-1]
        await last.decisions.activate("sums", ActivateRequest(version="2"), "ann")
        assert last.has == ({"sums@1", "sums@2"}, {"sums": "sums@2"}, "sums")
        late = Server(fleet.folder, fleet.store.critics)  # has not yet looked at the store
        assert (await late.decisions.roll_back("sums", "ann")).key == "sums@1"
        with pytest.raises(NotFoundError):
            await servers[1].decisions.activate("sums", ActivateRequest(version="3"), "ann")

    asyncio.run(main())


def test_a_server_meets_the_critic_that_a_request_names(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """And asks the store no more often than for what it does not have."""

    async def main() -> None:
        here, there = await fleet.start(), await fleet.start()
        await fleet.load(here, version(fleet.folder, "1"))
        name = random.choice(["sums", "sums@1"])
        await there.follower.meet(name)
        assert there.critics.catalog.resolve(name).key == "sums@1"
        looks = 0

        def look() -> Desired:
            nonlocal looks
            looks += 1
            return fleet.store.critics.desired()

        monkeypatch.setattr(there.follower, "_look", look)
        await there.follower.meet("sums@1")
        await there.follower.meet("sums")
        assert looks == 0
        await there.follower.meet("other")
        assert looks == 1

    asyncio.run(main())


def test_a_roll_back_finds_what_the_servers_were_started_with(fleet: Fleet) -> None:
    one, two, other = version(fleet.folder, "1"), version(fleet.folder, "2"), version(fleet.folder, "1", "other")

    async def main() -> None:
        here, there = await fleet.start(other, one), await fleet.start(other, one)
        await fleet.load(here, two, activate=True)
        await fleet.follow()
        assert there.has == ({"sums@1", "sums@2", "other@1"}, {"sums": "sums@2", "other": "other@1"}, "other")
        await there.decisions.roll_back("sums", "ann")
        await fleet.follow()
        assert (
            here.has == there.has == ({"sums@1", "sums@2", "other@1"}, {"sums": "sums@1", "other": "other@1"}, "other")
        )

    asyncio.run(main())


def test_a_loaded_version_beside_the_own_one_stays_inactive(fleet: Fleet) -> None:
    async def main() -> None:
        here = await fleet.start(version(fleet.folder, "1"))
        await fleet.load(here, version(fleet.folder, "2"))
        assert here.has == ({"sums@1", "sums@2"}, {"sums": "sums@1"}, "sums")

    asyncio.run(main())


def test_the_default_is_everywhere_the_same_and_stays(fleet: Fleet) -> None:
    one, other = version(fleet.folder, "1"), version(fleet.folder, "1", "other")

    async def main() -> None:
        here, there = await fleet.start(), await fleet.start()
        await fleet.load(here, one)
        await fleet.load(there, other)
        await fleet.follow()
        assert (here.has[2], there.has[2]) == ("sums", "sums")
        await there.decisions.activate("other", ActivateRequest(version="1", default=True), "ann")
        await here.decisions.unload("other", "1", "ann")
        await fleet.follow()
        late = await fleet.start()
        for server in (here, there, late):
            assert server.has == ({"sums@1"}, {"sums": "sums@1"}, "other")

    asyncio.run(main())


def test_own_versions_can_go_without_the_store(fleet: Fleet) -> None:
    """A version that the store does not know is unloaded here alone, and there is nothing to follow."""

    async def main() -> None:
        here = await fleet.start(version(fleet.folder, "1"))
        there = await fleet.start(version(fleet.folder, "1"), version(fleet.folder, "2"))
        await fleet.load(here, version(fleet.folder, "3"))
        await fleet.follow()
        await there.decisions.unload("sums", "2", "ann")
        await fleet.follow()
        assert here.has == there.has == ({"sums@1", "sums@3"}, {"sums": "sums@1"}, "sums")

    asyncio.run(main())


def test_an_own_version_that_is_unloaded_stays_away(fleet: Fleet) -> None:
    """The store knows nothing of its name, and has nothing to be followed."""
    one, two = version(fleet.folder, "1"), version(fleet.folder, "2")

    async def main() -> None:
        here, there = await fleet.start(one, two), await fleet.start(one, two)
        await there.decisions.unload("sums", "2", "ann")
        for _ in range(3):
            await fleet.follow()
        assert there.has == ({"sums@1"}, {"sums": "sums@1"}, "sums")
        assert fleet.store.critics.desired() == Desired()
        with pytest.raises(ConflictError, match="sums@1 is active: a share"):
            await here.decisions.activate("sums", ActivateRequest(version="1", share=0.5), "ann")

    asyncio.run(main())


def test_a_half_done_adoption_is_done_again(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store ends after a version was published and before it was noted that it is active."""
    one, two = version(fleet.folder, "1"), version(fleet.folder, "2")

    async def away(_: Activation) -> None:
        raise StoreError("away")

    async def main() -> None:
        here = await fleet.start(one)
        with monkeypatch.context() as patch:
            patch.setattr(fleet.store.critics, "activate", away)
            with pytest.raises(StoreError):
                await fleet.load(here, two)
        await fleet.follow()
        await fleet.load(here, two)
        await fleet.follow()
        assert here.has == ({"sums@1", "sums@2"}, {"sums": "sums@1"}, "sums")
        await here.decisions.activate("sums", ActivateRequest(version="2"), "ann")
        assert (await here.decisions.roll_back("sums", "ann")).key == "sums@1"

    asyncio.run(main())


def test_what_cannot_be_published_is_not_kept(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = version(fleet.folder, "1"), version(fleet.folder, "2")
    changed = version(fleet.folder / "copy", "1", content="y")

    async def away(_: PublishedVersion) -> None:
        raise StoreError("away")

    async def main() -> None:
        here, there = await fleet.start(), await fleet.start()
        await fleet.load(here, one)
        with monkeypatch.context() as patch:
            patch.setattr(fleet.store.critics, "publish", away)
            with pytest.raises(StoreError):
                await fleet.load(here, two)
        await settled()
        assert here.has[0] == {"sums@1"}
        await fleet.load(here, two)  # it may be tried again
        # The other server has not followed yet, and its admin loads other files under the same name and version.
        with pytest.raises(ConflictError, match="published with other files"):
            await fleet.load(there, changed)
        await settled()
        there.follower._again.clear()  # as if the time had passed
        await fleet.follow()
        assert here.has == there.has == ({"sums@1", "sums@2"}, {"sums": "sums@1"}, "sums")

    asyncio.run(main())


def test_a_server_that_cannot_have_what_is_active_says_so(fleet: Fleet) -> None:
    one, two = version(fleet.folder, "1"), version(fleet.folder, "2")

    async def main() -> None:
        here, there = await fleet.start(), await fleet.start()
        await fleet.load(here, one)
        await fleet.follow()
        there.critics.roots.folders = []
        await fleet.load(here, two, activate=True)
        await fleet.follow()
        assert (here.critics.catalog.active, there.critics.catalog.active) == ({"sums": "sums@2"}, {"sums": "sums@1"})
        assert "--critic-root" in there.follower.problems["sums@2"]
        with pytest.raises(NotFoundError):
            await there.decisions.activate("sums", ActivateRequest(version="2"), "ann")
        await there.decisions.roll_back("sums", "ann")
        await there.decisions.unload("sums", "2", "ann")  # for the others
        await fleet.follow()
        assert here.has == there.has == ({"sums@1"}, {"sums": "sums@1"}, "sums")
        assert there.follower.problems == {}


def test_a_version_that_is_wanted_again_while_it_leaves_can_be_unloaded(fleet: Fleet) -> None:
    one, two = version(fleet.folder, "1"), version(fleet.folder, "2")

    async def main() -> None:
        here, there = await fleet.start(), await fleet.start()
        await fleet.load(here, one)
        await fleet.load(here, two)
        await fleet.follow()
        ended = here.critics.catalog.critics["sums@2"].lease(request := Request())
        await there.decisions.unload("sums", "2", "ann")
        await fleet.follow()
        await fleet.load(there, two)
        await here.follower.catch_up()
        assert here.critics.catalog.critics["sums@2"].leaving
        with pytest.raises(ConflictError, match="is active"):
            await here.decisions.unload("sums", "1", "ann")
        await here.decisions.unload("sums", "2", "ann")
        await here.decisions.unload("sums", "1", "ann")
        ended()
        del request
        await fleet.follow()
        assert here.has[:2] == there.has[:2] == (set(), {})

    asyncio.run(main())

    asyncio.run(main())


def test_a_trial_takes_its_share_everywhere_and_ends_with_a_decision(fleet: Fleet) -> None:
    """The same users on all servers, more of them when the share grows, and none when it has ended."""
    one, two = version(fleet.folder, "1"), version(fleet.folder, "2")
    users = [f"user {i}" for i in range(2000)]

    async def main() -> None:
        here, there = await fleet.start(), await fleet.start()

        def tried() -> set[str]:
            taken = [{u for u in users if s.critics.catalog.resolve("sums", u).key == "sums@2"} for s in fleet.servers]
            assert all(each == taken[0] for each in taken)
            return taken[0]

        async def decide(server: Server, version: str, share: float) -> None:
            await server.decisions.activate("sums", ActivateRequest(version=version, share=share, why="see"), "ann")
            await fleet.follow()

        await fleet.load(here, one)
        await fleet.load(here, two)
        await fleet.follow()
        with pytest.raises(ConflictError, match="sums@1 is active"):
            await decide(here, "1", 0.5)
        before: set[str] = set()
        for share in (0.1, 0.3, 0.8):
            await decide(there, "2", share)
            assert before <= tried()
            before = tried()
            assert abs(len(before) / len(users) - share) < 4 * (share * (1 - share) / len(users)) ** 0.5
            shown = {info.version: here.critics.catalog.describe(info).share for info in here.critics.versions("sums")}
            assert shown == {"1": 1 - share, "2": share}
        assert here.critics.catalog.resolve("sums").key == "sums@1"  # nobody in particular
        assert here.critics.catalog.resolve("sums@1", min(before)).key == "sums@1"
        assert here.critics.catalog.resolve(None, min(before)).key == "sums@2"
        late = await fleet.start()
        assert late.critics.catalog.trials == here.critics.catalog.trials
        for number, share in (("2", 0.0), ("2", 0.5), ("1", 1.0), ("2", 0.5)):
            await decide(there, number, share)
            assert bool(tried()) == (share == 0.5)
        await decide(there, "2", 1)
        assert tried() == set(users)
        await decide(there, "1", 0.5)
        await there.decisions.unload("sums", "1", "ann")
        await fleet.follow()
        assert tried() == set(users)

    asyncio.run(main())
    assert {one.why for one in fleet.store.critics.history("sums")} == {None, "see", "it is unloaded"}


def body(one: PublishedVersion, dice: random.Random) -> ActivateRequest:
    share = dice.choice([0.0, 0.3, 1.0, 1.0])
    return ActivateRequest(version=one.version, default=dice.random() < 0.3, share=share)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_decided_all_servers_end_with_the_same(fleet: Fleet, seed: int) -> None:
    """Admins of three servers at once, one of which ends and starts again."""
    dice = random.Random(seed)
    folders = [version(fleet.folder, number, name) for name in ("sums", "other") for number in "123"]

    async def act(server: Server, dice: random.Random) -> None:
        one = dice.choice(folders)
        act: Callable[[], Awaitable[object]] = dice.choice(
            [
                lambda: fleet.load(server, one, activate=dice.random() < 0.5),
                lambda: server.decisions.activate(one.name, body(one, dice), "ann"),
                lambda: server.decisions.roll_back(one.name, "ann"),
                lambda: server.decisions.unload(one.name, one.version, "ann"),
                server.follower.catch_up,
            ]
        )
        with suppress(QSharpError):  # what does not fit
            await act()

    async def admin(place: int, dice: random.Random) -> None:
        for _ in range(12):
            await act(fleet.servers[place], dice)
            await asyncio.sleep(0)

    async def main() -> None:
        for _ in range(3):
            await fleet.start()
        await asyncio.gather(*(admin(place, random.Random(dice.random())) for place in range(3)))
        await fleet.start()
        for _ in range(3):
            await fleet.follow()
        first, *others = fleet.servers
        wanted = fleet.store.critics.desired()
        for server in (first, *others):
            assert server.follower.problems == {}
            loaded, active, default = server.has
            assert loaded == set(wanted.versions)
            assert active == {name: f"{name}@{number}" for name, number in wanted.active.items()}
            trials = {name: (trial.key, trial.share) for name, trial in server.critics.catalog.trials.items()}
            assert trials == {name: (f"{name}@{v}", share) for name, (v, share) in wanted.trials.items()}
            assert default == (wanted.default if wanted.default is not None else default)

    asyncio.run(main())
