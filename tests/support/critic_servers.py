"""Servers without engines: the real catalog, follower and decisions, above a dictionary of what is loaded."""

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from qsharp_core.critic.digest import digest
from qsharp_core.errors import CriticError
from qsharp_core.locations import RemoteFolder
from qsharp_core.wire.critics import CriticStatus
from server.critics.following import Follower
from server.critics.loaded import Fetching, LoadedCritics
from server.critics.published import SharedDecisions
from server.critics.roots import CriticRoots
from server.store.critics import CriticRecords, Desired, PublishedVersion


class Engine:
    """Stands for the workers: what they have loaded, and which versions are active."""

    def __init__(self) -> None:
        self.loaded: dict[str, CriticStatus] = {}
        self.active: dict[str, str] = {}
        self.loads = 0

    async def load(self, path: str, name: str | None) -> str:
        self.loads += 1
        folder = Path(path)
        # A fetched one's folder has the name of its digest.
        version = folder.name if len(folder.name) < 64 else json.loads((folder / "critic.json").read_text())["version"]
        assert name is not None
        status = CriticStatus(
            name=name, version=version, path=path, active=False, leaving=False, users=0, max_length=8, native=True,
            reward_range=(0, 1), kv_blocks=None, kv_blocks_used=None, card={},
        )  # fmt: skip
        if status.key in self.loaded:
            raise CriticError(f"{status.key} is loaded")
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
    """A server whose engine is `Engine`.

    Args:
        folder: critics may be loaded from under it.
        records: of the store that it shares with others; without them it follows `wanted`.
        remote: they may be loaded from under it, too, into a cache below `folder`.
    """

    def __init__(self, folder: Path, records: CriticRecords | None = None, remote: RemoteFolder | None = None) -> None:
        self.wanted: Desired | Exception = Desired()
        self.workers = Engine()
        engine: Any = self.workers
        roots = CriticRoots([folder] if remote is None else [folder, remote])
        self.critics = LoadedCritics(engine, roots, Fetching(cache=folder / "cache"))
        if records is None:
            self.follower = Follower(self.critics, self.look, regularly)
        else:
            self.follower = Follower(self.critics, records.desired, records.changes)
            self.decisions = SharedDecisions(self.critics, records, self.follower)

    def look(self) -> Desired:
        if isinstance(self.wanted, Exception):
            raise self.wanted
        return self.wanted

    def catch_up(self) -> None:
        async def done() -> None:
            await self.follower.settle()
            await settled()

        asyncio.run(done())

    @property
    def has(self) -> tuple[set[str], dict[str, str], str | None]:
        """What is loaded, which versions are active, and the default."""
        return set(self.workers.loaded), self.critics.catalog.active, self.critics.catalog.default


async def regularly(seconds: float) -> AsyncGenerator[None]:
    while True:
        yield
        await asyncio.sleep(seconds)


async def settled() -> None:
    """Lets what was begun in the background end."""
    for _ in range(10):
        await asyncio.sleep(0)


def version(folder: Path, number: str, name: str = "sums", content: str = "x") -> PublishedVersion:
    """A critic's folder, as it is published."""
    path = folder / name / number
    path.mkdir(parents=True, exist_ok=True)
    (path / "critic.json").write_text(content)
    return PublishedVersion(name, number, str(path), digest(path), {}, None, "ann")
