"""A server follows what the store says that all servers are to have."""

import asyncio
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qsharp_core.critic.digest import digest
from qsharp_core.critic.fetching import FetchOrder
from qsharp_core.errors import CriticError, StoreError
from qsharp_core.locations import RemoteFolder
from server.critics.loaded import MOST_FETCHES, Fetching
from server.store.critics import Desired, PublishedVersion
from server.store.rollouts import RolloutStore
from tests.support.critic_servers import Server, settled, version
from tests.support.object_store import Store, object_store


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


def desired(*versions: PublishedVersion, default: str | None = None, **active: str) -> Desired:
    return Desired({one.key: one for one in versions}, active, {}, default)


def held_back(server: Server, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """From now on loads wait for this."""
    released, load = asyncio.Event(), server.workers.load

    async def slowly(path: str, name: str | None) -> str:
        await released.wait()
        return await load(path, name)

    monkeypatch.setattr(server.workers, "load", slowly)
    return released


def test_it_loads_activates_and_unloads(server: Server, tmp_path: Path) -> None:
    one, two, other = version(tmp_path, "1"), version(tmp_path, "2"), version(tmp_path, "1", "other")
    server.wanted = desired(one, two, other, sums="2", other="1", default="other")
    server.catch_up()
    assert server.critics.catalog.active == {"sums": "sums@2", "other": "other@1"}
    assert server.critics.catalog.default == "other"
    server.wanted = desired(one, sums="1", default="sums")
    server.catch_up()
    assert set(server.workers.loaded) == {"sums@1"}
    assert server.critics.catalog.resolve(None).key == "sums@1"
    assert server.follower.problems == {}
    server.catch_up()
    assert server.workers.loads == 3


def test_what_this_server_has_of_its_own_stays(server: Server, tmp_path: Path) -> None:
    asyncio.run(server.workers.load(str(tmp_path / "1"), "mine"))
    asyncio.run(server.critics.refresh())
    server.wanted = desired(version(tmp_path, "1"), sums="1")
    server.catch_up()
    server.wanted = desired()
    server.catch_up()
    assert set(server.workers.loaded) == {"mine@1"}


def test_files_that_are_not_the_published_ones_are_not_loaded(server: Server, tmp_path: Path) -> None:
    one, two = version(tmp_path, "1"), version(tmp_path, "2")
    (tmp_path / "sums" / "1" / "critic.json").write_text("changed")
    server.wanted = desired(one, two, sums="2")
    server.catch_up()
    assert "not those that were published" in server.follower.problems["sums@1"]
    assert server.critics.catalog.active == {"sums": "sums@2"}  # the others go on
    (tmp_path / "sums" / "1" / "critic.json").write_text("x")
    server.catch_up()
    assert "sums@1" in server.follower.problems  # it is not read again each second
    server.follower._again.clear()  # as if the time had passed
    server.catch_up()
    assert server.follower.problems == {}
    assert set(server.workers.loaded) == {"sums@1", "sums@2"}


@pytest.mark.parametrize("there", [True, False])
def test_other_files_under_a_wanted_name_guide_nobody(server: Server, tmp_path: Path, there: bool) -> None:
    """A server that was started with files of its own, under the name and version of published ones."""
    own = version(tmp_path / "own", "2", content="y")
    asyncio.run(server.workers.load(own.location, "sums"))
    asyncio.run(server.critics.refresh())
    wanted = version(tmp_path, "2")
    if not there:
        (Path(wanted.location) / "critic.json").write_text("z")
    server.wanted = desired(wanted, sums="2")
    server.catch_up()
    assert [one.path for one in server.workers.loaded.values()] == ([wanted.location] if there else [])
    assert server.critics.catalog.active == ({"sums": "sums@2"} if there else {})
    assert ("sums@2" in server.follower.problems) != there


def test_a_version_that_is_dropped_while_it_loads_leaves(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = version(tmp_path, "1")

    async def main() -> None:
        released = held_back(server, monkeypatch)
        server.wanted = desired(slow, sums="1")
        await server.follower.catch_up()
        await asyncio.sleep(0.05)
        server.wanted = desired()
        for _ in range(2):
            await server.follower.catch_up()
        released.set()
        await asyncio.sleep(0.05)
        for _ in range(2):
            await server.follower.catch_up()
        await settled()

    asyncio.run(main())
    assert server.has[:2] == (set(), {})
    assert server.workers.loads == 1


def test_a_slow_load_holds_up_no_activation(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, slow = version(tmp_path, "1"), version(tmp_path, "2"), version(tmp_path, "3")
    server.wanted = desired(one, two, sums="1")
    server.catch_up()

    async def main() -> None:
        released = held_back(server, monkeypatch)
        server.wanted = desired(one, two, slow, sums="2")
        await server.follower.catch_up()
        await server.follower.catch_up()
        assert server.critics.catalog.active == {"sums": "sums@2"}
        released.set()
        await server.follower.settle()

    asyncio.run(main())
    assert set(server.workers.loaded) == {"sums@1", "sums@2", "sums@3"}
    assert server.workers.loads == 3


def test_a_place_that_it_may_not_load_from_is_a_problem(server: Server, tmp_path: Path) -> None:
    server.critics.roots.folders = [tmp_path / "elsewhere"]
    server.wanted = desired(version(tmp_path, "1"), sums="1")
    server.catch_up()
    assert "--critic-root" in server.follower.problems["sums@1"]
    assert server.workers.loads == 0
    server.wanted = desired()
    server.catch_up()
    assert server.follower.problems == {}


def test_a_store_that_is_away_changes_nothing(server: Server, tmp_path: Path) -> None:
    server.wanted = desired(version(tmp_path, "1"), sums="1")
    server.catch_up()
    server.wanted = StoreError("away")
    with pytest.raises(StoreError):
        server.catch_up()
    assert server.critics.catalog.active == {"sums": "sums@1"}


def test_a_failed_activation_is_a_problem(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(_: str) -> None:
        raise CriticError("no")

    one, two = version(tmp_path, "1"), version(tmp_path, "2")
    server.wanted = desired(one, two, sums="1")
    server.catch_up()
    with monkeypatch.context() as patch:
        patch.setattr(server.workers, "activate", fails)
        server.wanted = desired(one, two, sums="2")
        server.catch_up()
        assert server.follower.problems == {"sums@2": "no"}
        server.wanted = desired(one, two, sums="1")  # rolled back: there is nothing to be missed any more
        server.catch_up()
        assert server.follower.problems == {}
    server.wanted = desired(one, two, sums="2")
    server.catch_up()
    assert server.critics.catalog.active == {"sums": "sums@2"}
    assert server.follower.problems == {}


def test_a_fault_ends_nothing_and_is_told(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that nobody thought of."""

    async def fails(_: str, __: str | None) -> str:
        raise ZeroDivisionError

    server.wanted = desired(version(tmp_path, "1"), sums="1")
    with monkeypatch.context() as patch:
        patch.setattr(server.workers, "load", fails)
        server.catch_up()
        assert server.follower.problems == {"sums@1": "ZeroDivisionError()"}
    server.follower._again.clear()  # as if the time had passed

    async def main() -> None:
        good, server.wanted = server.wanted, ValueError("a fault")
        following = asyncio.create_task(server.follower.follow())
        await asyncio.sleep(0.05)
        server.wanted = good
        while not server.workers.loaded:
            await asyncio.sleep(0.01)
        following.cancel()

    monkeypatch.setattr("server.critics.following.SECONDS", 0.01)
    asyncio.run(main())
    server.catch_up()
    assert server.follower.problems == {}


# -- versions in an object store


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with object_store() as made:
        yield made


def uploaded(store: Store, tmp_path: Path, number: str, content: str = "") -> PublishedVersion:
    folder = tmp_path / "made" / number
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "critic.json").write_text(f'{{"version": "{number}"}}{content}')
    there = store.upload(folder, store.root / "sums" / number)
    return PublishedVersion("sums", number, str(there), digest(folder), {}, None, "ann")


def test_versions_at_urls_are_fetched_and_loaded(store: Store, tmp_path: Path) -> None:
    one, two = uploaded(store, tmp_path, "1"), uploaded(store, tmp_path, "2")
    server = Server(tmp_path, remote=store.root)
    server.wanted = desired(one, two, sums="2", default="sums")
    server.catch_up()
    assert server.follower.problems == {}
    assert server.has == ({"sums@1", "sums@2"}, {"sums": "sums@2"}, "sums")
    info = server.critics.catalog.critics["sums@2"]
    assert info.status.path == str(tmp_path / "cache" / two.digest)
    assert server.critics.catalog.describe(info).path == two.location
    store.remove(store.root)  # what is in the cache needs no store
    again = Server(tmp_path, remote=store.root)
    again.wanted = server.wanted
    again.catch_up()
    assert again.has == server.has


def test_what_cannot_be_fetched_is_a_problem_and_is_tried_again(store: Store, tmp_path: Path) -> None:
    good, changed = uploaded(store, tmp_path, "1"), uploaded(store, tmp_path, "2")
    gone, elsewhere = (
        # A digest of its own: the cache holds that of version 2 as soon as that is there.
        changed._replace(version="3", location=f"{store.root}/sums/3", digest="0" * 64),
        good._replace(version="4", location=f"{store.root}-evil/sums/1"),
    )
    uploaded(store, tmp_path, "2", content=" ")
    server = Server(tmp_path, remote=store.root)
    server.wanted = desired(good, changed, gone, elsewhere, sums="1")
    server.catch_up()
    assert server.has == ({"sums@1"}, {"sums": "sums@1"}, "sums")
    assert server.follower.problems.keys() == {"sums@2", "sums@3", "sums@4"}
    assert "not those that were published" in server.follower.problems["sums@2"]
    assert "has no critic.json" in server.follower.problems["sums@3"]
    assert "--critic-root URL" in server.follower.problems["sums@4"]
    uploaded(store, tmp_path, "2")
    server.follower._again.clear()  # as if the time had passed
    server.catch_up()
    assert server.follower.problems.keys() == {"sums@3", "sums@4"}
    assert server.has[0] == {"sums@1", "sums@2"}


def test_a_store_that_hangs_holds_up_nobody(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop goes on while a download waits for a server that never answers; it ends with the server."""
    good = version(tmp_path, "1")
    slow = good._replace(version="2", location=f"{store.root}/sums/2", digest="0" * 64)
    server = Server(tmp_path, remote=store.root)

    async def main() -> None:
        server.wanted = desired(good, slow, sums="1")
        longest, last = 0.0, time.monotonic()
        following = asyncio.create_task(server.follower.follow())
        while time.monotonic() < began + 8 and "sums@2" not in server.follower.problems:
            await asyncio.sleep(0.02)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        assert longest < 1  # seconds
        assert server.has == ({"sums@1"}, {"sums": "sums@1"}, "sums")
        following.cancel()
        await asyncio.gather(*server.follower._getting.values(), return_exceptions=True)

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        server.critics.fetching = Fetching(cache=tmp_path / "cache", seconds=4)
        began = time.monotonic()
        asyncio.run(main())
    assert "was given up" in server.follower.problems["sums@2"]


def test_what_is_loaded_from_a_url_is_published_with_it(store: Store, tmp_path: Path) -> None:
    one = uploaded(store, tmp_path, "1")
    records = RolloutStore(f"sqlite:///{tmp_path / 'rollouts.db'}")
    here, there = (Server(tmp_path / name, records.critics, store.root) for name in ("here", "there"))

    async def main() -> None:
        location = here.critics.roots.admit(one.location)
        info = await here.critics.load(await here.critics.on_disk(location), "sums", location)
        await here.decisions.loaded(info, "ann", activate=True)
        await there.follower.settle()
        await settled()

    asyncio.run(main())
    assert here.has == there.has == ({"sums@1"}, {"sums": "sums@1"}, "sums")
    published = records.critics.desired().versions["sums@1"]
    assert (published.location, published.digest) == (one.location, one.digest)
    records.close()


def test_few_versions_are_fetched_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[str] = []
    at_once: list[int] = []

    async def fetch(order: FetchOrder, _: float) -> Path:
        running.append(order.url)
        at_once.append(len(running))
        await asyncio.sleep(0.01)
        running.remove(order.url)
        return tmp_path / "sums" / order.url.rpartition("/")[2]

    monkeypatch.setattr("server.critics.loaded.fetched_apart", fetch)
    remote = RemoteFolder("s3", ("bucket",))
    server = Server(tmp_path, remote=remote)
    made = [version(tmp_path, str(number)) for number in range(MOST_FETCHES + 2)]
    server.wanted = desired(*(one._replace(location=str(remote / one.version)) for one in made))
    server.catch_up()
    assert server.follower.problems == {}
    assert len(server.workers.loaded) == len(at_once) == MOST_FETCHES + 2
    assert max(at_once) == MOST_FETCHES
