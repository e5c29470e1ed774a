"""Has this server have the critics that the store says all servers are to have.

The store is asked every few seconds. What cannot be done is said in `problems` and tried again; the rest goes on.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from qsharp_core.critic.digest import digest
from qsharp_core.errors import CriticError, QSharpError
from server.critics.catalog import CriticInfo
from server.critics.loaded import LoadedCritics
from server.store.critics import Desired, PublishedVersion

logger = logging.getLogger("vllm.qsharp")
SECONDS = 1.0  # from one look at the store to the next


class Follower:
    """Follows the store.

    Args:
        critics: of this server.
        look: reads what is wanted; it blocks.

    Attributes:
        wanted: what the store said last.
        problems: by `name@version`, why this server has not what is wanted.
    """

    def __init__(self, critics: LoadedCritics, look: Callable[[], Desired]) -> None:
        self._critics = critics
        self._look = look
        self._followed: set[str] = set()  # what the store has ever wanted: the rest is this server's own
        self.wanted = Desired()
        self.problems: dict[str, str] = {}

    async def follow(self) -> None:
        """Goes on until it is cancelled."""
        while True:
            try:
                await self.catch_up()
            except QSharpError as error:
                logger.warning("critics of the store were not followed: %s", error)
            await asyncio.sleep(SECONDS)

    async def catch_up(self) -> None:
        """Does once all that is to be done.

        Raises:
            StoreError: the store cannot be read; what is loaded stays.
        """
        wanted = await asyncio.to_thread(self._look)
        self.wanted = wanted
        self._followed |= wanted.versions.keys()
        self.problems = {key: why for key, why in self.problems.items() if key in wanted.versions}
        for key, version in wanted.versions.items():
            if key not in self._critics.catalog.critics:
                await self._tried(key, self._load(version))
        async with self._critics.changing:
            for name, number in wanted.active.items():
                await self._activated(f"{name}@{number}")
            catalog = self._critics.catalog
            if wanted.default in catalog.active:
                catalog.default = wanted.default
            leaving = [info for key, info in catalog.critics.items() if self._is_to_leave(key, info)]
            for info in leaving:
                catalog.leave(info)
        for info in leaving:
            self._critics.start_unloading(info)

    def _is_to_leave(self, key: str, info: CriticInfo) -> bool:
        return key in self._followed and key not in self.wanted.versions and not info.leaving

    async def _load(self, version: PublishedVersion) -> None:
        folder = await asyncio.to_thread(self._critics.roots.admit, version.location)
        found = await asyncio.to_thread(digest, folder)
        if found != version.digest:
            raise CriticError(f"the files at {folder} are not those that were published ({found:.12}…)")
        info = await self._critics.load(folder, version.name)
        if info.key != version.key:
            raise CriticError(f"{folder} holds {info.key}")

    async def _activated(self, key: str) -> None:
        info = self._critics.catalog.critics.get(key)
        if info is not None and not info.leaving and self._critics.catalog.active.get(info.name) != key:
            await self._tried(key, self._critics.activate(info))

    async def _tried(self, key: str, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except QSharpError as error:
            if self.problems.get(key) != str(error):
                logger.error("%s is wanted, and this server does not have it: %s", key, error)
            self.problems[key] = str(error)
        else:
            self.problems.pop(key, None)
