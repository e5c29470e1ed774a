"""Has this server have the critics that the store says all servers are to have.

The store is asked every second, and at once when it tells of a change. What cannot be done is said in `problems` and
tried again; the rest goes on.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path

from qsharp_core.critic.digest import digest
from qsharp_core.errors import CriticError, QSharpError
from server import metrics
from server.critics.catalog import TrialShare
from server.critics.loaded import LoadedCritics
from server.store.critics import Desired, PublishedVersion

logger = logging.getLogger("vllm.qsharp")
SECONDS = 1.0  # from one look at the store to the next
RETRY_SECONDS = 10.0  # from a failed load to the next attempt


class Follower:
    """Follows the store.

    Critics that the store never wanted are this server's own, and stay as they are.

    Args:
        critics: of this server.
        look: reads what is wanted; it blocks.
        changes: yields when it is time to look again, at the latest after so many seconds.

    Attributes:
        wanted: what the store said last.
    """

    def __init__(
        self, critics: LoadedCritics, look: Callable[[], Desired], changes: Callable[[float], AsyncGenerator[None]]
    ) -> None:
        self._critics = critics
        self._look = look
        self._changes = changes
        self._looking = asyncio.Lock()
        self._getting: dict[str, asyncio.Task[None]] = {}
        self._sound: dict[str, str] = {}  # the digest of what is loaded, once it was compared
        self._again: dict[str, float] = {}  # when a version that could not be had is tried again
        self._dropped: set[str] = set()  # no longer wanted, and to leave
        self._not_loaded: dict[str, str] = {}
        self._not_activated: dict[str, str] = {}
        self.wanted = Desired()

    @property
    def problems(self) -> dict[str, str]:
        """By `name@version`, why this server has not what is wanted."""
        return {**self._not_activated, **self._not_loaded}

    async def follow(self) -> None:
        """Goes on until it is cancelled."""
        async with aclosing(self._changes(SECONDS)) as changes:
            async for _ in changes:
                try:
                    await self.catch_up()
                except QSharpError as error:
                    logger.warning("critics of the store were not followed: %s", error)
                except Exception:  # a fault of ours must not end this unseen
                    logger.exception("critics of the store were not followed")

    async def settle(self, key: str | None = None) -> None:
        """Returns when this server has what is wanted, or has tried to; with a critic's name or key, of that alone.

        Raises:
            StoreError: the store cannot be read.
        """
        await self.catch_up()
        if tasks := [task for one, task in self._getting.items() if key in (None, one, one.partition("@")[0])]:
            await asyncio.gather(*tasks)
            await self.catch_up()

    async def meet(self, critic: str) -> None:
        """Catches up if this server lacks a critic that somebody names: another may just have been told of it.

        Args:
            critic: `name` or `name@version`.

        Raises:
            StoreError: the store cannot be read.
        """
        catalog = self._critics.catalog
        if critic not in catalog.critics and critic not in catalog.active:
            await self.settle(critic)

    async def catch_up(self) -> None:
        """Does once all that is to be done; loads, which may take long, go on in the background.

        Raises:
            StoreError: the store cannot be read; what is loaded stays.
        """
        async with self._looking:
            wanted = await asyncio.to_thread(self._look)
            self._dropped = (self._dropped | self.wanted.versions.keys()) - wanted.versions.keys()
            self.wanted = wanted
            self._forget()
            for key, version in wanted.versions.items():
                if self._sound.get(key) != version.digest and time.monotonic() >= self._again.get(key, 0):
                    self._start(version)
            async with self._critics.changing:
                self._not_activated, before = {}, self._not_activated
                for name, number in wanted.active.items():
                    key = f"{name}@{number}"
                    await self._activate(name, key, before.get(key))
                if wanted.default is not None:
                    self._critics.catalog.default = wanted.default
                self._critics.catalog.trials = {
                    name: TrialShare(f"{name}@{number}", share)
                    for name, (number, share) in wanted.trials.items()
                    if self._is_sound(f"{name}@{number}")
                }
                for key in self._dropped & self._critics.catalog.critics.keys():
                    self._critics.leave(self._critics.catalog.critics[key])
                self._dropped = set(self._getting) - wanted.versions.keys()  # a load that still runs
            metrics.CRITIC_PROBLEMS.set(len(self.problems))

    def _forget(self) -> None:
        """What is no longer wanted is no problem, and what is no longer loaded must be compared again."""
        for kept in (self._not_loaded, self._again):
            for key in kept.keys() - self.wanted.versions.keys():
                del kept[key]
        for key in self._sound.keys() - self._critics.catalog.critics.keys():
            del self._sound[key]

    def _start(self, version: PublishedVersion) -> None:
        info = self._critics.catalog.critics.get(version.key)
        if version.key in self._getting or (info is not None and info.leaving):
            return
        task = asyncio.create_task(self._get(version))
        self._getting[version.key] = task
        task.add_done_callback(lambda _: self._getting.pop(version.key))

    async def _get(self, version: PublishedVersion) -> None:
        try:
            await self._load(version)
        except Exception as error:
            self._again[version.key] = time.monotonic() + RETRY_SECONDS
            self._not_loaded[version.key] = _told(version.key, error, self._not_loaded.get(version.key))
        else:
            self._sound[version.key] = version.digest
            self._not_loaded.pop(version.key, None)

    async def _load(self, version: PublishedVersion) -> None:
        """Loads a version; of one that is loaded it compares the files, and exchanges it if they are others."""
        info = self._critics.catalog.critics.get(version.key)
        if info is None:
            location = await asyncio.to_thread(self._critics.roots.admit, version.location)
            folder = await self._critics.on_disk(location, version.digest)
        else:
            folder = location = Path(info.status.path)
        found = await asyncio.to_thread(digest, folder)
        if found != version.digest and info is not None:
            logger.error("%s was loaded from other files than those that were published, and leaves", version.key)
            self._critics.leave(info)
            if (unloading := self._critics.unloading(info)) is not None:
                await unloading
            await self._load(version)
        elif found != version.digest:
            raise CriticError(f"the files at {folder} are not those that were published ({found:.12}…)")
        elif info is None:
            try:
                await self._critics.load(folder, version.name, location)
            except QSharpError:
                await self._critics.refresh()
                if version.key not in self._critics.catalog.critics:
                    raise
                await self._load(version)  # an admin has just loaded it

    def _is_sound(self, key: str) -> bool:
        """Whether this server has the files that were published."""
        return self._sound.get(key) == self.wanted.versions[key].digest

    async def _activate(self, name: str, key: str, before: str | None) -> None:
        info = self._critics.catalog.critics.get(key)
        if info is None or info.leaving or self._critics.catalog.active.get(name) == key:
            return
        if not self._is_sound(key):
            return
        try:
            await self._critics.activate(info)
        except QSharpError as error:
            self._not_activated[key] = _told(key, error, before)


def _told(key: str, error: Exception, before: str | None) -> str:
    """Why this server has not what is wanted; it is logged unless it was the same before."""
    expected = isinstance(error, QSharpError)
    problem = str(error) if expected else repr(error)
    if problem != before:
        logger.error(
            "%s is wanted, and this server does not have it: %s", key, problem, exc_info=None if expected else error
        )
    return problem
