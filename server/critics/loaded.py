"""The critics that this server has loaded, and what changes them: the admin's routes, and the store that it follows."""

import asyncio
import logging
from dataclasses import dataclass, field
from pathlib import Path

from qsharp_core.critic.fetching import FetchOrder, default_cache, fetched_apart
from qsharp_core.critic.folder import DEFAULT_MAX_BYTES
from qsharp_core.errors import QSharpError
from qsharp_core.locations import Location
from server import metrics
from server.critics.catalog import CriticCatalog, CriticInfo
from server.critics.roots import CriticRoots
from server.critics.workers import Workers
from server.errors import ConflictError, NotFoundError

logger = logging.getLogger("vllm.qsharp")
MOST_FETCHES = 8
"""Versions that are fetched at once; others wait."""


@dataclass(frozen=True)
class Fetching:
    """How versions at URLs are fetched.

    Attributes:
        cache: folder on this machine's disk.
        max_bytes: that a version may have.
        seconds: after which a download is given up.
    """

    cache: Path = field(default_factory=default_cache)
    max_bytes: int = DEFAULT_MAX_BYTES
    seconds: float = 600.0


@dataclass
class LoadedCritics:
    """What this server has.

    Attributes:
        workers: of the engine.
        roots: where critics may be loaded from over HTTP.
        fetching: how those at URLs are fetched.
        catalog: what the workers have loaded, and who uses it.
        changing: held while a version is activated or unloaded: what was checked must still hold then.
    """

    workers: Workers
    roots: CriticRoots
    fetching: Fetching = field(default_factory=Fetching)
    catalog: CriticCatalog = field(default_factory=CriticCatalog)
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    _fetches: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MOST_FETCHES))
    _unloading: dict[str, "asyncio.Task[None]"] = field(default_factory=dict)

    def versions(self, name: str) -> list[CriticInfo]:
        """All versions of a name.

        Raises:
            NotFoundError: none is loaded.
        """
        versions = self.catalog.versions(name)
        if not versions:
            raise NotFoundError(f"critic {name!r} is not loaded")
        return versions

    def version(self, name: str, version: str) -> CriticInfo:
        """A version that can be used.

        Raises:
            NotFoundError: it is not loaded.
            ConflictError: it is being unloaded.
        """
        info = self.catalog.critics.get(f"{name}@{version}")
        if info is None:
            raise NotFoundError(f"critic {name}@{version} is not loaded")
        if info.leaving:
            raise ConflictError(f"{info.key} is being unloaded: {info.in_flight} requests still use it")
        return info

    async def refresh(self) -> None:
        """Asks the workers which critics are loaded, and updates the catalog and the metrics."""
        gone = self.catalog.refresh(await self.workers.describe())
        metrics.show_critics(self.catalog.critics, gone, self.catalog.active.values())

    async def on_disk(self, location: Location, digest: str | None = None) -> Path:
        """The folder on this machine's disk: the one itself, or a copy of what is at a URL.

        Args:
            location: it may be loaded from there.
            digest: that what is at a URL must have; None: any.

        Raises:
            CriticError: it cannot be fetched; the message says why.
        """
        if isinstance(location, Path):
            return location
        how = self.fetching
        order = FetchOrder(url=str(location), cache=how.cache, max_bytes=how.max_bytes, digest=digest)
        async with self._fetches:
            return await fetched_apart(order, how.seconds)

    async def load(self, folder: Path, name: str | None, location: Location | None = None) -> CriticInfo:
        """Loads a critic beside the running engine.

        Args:
            folder: on this machine's disk.
            name: replaces the one in its card.
            location: where the folder is from, if it is a copy.

        Raises:
            ConflictError: it was unloaded at once.
        """
        key = await self.workers.load(str(folder), name)
        await self.refresh()
        info = self.catalog.critics.get(key)
        if info is None:
            raise ConflictError(f"{key} was loaded, and has been unloaded since")
        info.source = None if location in (None, folder) else str(location)
        return info

    async def activate(self, info: CriticInfo) -> None:
        """Makes a version the one that its name means; `changing` is held."""
        previous = self.catalog.active.get(info.name)
        await self.workers.activate(info.key)
        await self.refresh()
        self.catalog.activated(info.name, previous)

    async def _unload(self, info: CriticInfo) -> None:
        """Frees a version that has left the catalog, when the requests that were admitted with it have ended."""
        await info.idle.wait()  # until then they may reach the worker
        await self.workers.unload(info.key)
        await self.refresh()

    def leave(self, info: CriticInfo) -> None:
        """No new request gets a version from now on; it is unloaded in the background, and what fails is logged."""
        self.catalog.leave(info)
        task = asyncio.create_task(self._unload(info))
        self._unloading[info.key] = task
        task.add_done_callback(lambda task: self._ended(info, task))

    def unloading(self, info: CriticInfo) -> "asyncio.Task[None] | None":
        """What unloads this version; None if nothing does."""
        return self._unloading.get(info.key)

    def _ended(self, info: CriticInfo, task: "asyncio.Task[None]") -> None:
        if self._unloading.get(info.key) is task:
            del self._unloading[info.key]
        if not task.cancelled() and isinstance(error := task.exception(), QSharpError):
            logger.error("unloading a critic failed: %s", error)
