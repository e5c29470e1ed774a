"""What an admin decides about critics: for this server alone, or for all servers of its store (`published`)."""

from typing import Protocol

from qsharp_core.wire.critics import ActivateRequest
from server.critics.catalog import CriticInfo
from server.critics.loaded import LoadedCritics
from server.errors import ConflictError


class Decisions(Protocol):
    """Each raises ConflictError where it does not fit what is loaded, and NotFoundError for what is not loaded.

    `by` is the holder of the admin's key.
    """

    async def loaded(self, info: CriticInfo, by: str, *, activate: bool) -> None:
        """This server has loaded a version, to be used; the first one of a name is active."""

    async def activate(self, name: str, body: ActivateRequest, by: str) -> CriticInfo:
        """A name means this version from now on, for all requests or for a share, and is the default if so told."""

    async def roll_back(self, name: str, by: str) -> CriticInfo:
        """A name means the version that it meant before."""

    async def unload(self, name: str, version: str, by: str) -> CriticInfo:
        """No new request gets the version, and it is freed when its last request has ended."""


class OwnDecisions:
    """Decides for this server alone, which forgets it when it ends.

    Args:
        critics: of this server.
    """

    def __init__(self, critics: LoadedCritics) -> None:
        self._critics = critics

    async def loaded(self, info: CriticInfo, by: str, *, activate: bool) -> None:
        if activate:
            await self.activate(info.name, ActivateRequest(version=info.version), by)

    async def activate(self, name: str, body: ActivateRequest, by: str) -> CriticInfo:
        if body.share < 1:
            raise ConflictError("a share needs a rollout store (--rollouts), whose servers keep to it together")
        async with self._critics.changing:
            info = self._critics.version(name, body.version)
            await self._critics.activate(info)
            if body.default:
                self._critics.catalog.default = name
            return info

    async def roll_back(self, name: str, by: str) -> CriticInfo:
        async with self._critics.changing:
            self._critics.versions(name)
            info = self._critics.catalog.previous(name)
            if info is None:
                raise ConflictError(
                    f"no version of {name} that was active before is still loaded: load and activate it"
                )
            await self._critics.workers.activate(info.key)
            await self._critics.refresh()
            return info

    async def unload(self, name: str, version: str, by: str) -> CriticInfo:
        async with self._critics.changing:
            info = self._critics.version(name, version)
            others = [one for one in self._critics.versions(name) if one is not info and not one.leaving]
            if others and self._critics.catalog.active.get(name) == info.key:
                raise ConflictError(f"{info.key} is active: activate another version of {name} first")
            self._critics.leave(info)
            return info
