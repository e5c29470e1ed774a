"""What a loop has done, so that the same command goes on where it stopped: one journal entry for each stage that ended.

A stage that was killed is run again, and goes on by its own means: collecting has a journal, rewards are given to what
has none, an export is whole or not there, training has checkpoints, activating twice does no harm, an evaluation keeps
its samples.
"""

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, JsonValue, TypeAdapter
from rich.console import Console

from trainer.loop.report import ActivateResult, EndResult
from trainer.reports import ReportPart
from trainer.rollouts.journal import Journal

END = "end"
Result = TypeVar("Result", bound=ReportPart)


class StageEntry(BaseModel):
    """An entry of the journal: a stage that has ended.

    Attributes:
        round: number of the round, from 0.
        stage: name of the stage.
        seconds: of the run that finished it.
        result: the stage's result as JSON's data; its model is in `loop.report`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    round: int
    stage: str
    seconds: float
    result: dict[str, JsonValue]


class ReopenedEntry(BaseModel):
    """An entry of the journal: stages of a round whose results do not hold any more, so that they are done anew."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    round: int
    reopened: list[str]


_ENTRY: TypeAdapter[StageEntry | ReopenedEntry] = TypeAdapter(StageEntry | ReopenedEntry)


class LoopState:
    """The stages of all rounds.

    Args:
        journal: the loop's; it is open.
        console: is told which stage begins.
    """

    def __init__(self, journal: Journal, console: Console) -> None:
        self._journal = journal
        self._console = console
        self._entries: dict[tuple[int, str], StageEntry] = {}
        for entry in map(_ENTRY.validate_python, journal.entries):
            if isinstance(entry, StageEntry):
                self._entries[entry.round, entry.stage] = entry
            else:
                self._forget(entry)

    async def stage(
        self, number: int, name: str, kind: type[Result] | TypeAdapter[Result], work: Callable[[], Awaitable[Result]]
    ) -> Result:
        """The result of a stage: of the run that finished it, or of `work` now.

        Args:
            number: of the round.
            name: of the stage.
            kind: the model of its result, or an adapter of several models.
            work: does it.
        """
        done = self.result(number, name, kind)
        if done is not None:
            return done
        self._console.print(f"[bold]round {number}: {name}[/bold]", highlight=False)
        started = time.monotonic()
        result = await work()
        entry = StageEntry(
            round=number, stage=name, seconds=time.monotonic() - started, result=result.model_dump(mode="json")
        )
        self._journal.add(entry.model_dump(mode="json"))
        self._entries[number, name] = entry
        return result

    def reopen(self, number: int, names: Sequence[str]) -> None:
        """Notes that some stages of a round are to be done anew; those that are not done are left as they are."""
        entry = ReopenedEntry(round=number, reopened=list(names))
        self._journal.add(entry.model_dump(mode="json"))
        self._forget(entry)

    def say(self, text: str) -> None:
        """Tells people something."""
        self._console.print(text, highlight=False)

    async def end(self, number: int) -> None:
        """Notes that a round has ended."""

        async def nothing() -> EndResult:
            return EndResult()

        await self.stage(number, END, EndResult, nothing)

    def _forget(self, entry: ReopenedEntry) -> None:
        for name in entry.reopened:
            self._entries.pop((entry.round, name), None)

    def result(self, number: int, name: str, kind: type[Result] | TypeAdapter[Result]) -> Result | None:
        """The result of a stage that is done; None if it is not."""
        entry = self._entries.get((number, name))
        if entry is None:
            return None
        adapter = kind if isinstance(kind, TypeAdapter) else TypeAdapter(kind)
        return adapter.validate_python(entry.result)

    def active_after(self, rounds: int) -> str | None:
        """The version that the first `rounds` rounds left active, `name@version`; None if there was none."""
        for number in reversed(range(rounds)):
            done = self.result(number, "activate", ActivateResult)
            if done is not None:
                return done.critic
        return None

    def seconds_of(self, number: int) -> dict[str, float]:
        """Seconds by stage of a round, of the runs that finished the stages."""
        return {stage: entry.seconds for (n, stage), entry in self._entries.items() if n == number and stage != END}

    @property
    def seconds(self) -> float:
        """Seconds of all stages together."""
        return sum(entry.seconds for entry in self._entries.values())

    @property
    def begun(self) -> int:
        """The number of rounds that were begun."""
        return len({number for number, _ in self._entries})

    @property
    def ended(self) -> int:
        """The number of rounds that have ended, which is also the number of the next round."""
        return sum(stage == END for _, stage in self._entries)
