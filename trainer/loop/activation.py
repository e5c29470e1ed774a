"""Which version of a critic a server guides with: whether a new one deserves it, and making it so."""

import asyncio
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from qsharp_core.locations import Location
from trainer.loop.versions import LoopError, Version
from trainer.rollouts.client import JSONObject, ServerClient
from trainer.rollouts.errors import RefusedError
from trainer.training.constant import against_constant
from trainer.training.publish import is_published
from trainer.training.report import HeldOutReport, TrainingReport


@dataclass(frozen=True)
class ActivationDecision:
    """Whether a new version is better and so to be activated, and why, for people."""

    better: bool
    why: str


def decide(report: TrainingReport, active: str | None) -> ActivationDecision:
    """Whether held-out rollouts show that a new version is better.

    Args:
        report: of the new version's training.
        active: key of the version that it would replace; None if there is none, and it must be better than the best
            constant prediction.
    """
    if active is None:
        return _against_constant(report.held_out)
    parent = report.parent
    comparison = parent.comparison if parent is not None and parent.critic == active else None
    if comparison is None:
        return ActivationDecision(
            False, f"it could not be compared with {active}: hold out rollouts that both can read"
        )
    margin = f"{comparison.improvement:+.5f}"
    if comparison.standard_error is not None:
        margin += f" ± {comparison.standard_error:.5f}"
    word = "better" if comparison.better else "not better"
    measure = comparison.by.replace("_", " ")
    return ActivationDecision(comparison.better, f"{word} than {active}: held-out {measure} by {margin}")


def _against_constant(held_out: HeldOutReport | None) -> ActivationDecision:
    if held_out is None:
        return ActivationDecision(False, "nothing was held out that it could be measured on")
    measured = against_constant(held_out)
    return ActivationDecision(
        measured.better, f"{'better' if measured.better else 'not better'} than a constant: {measured}"
    )


class ServedCritic:
    """The versions of one critic in a running server.

    Args:
        client: has the admin key.
        name: of the critic.
        out: versions are `out/<name>/<version>`.
        seen_at: where the server finds `out`; None if it is the same path.
    """

    def __init__(self, client: ServerClient, name: str, out: Location, seen_at: Location | None = None) -> None:
        self._client = client
        self._name = name
        self._out = out
        # The server resolves links, too.
        self._seen_at = seen_at or (out.resolve() if isinstance(out, Path) else out)

    async def current(self, remembered: Version | None) -> Version | None:
        """The version that guides; None if there is none, or it is not in `out`.

        A server that was restarted has lost the version that was activated last: it is loaded and activated again. If
        that version is loaded and another one is active, somebody rolled back, and the other one is returned.

        Args:
            remembered: the version that was activated last; None if there is none.

        Raises:
            RequestError
        """
        listed = await self._client.get("/v1/critics")
        loaded = self._of_this_name(listed)
        # Servers that share a store forget nothing: what is not there, somebody has unloaded.
        forgetful = listed.get("wanted") is None
        if remembered is not None and remembered.key not in loaded and forgetful:
            await self.activate(remembered)
            return remembered
        active = next((one for one in loaded.values() if one["active"]), None)
        if active is None:
            return None
        folder = self._out / self._name / active["version"]
        return Version.at(folder) if await asyncio.to_thread(is_published, folder) else None

    async def activate(self, version: Version) -> None:
        """Makes a version the one that requests without a version get, and loads it if it is not loaded.

        Raises:
            LoopError: the server has another critic under this version's name.
            RequestError
        """
        await self._load(version)
        await self._decide(version)

    async def try_out(self, version: Version, share: float, why: str) -> None:
        """Has a version guide a share of the requests that name none, beside the active one; loads it if need be.

        Raises:
            LoopError: the server has another critic under this version's name.
            RequestError: the server has no store, for instance.
        """
        await self._load(version)
        await self._decide(version, share=share, why=why)

    async def end_trial(self, version: Version, why: str) -> None:
        """Ends a trial, and unloads the version that lost.

        Raises:
            RequestError
        """
        await self._decide(version, share=0, why=why)
        await self._client.delete(f"/v1/critics/{self._name}/{version.folder.name}")

    async def decisions(self) -> list[JSONObject]:
        """What was decided about this critic, oldest first.

        Raises:
            RequestError
        """
        found: list[JSONObject] = (await self._client.get(f"/v1/critics/{self._name}"))["decisions"]
        return found

    async def _decide(self, version: Version, **more: JsonValue) -> None:
        await self._client.post(f"/v1/critics/{self._name}/activate", {"version": version.folder.name, **more})

    async def _load(self, version: Version) -> None:
        loaded = await self._loaded()
        path = str(self._seen_at / self._name / version.folder.name)
        if version.key in loaded:
            if (other := loaded[version.key]["path"]) != path:
                raise LoopError(
                    f"the server has {version.key} from {other}, not from {path}: unload it there, or give this critic "
                    "another name"
                )
        else:
            try:
                await self._client.post("/v1/critics", {"path": path})
            except RefusedError:
                # An attempt before this one may have been served, though its answer was lost.
                if version.key not in await self._loaded():
                    raise

    async def unload_all_but(self, *kept: Version | None) -> None:
        """Unloads the other versions that are in `out`, to free their memory; the server waits for their requests.

        Raises:
            RequestError
        """
        keys = {version.key for version in kept if version is not None}
        for key, one in (await self._loaded()).items():
            if key in keys or one["active"]:
                continue
            if await asyncio.to_thread(is_published, self._out / self._name / one["version"]):
                await self._client.delete(f"/v1/critics/{self._name}/{one['version']}")

    async def _loaded(self) -> dict[str, JSONObject]:
        return self._of_this_name(await self._client.get("/v1/critics"))

    def _of_this_name(self, listed: JSONObject) -> dict[str, JSONObject]:
        return {one["id"]: one for one in listed["data"] if one["name"] == self._name and not one.get("leaving")}
