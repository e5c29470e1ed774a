"""What the admin's routes note in the store, so that all of its servers follow."""

import asyncio
import time
from pathlib import Path
from typing import Any

from qsharp_core.critic.digest import digest
from qsharp_core.errors import CriticError
from server.critics.catalog import CriticInfo
from server.critics.following import Follower
from server.errors import ConflictError
from server.store.critics import Activation, CriticRecords, PublishedVersion


class PublishedCritics:
    """Notes decisions in the store, and has this server follow them at once.

    Args:
        records: of the store.
        follower: of this server.
    """

    def __init__(self, records: CriticRecords, follower: Follower) -> None:
        self._records = records
        self._follower = follower

    async def publish(self, info: CriticInfo, by: str) -> None:
        """Has all servers load what this one has loaded. The first version of a name becomes its active one.

        Raises:
            ConflictError: the version is published with other files.
            StoreError: nothing was written.
        """
        folder, card = Path(info.status.path), info.status.card
        metrics: Any = card.get("metrics") or {}
        parent = card.get("parent")
        files = await asyncio.to_thread(digest, folder)
        try:
            await self._records.publish(
                PublishedVersion(
                    info.name,
                    info.version,
                    str(folder),
                    files,
                    metrics,
                    parent if isinstance(parent, str) else None,
                    by,
                )
            )
        except CriticError as error:
            raise ConflictError(str(error)) from error
        now = await asyncio.to_thread(self._records.desired)
        if info.name not in now.active:
            await self.activate(info, by)
        else:
            await self._follower.catch_up()

    async def activate(self, info: CriticInfo, by: str, *, default: bool = False, why: str | None = None) -> None:
        """Has the version be what its name means, on all servers; it is published if it was this server's own.

        Raises:
            StoreError: nothing was written.
        """
        now = await asyncio.to_thread(self._records.desired)
        if info.key not in now.versions:
            await self.publish(info, by)
        await self._records.activate(Activation(info.name, info.version, 1.0, default, time.time(), by, why))
        await self._follower.catch_up()

    async def previous(self, name: str) -> str | None:
        """The version that was active before the present one, and is still published; None if there is none."""
        now = await asyncio.to_thread(self._records.desired)
        history = await asyncio.to_thread(self._records.history, name)
        present = now.active.get(name)
        for decision in reversed(history):
            if decision.share == 1 and decision.version != present and f"{name}@{decision.version}" in now.versions:
                return decision.version
        return None

    async def retire(self, info: CriticInfo) -> None:
        """Has all servers unload the version.

        Raises:
            ConflictError: its name means it while there are others.
            StoreError: nothing was written.
        """
        try:
            await self._records.retire(info.name, info.version)
        except CriticError as error:
            raise ConflictError(str(error)) from error
        await self._follower.catch_up()
