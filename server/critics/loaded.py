"""The critics that this server has loaded, and what changes them: the admin's routes, and the store that it follows."""

import asyncio
import logging
from dataclasses import dataclass, field
from pathlib import Path

from qsharp_core.errors import QSharpError
from server import metrics
from server.critics.catalog import CriticCatalog, CriticInfo
from server.critics.roots import CriticRoots
from server.critics.workers import Workers
from server.errors import ConflictError

logger = logging.getLogger("vllm.qsharp")


@dataclass
class LoadedCritics:
    """What this server has.

    Attributes:
        workers: of the engine.
        roots: where critics may be loaded from over HTTP.
        catalog: what the workers have loaded, and who uses it.
        changing: held while a version is activated or unloaded: what was checked must still hold then.
    """

    workers: Workers
    roots: CriticRoots
    catalog: CriticCatalog = field(default_factory=CriticCatalog)
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    _tasks: set["asyncio.Task[None]"] = field(default_factory=set)

    async def refresh(self) -> None:
        """Asks the workers which critics are loaded, and updates the catalog and the metrics."""
        gone = self.catalog.refresh(await self.workers.describe())
        metrics.show_critics(self.catalog.critics, gone, self.catalog.active.values())

    async def load(self, folder: Path, name: str | None) -> CriticInfo:
        """Loads a critic beside the running engine.

        Raises:
            ConflictError: it was unloaded at once.
        """
        key = await self.workers.load(str(folder), name)
        await self.refresh()
        info = self.catalog.critics.get(key)
        if info is None:
            raise ConflictError(f"{key} was loaded, and has been unloaded since")
        return info

    async def activate(self, info: CriticInfo) -> None:
        """Makes a version the one that its name means; `changing` is held."""
        previous = self.catalog.active.get(info.name)
        await self.workers.activate(info.key)
        await self.refresh()
        self.catalog.activated(info.name, previous)

    async def unload(self, info: CriticInfo) -> None:
        """Frees a version that has left the catalog, when the requests that were admitted with it have ended."""
        await info.idle.wait()  # until then they may reach the worker
        await self.workers.unload(info.key)
        await self.refresh()

    def start_unloading(self, info: CriticInfo) -> None:
        """Unloads in the background; what fails is logged."""
        task = asyncio.create_task(self.unload(info))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), QSharpError):
            logger.error("unloading a critic failed: %s", error)
