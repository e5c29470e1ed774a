"""Decisions about critics for all servers of a store: they are noted there, and every server follows."""

import asyncio
import time
from pathlib import Path

from qsharp_core.critic.digest import digest
from qsharp_core.errors import CriticError, QSharpError
from qsharp_core.wire.critics import ActivateRequest, CriticStatus
from server.critics.catalog import CriticInfo
from server.critics.decisions import OwnDecisions
from server.critics.following import Follower
from server.critics.loaded import LoadedCritics
from server.errors import ConflictError
from server.store.critics import Activation, CriticRecords, PublishedVersion


class SharedDecisions:
    """Notes each decision in the store, and has this server follow at once.

    What a server was started with is its own until a decision is made about its name. Then the store takes over what
    this server has of that name, so that a roll-back finds the way back.

    Args:
        critics: of this server.
        records: of the store.
        follower: of this server.
    """

    def __init__(self, critics: LoadedCritics, records: CriticRecords, follower: Follower) -> None:
        self._critics = critics
        self._records = records
        self._follower = follower
        self._own = OwnDecisions(critics)

    async def loaded(self, info: CriticInfo, by: str, *, activate: bool) -> None:
        try:
            await self._adopt(info.name, by, new=info)
            await self._publish(info, by)
            await self._follower.catch_up()
            first = self._critics.catalog.active.get(info.name) == info.key
            if activate or (first and info.name not in self._follower.wanted.active):
                await self._note(info, by)
        except QSharpError:
            if not info.leaving:
                self._critics.leave(info)  # what could not be published is not kept
            raise
        await self._follower.settle(info.key)

    async def activate(self, name: str, body: ActivateRequest, by: str) -> CriticInfo:
        if body.default and body.share < 1:
            raise ConflictError("a trial cannot make its name the default: leave default out, or share")
        await self._follower.meet(f"{name}@{body.version}")
        info = self._critics.version(name, body.version)
        await self._adopt(name, by)
        if info.key not in self._follower.wanted.versions:
            await self._publish(info, by)
        if body.share < 1 and self._critics.catalog.active.get(name) == info.key:
            raise ConflictError(f"{info.key} is active: a share is for another version beside it")
        await self._note(info, by, share=body.share, default=body.default, why=body.why)
        return await self._followed(info)

    async def roll_back(self, name: str, by: str) -> CriticInfo:
        await self._follower.meet(name)
        self._critics.versions(name)
        await self._adopt(name, by)
        version = await asyncio.to_thread(self._records.previous, name)
        if version is None:
            raise ConflictError(f"no version of {name} that was active before is still wanted: load and activate it")
        await self._follower.meet(f"{name}@{version}")
        info = self._critics.version(name, version)
        await self._note(info, by, rolled_back=True)
        return await self._followed(info)

    async def unload(self, name: str, version: str, by: str) -> CriticInfo:
        await self._follower.catch_up()
        published = self._follower.wanted.versions.get(f"{name}@{version}")
        if published is None:
            return await self._own.unload(name, version, by)
        info = self._critics.catalog.critics.get(published.key) or _absent(published)
        try:
            await self._records.retire(name, version, by)
        except CriticError as error:
            raise ConflictError(str(error)) from error
        await self._follower.catch_up()
        return info

    async def _adopt(self, name: str, by: str, new: CriticInfo | None = None) -> None:
        """Has the store know what this server has of a name, and what its default is, if it knows nothing of them.

        Args:
            new: this version was not there before.
        """
        await self._follower.catch_up()
        catalog = self._critics.catalog
        for one in dict.fromkeys((catalog.default, name)):
            if one is None or await asyncio.to_thread(self._records.knows, one):
                continue
            versions = [info for info in catalog.versions(one) if info is not new and not info.leaving]
            for info in versions:
                await self._publish(info, by)
            for info in versions:
                if catalog.active.get(one) == info.key:
                    await self._note(info, by, why="what the server had")

    async def _publish(self, info: CriticInfo, by: str) -> None:
        card = info.status.card
        metrics, parent = card.get("metrics"), card.get("parent")
        files = await asyncio.to_thread(digest, Path(info.status.path))
        version = PublishedVersion(
            name=info.name,
            version=info.version,
            location=info.location,
            digest=files,
            metrics=metrics if isinstance(metrics, dict) else {},
            parent=parent if isinstance(parent, str) else None,
            published_by=by,
        )
        try:
            await self._records.publish(version)
        except CriticError as error:
            raise ConflictError(str(error)) from error

    async def _note(
        self,
        info: CriticInfo,
        by: str,
        *,
        share: float = 1.0,
        default: bool = False,
        rolled_back: bool = False,
        why: str | None = None,
    ) -> None:
        decision = Activation(
            name=info.name,
            version=info.version,
            share=share,
            is_default=default,
            rolled_back=rolled_back,
            created=time.time(),
            given_by=by,
            why=why,
        )
        try:
            await self._records.activate(decision)
        except CriticError as error:  # another server has just retired it
            raise ConflictError(str(error)) from error

    async def _followed(self, info: CriticInfo) -> CriticInfo:
        await self._follower.settle(info.key)
        if problem := self._follower.problems.get(info.key):
            raise ConflictError(f"{info.key} is active for all servers, and this one does not have it: {problem}")
        return info


def _absent(version: PublishedVersion) -> CriticInfo:
    """A version that is wanted and that this server does not have, to be described to the admin who ends that."""
    status = CriticStatus(
        name=version.name, version=version.version, path=version.location, active=False, leaving=True, users=0,
        max_length=0, native=False, reward_range=(0, 1), kv_blocks=None, kv_blocks_used=None, card={},
    )  # fmt: skip
    return CriticInfo(status, leaving=True)
