"""A server follows what the store says that all servers are to have."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from qsharp_core.critic.digest import digest
from qsharp_core.errors import CriticError, StoreError
from qsharp_core.wire.critics import CriticStatus
from server.critics.following import Follower
from server.critics.loaded import LoadedCritics
from server.critics.roots import CriticRoots
from server.store.critics import Desired, PublishedVersion


class Engine:
    """Stands for the workers: what they have loaded, and which versions are active."""

    def __init__(self) -> None:
        self.loaded: dict[str, CriticStatus] = {}
        self.active: dict[str, str] = {}
        self.loads = 0

    async def load(self, path: str, name: str | None) -> str:
        self.loads += 1
        version = Path(path).name
        assert name is not None
        status = CriticStatus(
            name=name, version=version, path=path, active=False, leaving=False, users=0, max_length=8, native=True,
            reward_range=(0, 1), kv_blocks=None, kv_blocks_used=None, card={},
        )  # fmt: skip
        self.loaded[status.key] = status
        self.active.setdefault(name, version)
        return status.key

    async def activate(self, key: str) -> None:
        name, _, version = key.partition("@")
        self.active[name] = version

    async def unload(self, key: str) -> None:
        name, _, version = key.partition("@")
        del self.loaded[key]
        if self.active.get(name) == version:
            del self.active[name]

    async def describe(self) -> list[CriticStatus]:
        return [
            one.model_copy(update={"active": self.active.get(one.name) == one.version}) for one in self.loaded.values()
        ]


class Server:
    """A server whose engine is `Engine`."""

    def __init__(self, folder: Path) -> None:
        self.wanted: Desired | Exception = Desired()
        self.workers = Engine()
        engine: Any = self.workers
        self.critics = LoadedCritics(engine, CriticRoots([folder]))
        self.follower = Follower(self.critics, self.look)

    def look(self) -> Desired:
        if isinstance(self.wanted, Exception):
            raise self.wanted
        return self.wanted

    def catch_up(self) -> None:
        async def done() -> None:
            await self.follower.settle()
            for _ in range(5):
                await asyncio.sleep(0)  # what was begun in the background

        asyncio.run(done())


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


def version(folder: Path, number: str, name: str = "sums", content: str = "x") -> PublishedVersion:
    path = folder / name / number
    path.mkdir(parents=True, exist_ok=True)
    (path / "critic.json").write_text(content)
    return PublishedVersion(name, number, str(path), digest(path), {}, None, "ann")


def desired(*versions: PublishedVersion, default: str | None = None, **active: str) -> Desired:
    return Desired({one.key: one for one in versions}, active, {}, default)


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


def test_other_files_under_a_wanted_name_are_not_activated(server: Server, tmp_path: Path) -> None:
    """A server that was started with files of its own, under the name and version of published ones."""
    own = version(tmp_path / "own", "2", content="y")
    asyncio.run(server.workers.load(str(tmp_path / "own" / "1"), "sums"))
    asyncio.run(server.workers.load(own.location, "sums"))
    asyncio.run(server.critics.refresh())
    server.wanted = desired(version(tmp_path, "2"), sums="2")
    server.catch_up()
    assert "not those that were published" in server.follower.problems["sums@2"]
    assert server.critics.catalog.active == {"sums": "sums@1"}


def test_a_slow_load_holds_up_no_activation(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, slow = version(tmp_path, "1"), version(tmp_path, "2"), version(tmp_path, "3")
    server.wanted = desired(one, two, sums="1")
    server.catch_up()
    load = server.workers.load

    async def main() -> None:
        released = asyncio.Event()

        async def slowly(path: str, name: str | None) -> str:
            await released.wait()
            return await load(path, name)

        monkeypatch.setattr(server.workers, "load", slowly)
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
    server.catch_up()
    assert server.critics.catalog.active == {"sums": "sums@2"}
    assert server.follower.problems == {}
