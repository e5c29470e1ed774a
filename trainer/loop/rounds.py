"""Rounds of collect, reward, export, train, activate, evaluate, against a running server.

Round 0 is unguided. Later rounds roll in with the active critic and roll out with the reference. Each round trains the
next version on the rollouts of all rounds so far. A version is activated if it beats the active one on held-out
rollouts; the first must beat the best constant. Otherwise it stays published, and the next round goes on with the
version before.

    RUN/state.jsonl           the stages that are done
    RUN/round-0/              the round's files: collect.jsonl, rollouts.parquet, training/, evaluation/
    RUN/report.json           what came of it, written after each stage
"""

from collections.abc import Awaitable, Callable
from pathlib import Path

from rich.console import Console

from qsharp_core.locations import Location
from trainer.loop import stages
from trainer.loop.activation import ServedCritic
from trainer.loop.report import (
    ActivateResult,
    BeginResult,
    CollectResult,
    EvaluateResult,
    ExportResult,
    JudgeResult,
    LoopReport,
    RoundReport,
)
from trainer.loop.settings import Budget, LoopSettings
from trainer.loop.state import LoopState, Result
from trainer.loop.training import activate_if_better, train_version
from trainer.loop.versions import Version
from trainer.rewards.verifiers import Judge
from trainer.rollouts.client import ServerClient
from trainer.rollouts.journal import Journal
from trainer.training.report import TrainingReport
from trainer.training.settings import TrainingError

STATE, REPORT = "state.jsonl", "report.json"
GATHERED = ("collect", "reward", "export")
"""The stages that make a round's file of rollouts."""


async def run_loop(
    client: ServerClient,
    served: ServedCritic,
    judge: Judge,
    settings: LoopSettings,
    budget: Budget,
    folder: Path,
    console: Console,
) -> LoopReport:
    """Runs rounds until the budget is spent.

    Args:
        client: of the server.
        served: the critic's versions in the server; its client has the admin key.
        judge: who gives rewards.
        settings: what is done in each round.
        budget: when to stop.
        folder: of the loop.
        console: is told which stage begins.

    Returns:
        The report.

    Raises:
        LoopError, TrainingError: a stage cannot be done; the same command tries it again. After a training that failed
            it also samples, judges and exports what has changed since.
        RequestError, CollectError, EvaluateError, JournalError, TaskError
    """
    with Journal(folder / STATE, settings.identity(judge)) as journal:
        state = LoopState(journal, console)
        loop = _Loop(client, served, judge, settings, folder, state)
        problems = len(settings.task.task.of_split(settings.split)[: settings.limit])
        while _fits(budget, state, settings, problems):
            await loop.round(state.ended)
        return loop.report()


def _fits(budget: Budget, state: LoopState, settings: LoopSettings, problems: int) -> bool:
    if state.begun > state.ended:
        return True  # what was begun is brought to its end
    rollouts = problems * sum(settings.rollouts_of(number) for number in range(state.ended + 1))
    return not (
        (budget.rounds is not None and state.ended >= budget.rounds)
        or (budget.rollouts is not None and rollouts > budget.rollouts)
        or (budget.seconds is not None and state.seconds >= budget.seconds)
    )


class _Loop:
    def __init__(
        self,
        client: ServerClient,
        served: ServedCritic,
        judge: Judge,
        settings: LoopSettings,
        folder: Path,
        state: LoopState,
    ) -> None:
        self._client = client
        self._served = served
        self._judge = judge
        self._settings = settings
        self._folder = folder
        self._state = state

    async def round(self, number: int) -> None:
        """Runs one round; stages that are done are skipped."""
        client, judge, settings, out = self._client, self._judge, self._settings, self._settings.recipe.out
        folder = self._folder / f"round-{number}"
        folder.mkdir(parents=True, exist_ok=True)

        begun = await self._stage(number, "begin", BeginResult, lambda: self._begin(number))
        active = _version(begun.critic, out)
        await self._served.current(active)  # a restarted server may have lost it
        data = [await self._gather(n) for n in range(number + 1)]
        try:
            report = await self._stage(
                number, "train", TrainingReport, lambda: train_version(settings.recipe, folder, data, active)
            )
        except TrainingError:
            # What is mended now (prompts, verifiers, rewards) must reach the next try.
            for n in range(number + 1):
                self._state.reopen(n, GATHERED)
            raise
        activated = await self._stage(
            number,
            "activate",
            ActivateResult,
            lambda: activate_if_better(self._served, settings.recipe, report, active),
        )
        plan = settings.evaluation
        # The same version, measured again, would be the same samples.
        if plan is not None and (activated.activated or number == 0):
            now = _version(activated.critic, out)
            await self._served.current(now)
            await self._stage(
                number,
                "evaluate",
                EvaluateResult,
                lambda: stages.evaluate_all(client, judge, settings, plan, now, folder),
            )
        await self._state.end(number)
        self.report().write(self._folder / REPORT)

    async def _gather(self, number: int) -> Path:
        """The file of a round's rollouts; what it takes to have it is done if it is not."""
        client, judge, settings = self._client, self._judge, self._settings
        folder = self._folder / f"round-{number}"
        begun = self._state.result(number, "begin", BeginResult)
        assert begun is not None
        collection = stages.collection_of(settings, number, begun.critic)
        await self._stage(
            number,
            "collect",
            CollectResult,
            lambda: stages.collect_all(client, settings, collection, folder, self._state.say),
        )
        await self._stage(
            number,
            "reward",
            JudgeResult,
            lambda: stages.reward_all(client, judge, settings, collection, self._state.say),
        )
        await self._stage(
            number,
            "export",
            ExportResult,
            lambda: stages.export_all(client, judge, collection, folder, settings.trust, self._state.say),
        )
        return folder / stages.ROLLOUTS

    def report(self) -> LoopReport:
        """The report of all rounds, as far as they are."""
        state = self._state
        rounds = [
            RoundReport(
                round=number,
                begin=state.result(number, "begin", BeginResult),
                collect=state.result(number, "collect", CollectResult),
                reward=state.result(number, "reward", JudgeResult),
                export=state.result(number, "export", ExportResult),
                train=state.result(number, "train", TrainingReport),
                activate=state.result(number, "activate", ActivateResult),
                evaluate=state.result(number, "evaluate", EvaluateResult),
                seconds=state.seconds_of(number),
            )
            for number in range(state.begun)
        ]
        return LoopReport(critic=state.active_after(state.begun), seconds=state.seconds, rounds=rounds)

    async def _stage(self, number: int, name: str, kind: type[Result], work: Callable[[], Awaitable[Result]]) -> Result:
        result = await self._state.stage(number, name, kind, work)
        self.report().write(self._folder / REPORT)
        return result

    async def _begin(self, number: int) -> BeginResult:
        remembered = _version(self._state.active_after(number), self._settings.recipe.out)
        active = await self._served.current(remembered)
        return BeginResult(critic=active.key if active else None)


def _version(key: str | None, out: Location) -> Version | None:
    return None if key is None else Version.of(key, out)
