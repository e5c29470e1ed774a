"""The API process's picture of the critics in the workers.

It resolves what a request asks for to an exact version when the request is admitted, so that whatever is activated
afterwards does not concern it, and counts who uses a version on the way to the worker: a version is only unloaded
there when no request can still arrive for it.
"""

import asyncio
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qsharp_core.errors import NoCriticError, UnknownCriticError


@dataclass(eq=False)
class CriticInfo:
    """A loaded version.

    Attributes:
        state: what the worker says of it (`CriticWorker.qsharp_describe`).
        leaving: no new request gets it.
        in_flight: requests of this process that were admitted with it and have not ended.
    """

    name: str
    version: str
    state: dict[str, Any]
    leaving: bool = False
    in_flight: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.idle.set()

    @property
    def key(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"

    @property
    def max_length(self) -> int:
        """The longest history, in tokens, that it can score."""
        return int(self.state["max_length"])

    @property
    def is_native(self) -> bool:
        """Whether it reads the reference's hidden states and has no model of its own."""
        return self.state["card"].get("backbone") == "reference"

    @property
    def reward_range(self) -> tuple[float, float]:
        """The least and the greatest reward that it knows."""
        low, high = self.state["card"]["reward_range"]
        return low, high

    def lease(self, owner: object) -> Callable[[], Any]:
        """Counts a request in; the returned function counts it out, once, and so does the end of `owner`."""
        self.in_flight += 1
        self.idle.clear()
        return weakref.finalize(owner, self._release)

    def _release(self) -> None:
        self.in_flight -= 1
        if self.in_flight == 0:
            self.idle.set()


class Registry:
    """Loaded critics, by `name@version`; `active` says which version a bare name means, first name the default."""

    def __init__(self) -> None:
        self.critics: dict[str, CriticInfo] = {}
        self.active: dict[str, str] = {}
        self._before: dict[str, list[str]] = {}  # name -> versions that were active before, latest last

    def refresh(self, described: list[dict[str, Any]]) -> list[str]:
        """Takes over what the workers say; returns the keys that are gone."""
        found = {f"{entry['name']}@{entry['version']}": entry for entry in described}
        gone = [key for key in self.critics if key not in found]
        for key in gone:
            del self.critics[key]
        for key, entry in found.items():
            info = self.critics.setdefault(key, CriticInfo(entry["name"], entry["version"], entry))
            info.state = entry
            info.leaving = info.leaving or entry["leaving"]
        active = {e["name"]: key for key, e in found.items() if e["active"] and not self.critics[key].leaving}
        kept = [name for name in self.active if name in active]
        self.active = {name: active[name] for name in [*kept, *(n for n in active if n not in kept)]}
        return gone

    @property
    def default(self) -> str | None:
        """The name that requests mean which name none."""
        return next(iter(self.active), None)

    def resolve(self, name: str | None) -> CriticInfo:
        """The version that a request means: None is the default's active one.

        Raises:
            NoCriticError: none is loaded.
            UnknownCriticError: this one is not.
        """
        if not self.active:
            raise NoCriticError(
                "guidance was asked for and no critic is loaded: load one (POST /v1/critics), or send eta: null", "eta"
            )
        wanted = self.default if name is None else name
        assert wanted is not None
        info = self.critics.get(self.active.get(wanted, wanted))
        if info is None or info.leaving:
            known = ", ".join(f"{n} (now {key})" for n, key in self.active.items())
            raise UnknownCriticError(f"critic {wanted!r} is not loaded; loaded are {known}", "guidance.critic")
        return info

    def leave(self, info: CriticInfo) -> None:
        """No new request gets this version."""
        info.leaving = True
        if self.active.get(info.name) == info.key:
            del self.active[info.name]

    def versions(self, name: str) -> list[CriticInfo]:
        """All versions of a name, also those that are leaving."""
        return [info for info in self.critics.values() if info.name == name]

    def activated(self, name: str, before: str | None) -> None:
        """Another version of `name` has become the active one: `before` is what a roll-back returns to."""
        if before is not None and before != self.active.get(name):
            self._before.setdefault(name, []).append(before)

    def previous(self, name: str) -> CriticInfo | None:
        """The version that was active before and is still loaded; it is taken off the history."""
        history = self._before.get(name, [])
        while history:
            info = self.critics.get(history.pop())
            if info is not None and not info.leaving and info.key != self.active.get(name):
                return info
        return None
