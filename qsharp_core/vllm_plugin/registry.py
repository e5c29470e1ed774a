"""The critics loaded in this worker: their versions, which of them are active, and how many requests use each.

A request keeps the version it began with. A version that is unloaded is freed when its last request ends.
"""

import gc
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from qsharp_core.critic.checkpoint import CriticCard, CriticFiles
from qsharp_core.critic.scoring.base import CandidateScorer
from qsharp_core.critic.scoring.cache import CachedSequence
from qsharp_core.critic.scoring.cached import CachedScorer
from qsharp_core.errors import CriticError, NoCriticError, QSharpError, UnknownCriticError
from qsharp_core.wire.critics import CriticStatus

logger = logging.getLogger("vllm.qsharp")


@dataclass(eq=False)
class LoadedCritic:
    """A version of a critic in memory.

    Attributes:
        card: what the critic is.
        path: the folder that it was loaded from.
        scorer: scores candidates.
        max_length: the longest history, in tokens, whose candidates can be scored.
        users: number of requests that use this version.
        leaving: whether it was unloaded, and is to be freed when no request uses it any more.
    """

    card: CriticCard
    path: Path
    scorer: CandidateScorer
    max_length: int
    users: int = 0
    leaving: bool = False

    @property
    def cached_scorer(self) -> CachedScorer | None:
        """The scorer of a separate critic, which has a cache; None for a native critic."""
        return self.scorer if isinstance(self.scorer, CachedScorer) else None

    def open(self) -> CachedSequence | None:
        """A request begins to use this version. Returns its sequence in the critic's cache; None without a cache."""
        self.users += 1
        return self.cached_scorer.open() if self.cached_scorer else None

    def close(self, sequence: CachedSequence | None) -> None:
        """A request ends its use of this version; `sequence` is what `open` returned."""
        self.users -= 1
        if self.cached_scorer is not None and sequence is not None:
            self.cached_scorer.close(sequence)


class WorkerRegistry:
    """The worker's critics by key, `name@version`.

    Args:
        read: reads and checks the files of a critic's folder.
        build: makes a critic of them: `(files, name or None) -> LoadedCritic`.
        patience: seconds to wait for others that are being built.

    Attributes:
        critics: loaded versions by key.
        active: the key of each name's active version.
        default: the name that requests without one get: the first that was loaded.
    """

    def __init__(
        self,
        read: Callable[[Path], CriticFiles],
        build: Callable[[CriticFiles, str | None], LoadedCritic],
        patience: float,
    ) -> None:
        self._read, self._build, self._patience = read, build, patience
        self._building = threading.Lock()
        self.critics: dict[str, LoadedCritic] = {}
        self.active: dict[str, str] = {}
        self.default: str | None = None
        self._failed = False  # whether a load has failed, and may have left memory behind

    def load(self, path: Path, name: str | None) -> LoadedCritic:
        """Loads a critic, in any thread. Calls read files side by side, because a disk may hang, and build in turns.

        Only one at a time may be built: a process can capture one CUDA graph at a time, and transformers changes global
        state.

        Raises:
            CriticError: whatever goes wrong is the critic's fault, as far as the engine is concerned.
        """
        try:
            files = self._read(path)
            if not self._building.acquire(timeout=self._patience):
                raise CriticError(f"{path} was not loaded: another critic was built for {self._patience:g} s")
            try:
                return self._build(files, name)
            finally:
                self._building.release()
        except (QSharpError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # panics of Rust are no `Exception`
            logger.exception("loading the critic in %s failed", path)
            self._failed = True
            raise CriticError(f"{path} cannot be loaded: {type(error).__name__}: {str(error)[:500]}") from error

    def add(self, critic: LoadedCritic) -> str:
        """Makes a loaded critic available and returns its key. The first version of a name becomes the active one.

        Raises:
            CriticError: this version is loaded already, or requests still use it after it was unloaded.
        """
        key = critic.card.key
        present = self.critics.get(key)
        if present is not None and not present.leaving:
            raise CriticError(f"{key} is loaded already")
        if present is not None:
            raise CriticError(f"{key} is being unloaded: it is still used by {present.users} requests")
        self.critics[key] = critic
        self.active.setdefault(critic.card.name, key)
        self.default = self.default or critic.card.name
        return key

    def resolve(self, name: str | None) -> LoadedCritic:
        """The critic that a request names.

        Args:
            name: `name` (its active version) or `name@version`; None is the default critic's active version.

        Raises:
            NoCriticError: no critic is loaded, or the default is not.
            UnknownCriticError: this one is not.
        """
        wanted = self.default if name is None else name
        if wanted is None or not self.active or (name is None and wanted not in self.active):
            raise NoCriticError("guidance was asked for and no critic, or not the default one, is loaded", "critic")
        key = self.active.get(wanted, wanted)
        critic = self.critics.get(key)
        if critic is None or critic.leaving:
            raise UnknownCriticError(f"critic {name!r} is not loaded", "critic")
        return critic

    def activate(self, key: str) -> None:
        """Requests that name no version get this one from now on.

        Raises:
            UnknownCriticError: it is not loaded.
        """
        critic = self.critics.get(key)
        if critic is None or critic.leaving:
            raise UnknownCriticError(f"critic {key!r} is not loaded", "critic")
        self.active[critic.card.name] = key

    def unload(self, key: str) -> None:
        """No new request gets this version; it is freed as soon as no request uses it.

        Raises:
            UnknownCriticError: it is not loaded.
        """
        critic = self.critics.get(key)
        if critic is None:
            raise UnknownCriticError(f"critic {key!r} is not loaded", "critic")
        critic.leaving = True
        if self.active.get(critic.card.name) == key:
            del self.active[critic.card.name]
        self.collect()

    def collect(self) -> None:
        """Frees the versions that were unloaded and that no request uses, and what a failed load has left."""
        unused = [key for key, critic in self.critics.items() if critic.leaving and critic.users == 0]
        for key in unused:
            del self.critics[key]
        failed, self._failed = self._failed, False
        if unused or failed:
            gc.collect()  # modules and their hooks form cycles; their tensors are large
            # Not while another critic is being built: this would break the capture of its graphs.
            if torch.cuda.is_available() and self._building.acquire(blocking=False):
                torch.cuda.empty_cache()
                self._building.release()

    def describe(self) -> list[CriticStatus]:
        """The state of each loaded version, for the API process."""
        return [
            CriticStatus(
                name=critic.card.name,
                version=critic.card.version,
                path=str(critic.path),
                active=self.active.get(critic.card.name) == key,
                leaving=critic.leaving,
                users=critic.users,
                max_length=critic.max_length,
                native=critic.card.backbone == "reference",
                reward_range=critic.card.reward_range,
                kv_blocks=critic.cached_scorer.blocks.total if critic.cached_scorer else None,
                kv_blocks_used=critic.cached_scorer.blocks.used if critic.cached_scorer else None,
                card=critic.card.model_dump(mode="json", exclude_none=True),
            )
            for key, critic in self.critics.items()
        ]
