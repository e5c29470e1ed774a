"""What a loop has done, so that the same command goes on where it stopped: one journal entry for each stage that ended.

A stage that was killed is run again, and goes on by its own means: collecting has a journal, rewards are given to what
has none, an export is whole or not there, training has checkpoints, activating twice does no harm, an evaluation keeps
its samples.
"""

import time
from collections.abc import Awaitable, Callable
from typing import Any

from rich.console import Console

from trainer.journal import Journal

END = "end"
Work = Callable[[], Awaitable[dict[str, Any]]]


class LoopState:
    """The stages of all rounds.

    Args:
        journal: open, of this loop.
        console: told which stage begins.
    """

    def __init__(self, journal: Journal, console: Console) -> None:
        self._journal = journal
        self._console = console
        self._entries: dict[tuple[int, str], dict[str, Any]] = {
            (entry["round"], entry["stage"]): entry for entry in journal.entries
        }

    async def stage(self, number: int, name: str, work: Work) -> dict[str, Any]:
        """The result of a stage: that of the run that finished it, or of `work` now. It is JSON's data."""
        done = self.result(number, name)
        if done is not None:
            return done
        self._console.print(f"[bold]round {number}: {name}[/bold]", highlight=False)
        started = time.monotonic()
        result = await work()
        entry = {"round": number, "stage": name, "seconds": time.monotonic() - started, "result": result}
        self._journal.add(entry)
        self._entries[number, name] = entry
        return result

    def result(self, number: int, name: str) -> dict[str, Any] | None:
        """Of a stage that is done; None if it is not."""
        entry = self._entries.get((number, name))
        return None if entry is None else entry["result"]

    def seconds_of(self, number: int) -> dict[str, float]:
        """By stage, of the runs that finished it."""
        return {stage: entry["seconds"] for (n, stage), entry in self._entries.items() if n == number and stage != END}

    @property
    def seconds(self) -> float:
        """Of all stages together."""
        return sum(entry["seconds"] for entry in self._entries.values())

    @property
    def begun(self) -> int:
        """How many rounds were begun."""
        return len({number for number, _ in self._entries})

    @property
    def ended(self) -> int:
        """How many rounds have ended: the number of the next one."""
        return sum(stage == END for _, stage in self._entries)
