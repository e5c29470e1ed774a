"""Critics that are loaded while the engine runs: each in a thread of its own, which is given up if it takes too long.

Nothing ends a thread that waits for a dead disk. It is left alone then: nobody waits for it any more, other critics are
loaded beside it, and the process ends without it.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path

from qsharp_core.errors import CriticError
from qsharp_core.vllm_plugin.registry import LoadedCritic

MOST_AT_ONCE = 8


class CriticLoads:
    """The loads that run in this worker.

    Args:
        load: `(path, name or None) -> LoadedCritic`; called in a thread.
        patience: seconds that a load may take.
    """

    def __init__(self, load: Callable[[Path, str | None], LoadedCritic], patience: float) -> None:
        self._load, self._patience = load, patience
        self._running: dict[tuple[str, str | None], _Load] = {}

    def poll(self, path: str, name: str | None) -> LoadedCritic | None:
        """The critic, once it is loaded. The first call begins to load it; None until it is there.

        Args:
            path: the critic's folder.
            name: the name that requests use; None for the one on the card.

        Raises:
            CriticError: it cannot be loaded, takes too long, or too many others do.
        """
        self._running = {key: load for key, load in self._running.items() if not (load.given_up and load.done)}
        load = self._running.get((path, name))
        if load is None:
            if len(self._running) == MOST_AT_ONCE:
                raise CriticError(f"{path} was not loaded: {MOST_AT_ONCE} other loads have not ended")
            self._running[path, name] = _Load(self._load, Path(path), name)
            return None
        if load.given_up:
            raise CriticError(f"{path} was not loaded: an earlier load of it was given up and still hangs")
        if load.done:
            del self._running[path, name]
            return load.result()
        if load.seconds > self._patience:
            load.given_up = True
            raise CriticError(
                f"{path} was given up: it was not loaded within {self._patience:g} s (--critic-load-seconds)"
            )
        return None


class _Load:
    """A load in its thread.

    Attributes:
        given_up: whether nobody waits for it any more.
    """

    def __init__(self, load: Callable[[Path, str | None], LoadedCritic], path: Path, name: str | None) -> None:
        self.given_up = False
        self._began = time.monotonic()
        self._critic: LoadedCritic | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(load, path, name), name="qsharp-load", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def result(self) -> LoadedCritic:
        if self._error is not None:
            raise self._error
        assert self._critic is not None
        return self._critic

    def _run(self, load: Callable[[Path, str | None], LoadedCritic], path: Path, name: str | None) -> None:
        try:
            self._critic = load(path, name)
        except BaseException as error:  # raised where it is waited for
            self._error = error
