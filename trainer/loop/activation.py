"""Which version of a critic a server guides with: whether a new one deserves it, and making it so."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsharp_core.critic.checkpoint import CARD
from qsharp_core.errors import QSharpError
from trainer.client import RefusedError, ServerClient


class LoopError(QSharpError):
    """The loop cannot start or go on; the message says what to change."""


@dataclass(frozen=True)
class Version:
    """A published version: `name@version`, and its folder here."""

    key: str
    folder: Path

    @classmethod
    def at(cls, folder: Path) -> "Version":
        """The version in a folder `…/<name>/<version>`."""
        return cls(f"{folder.parent.name}@{folder.name}", folder)

    @classmethod
    def of(cls, key: str | None, out: Path) -> "Version | None":
        """The version of a key; None for None.

        Raises:
            LoopError: it is not in `out` any more.
        """
        if key is None:
            return None
        folder = out / Path(*key.rsplit("@", 1))
        if not (folder / CARD).is_file():
            raise LoopError(
                f"{key} is what this loop goes on with, and {folder} is gone: put it back, or use another --run"
            )
        return cls(key, folder)


@dataclass(frozen=True)
class Verdict:
    """Whether a new version is to be activated, and why, for people."""

    better: bool
    why: str


def verdict(report: dict[str, Any], active: str | None) -> Verdict:
    """What the held-out rollouts say of a new version.

    Args:
        report: `metrics.json` of the training run.
        active: key of the version that it would replace; without one, the best constant prediction is to be beaten.
    """
    if active is None:
        return _against_constant(report["held_out"])
    parent = report["parent"] or {}
    comparison = parent.get("comparison") if parent.get("critic") == active else None
    if comparison is None:
        return Verdict(False, f"it could not be compared with {active}: hold out rollouts that both can read")
    measure, error = comparison["by"].replace("_", " "), comparison["standard_error"]
    margin = f"{comparison['improvement']:+.5f}" + ("" if error is None else f" ± {error:.5f}")
    better = bool(comparison["better"])
    return Verdict(better, f"{'better' if better else 'not better'} than {active}: held-out {measure} by {margin}")


def _against_constant(held_out: dict[str, Any] | None) -> Verdict:
    if held_out is None:
        return Verdict(False, "nothing was held out that it could be measured on")
    overall = held_out["overall"]
    measure = "log_loss" if "log_loss_constant" in overall else "brier"
    ours, constant = overall[measure], overall[f"{measure}_constant"]
    word = "better" if ours < constant else "not better"
    why = f"{word} than a constant: held-out {measure.replace('_', ' ')} {ours:.5f}, {constant:.5f}"
    return Verdict(ours < constant, why)


class ServedCritic:
    """One critic's versions in a running server.

    Args:
        client: with the admin key.
        out: versions are `out/<name>/<version>`.
        seen_at: where the server finds `out`; None: at the same path.
    """

    def __init__(self, client: ServerClient, name: str, out: Path, seen_at: Path | None = None) -> None:
        self._client = client
        self._name = name
        self._out = out
        self._seen_at = seen_at or out.absolute()

    async def current(self, remembered: Version | None) -> Version | None:
        """The active version; None if there is none that stands in `out`.

        What was activated last is loaded again where the server lost it, by a restart. Where it is loaded and
        another one is active, somebody rolled back: that one counts.

        Raises:
            ServerError
        """
        loaded = await self._loaded()
        if remembered is not None and remembered.key not in loaded:
            await self.activate(remembered)
            return remembered
        active = next((one for one in loaded.values() if one["active"]), None)
        if active is None:
            return None
        folder = self._out / self._name / active["version"]
        return Version.at(folder) if (folder / CARD).is_file() else None

    async def activate(self, version: Version) -> None:
        """Loads a version if need be, and has requests that name no version get it.

        Raises:
            ServerError
        """
        loaded = await self._loaded()
        if version.key not in loaded:
            path = str(self._seen_at / self._name / version.folder.name)
            try:
                await self._client.post("/v1/critics", {"path": path})
            except RefusedError:
                # An attempt before this one may have been served, though its answer was lost.
                if version.key not in await self._loaded():
                    raise
        await self._client.post(f"/v1/critics/{self._name}/activate", {"version": version.folder.name})

    async def unload_all_but(self, *kept: Version | None) -> None:
        """Frees the memory of other versions that stand in `out`; requests on their way are waited for by the server.

        Raises:
            ServerError
        """
        keys = {version.key for version in kept if version is not None}
        for key, one in (await self._loaded()).items():
            ours = (self._out / self._name / one["version"] / CARD).is_file()
            if ours and key not in keys and not one["active"]:
                await self._client.delete(f"/v1/critics/{self._name}/{one['version']}")

    async def _loaded(self) -> dict[str, dict[str, Any]]:
        listed = (await self._client.get("/v1/critics"))["data"]
        return {one["id"]: one for one in listed if one["name"] == self._name and not one.get("leaving")}
