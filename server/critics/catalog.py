"""Which critics the workers have loaded, as the API process knows it.

A request's critic is resolved to an exact version when the request is admitted, so later activations do not affect it.
The catalog also counts the requests that were admitted with a version and have not ended: a version is unloaded in the
workers only when no request can still arrive for it.
"""

import asyncio
import hashlib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from qsharp_core.errors import NoCriticError, UnknownCriticError
from qsharp_core.wire.critics import CriticStatus, CriticVersion


@dataclass(eq=False)
class CriticInfo:
    """One loaded version of a critic.

    Attributes:
        status: what the workers last said of it.
        leaving: whether it is being unloaded; no new request gets it then.
        in_flight: requests of this process that were admitted with it and have not ended.
        idle: set while `in_flight` is 0.
        source: the URL that its folder was fetched from; None if it was not.
    """

    status: CriticStatus
    leaving: bool = False
    in_flight: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    source: str | None = None

    def __post_init__(self) -> None:
        self.idle.set()

    @property
    def name(self) -> str:
        """The critic's name, which all its versions share."""
        return self.status.name

    @property
    def version(self) -> str:
        """The version, which is unique within the name."""
        return self.status.version

    @property
    def key(self) -> str:
        """`name@version`."""
        return self.status.key

    @property
    def location(self) -> str:
        """Where it was loaded from: a folder, or a URL."""
        return self.source or self.status.path

    @property
    def max_length(self) -> int:
        """The longest history, in tokens, that it can score."""
        return self.status.max_length

    def lease(self, owner: object) -> Callable[[], Any]:
        """Counts a request as using this version.

        The returned function ends that, and so does the garbage collection of `owner`. Both together count once.
        """
        self.in_flight += 1
        self.idle.clear()
        return weakref.finalize(owner, self._release)

    def _release(self) -> None:
        self.in_flight -= 1
        if self.in_flight == 0:
            self.idle.set()


@dataclass(frozen=True)
class TrialShare:
    """Another version of a name than the active one, for a share of the requests that name no version.

    Attributes:
        key: its `name@version`.
        share: of the requests, from 0 to 1.
    """

    key: str
    share: float

    def takes(self, who: str) -> bool:
        """Whether it gets the requests of `who`: the same on all servers, and still so when the share grows."""
        digest = hashlib.sha256(f"{self.key} {who}".encode(errors="surrogatepass")).digest()
        return int.from_bytes(digest[:8]) < self.share * 2**64


class CriticCatalog:
    """All loaded versions.

    Attributes:
        critics: by `name@version`.
        active: for each name, the `name@version` that the bare name means.
        default: the name that requests without a critic's name get: the first that was ever active, until the admin
            chooses another. It stays when its versions are unloaded, so that nobody silently gets another critic. None
            while no critic was ever active.
        trials: by name, of names that have one.
    """

    def __init__(self) -> None:
        self.critics: dict[str, CriticInfo] = {}
        self.active: dict[str, str] = {}
        self.default: str | None = None
        self.trials: dict[str, TrialShare] = {}
        self._history: dict[str, list[str]] = {}  # name -> versions that were active earlier, latest last

    def refresh(self, statuses: Sequence[CriticStatus]) -> list[str]:
        """Takes over the workers' state, and returns the keys of the versions that are no longer loaded."""
        loaded = {status.key: status for status in statuses}
        gone = [key for key in self.critics if key not in loaded]
        for key in gone:
            del self.critics[key]
        for key, status in loaded.items():
            info = self.critics.setdefault(key, CriticInfo(status))
            info.status = status
            info.leaving = info.leaving or status.leaving
        self.active = {s.name: key for key, s in loaded.items() if s.active and not self.critics[key].leaving}
        if self.default is None:
            self.default = next(iter(self.active), None)
        return gone

    def resolve(self, name: str | None, who: str | None = None) -> CriticInfo:
        """The version that a request means.

        Args:
            name: `name@version`, a bare name for its active version, or None for the default's.
            who: by whom a trial takes requests; None: it takes none.

        Raises:
            NoCriticError: no critic is loaded, or the default is not.
            UnknownCriticError: this critic is not loaded, or is being unloaded.
        """
        if not self.active:
            raise NoCriticError(
                "guidance was asked for and no critic is loaded: load one (POST /v1/critics), or send eta: null", "eta"
            )
        wanted = self.default if name is None else name
        assert wanted is not None
        if name is None and wanted not in self.active:
            raise NoCriticError(
                f"guidance.critic must be given: the default critic {wanted!r} is not loaded; loaded are "
                f"{', '.join(self.active)}",
                "guidance.critic",
            )
        trial = self.trials.get(wanted)
        if trial is not None and who is not None and trial.takes(who):
            info = self.critics.get(trial.key)
            if info is not None and not info.leaving:
                return info
        info = self.critics.get(self.active.get(wanted, wanted))
        if info is None or info.leaving:
            known = ", ".join(f"{n} (now {key})" for n, key in self.active.items())
            raise UnknownCriticError(f"critic {wanted!r} is not loaded; loaded are {known}", "guidance.critic")
        return info

    def leave(self, info: CriticInfo) -> None:
        """Marks a version as being unloaded: no new request gets it."""
        info.leaving = True
        if self.active.get(info.name) == info.key:
            del self.active[info.name]

    def versions(self, name: str) -> list[CriticInfo]:
        """All versions of a name, including those that are being unloaded."""
        return [info for info in self.critics.values() if info.name == name]

    def activated(self, name: str, previous: str | None) -> None:
        """Remembers that another version of `name` became active; a roll-back returns to `previous`."""
        if previous is not None and previous != self.active.get(name):
            self._history.setdefault(name, []).append(previous)

    def previous(self, name: str) -> CriticInfo | None:
        """The version that was active before the present one and is still loaded; removed from the history."""
        history = self._history.get(name, [])
        while history:
            info = self.critics.get(history.pop())
            if info is not None and not info.leaving and info.key != self.active.get(name):
                return info
        return None

    def describe(self, info: CriticInfo) -> CriticVersion:
        """One version as `/v1/critics` shows it."""
        active = self.active.get(info.name) == info.key
        trial = self.trials.get(info.name)
        taken = 0.0 if trial is None else trial.share
        share = taken if trial is not None and trial.key == info.key else 1 - taken if active else 0.0
        status = info.status
        return CriticVersion(
            id=info.key,
            name=info.name,
            version=info.version,
            active=active,
            default=active and self.default == info.name,
            share=share,
            leaving=info.leaving,
            loaded=info.key in self.critics,
            users=status.users,
            in_flight=info.in_flight,
            path=info.location,
            max_length=status.max_length,
            kv_blocks=status.kv_blocks,
            kv_blocks_used=status.kv_blocks_used,
            metrics=status.card.get("metrics"),
            card=status.card,
        )
