"""Rounds of collect, reward, export, train, activate, evaluate, against a running server.

Round 0 is unguided. Later rounds roll in with the active critic and roll out with the reference. Each round trains the
next version on the rollouts of all rounds so far. It is activated if it beats the active one on held-out rollouts (the
first: if it beats the best constant); if not, it stays published, and the next round goes on with the one before.

    RUN/state.jsonl           the stages that are done
    RUN/round-0/              the round's files: collect.jsonl, rollouts.parquet, training/, evaluation/
    RUN/report.json           what came of it, written after each stage
"""

from pathlib import Path
from typing import Any

from rich.console import Console

from trainer.client import ServerClient
from trainer.evaluate import write_json
from trainer.journal import Journal
from trainer.loop import stages
from trainer.loop.activation import ServedCritic, Version
from trainer.loop.settings import Budget, LoopSettings
from trainer.loop.state import END, LoopState, Work
from trainer.loop.training import activate_if_better, train_version
from trainer.rewards.verifiers import Judge

STATE, REPORT = "state.jsonl", "report.json"


async def run_loop(
    client: ServerClient,
    served: ServedCritic,
    judge: Judge,
    settings: LoopSettings,
    budget: Budget,
    folder: Path,
    console: Console,
) -> dict[str, Any]:
    """Runs rounds until the budget is spent.

    Args:
        client: of the server.
        served: the critic's versions there; its client has the admin key.
        folder: the run's.

    Returns:
        The report.

    Raises:
        LoopError, TrainingError: a stage cannot be done; the same command tries it again.
        ServerError, CollectError, EvaluateError, JournalError, TaskError
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
        """One round; stages that are done are skipped."""
        settings, folder = self._settings, self._folder / f"round-{number}"
        folder.mkdir(parents=True, exist_ok=True)

        begun = await self._stage(number, "begin", lambda: self._begin(number))
        active = Version.of(begun["critic"], settings.recipe.out)
        await self._served.current(active)  # a restarted server may have lost it
        collection = stages.collection_of(settings, number, active)
        await self._stage(number, "collect", lambda: stages.collect_all(self._client, settings, collection, folder))
        await self._stage(number, "reward", lambda: stages.reward_all(self._client, self._judge, settings, collection))
        await self._stage(number, "export", lambda: stages.export_all(self._client, collection, folder))
        data = [self._folder / f"round-{n}" / stages.ROLLOUTS for n in range(number + 1)]
        report = await self._stage(number, "train", lambda: train_version(settings.recipe, folder, data, active))
        activated = await self._stage(
            number, "activate", lambda: activate_if_better(self._served, settings.recipe, report, active)
        )
        plan = settings.evaluation
        # The same version, measured again, would be the same samples.
        if plan is not None and (activated["activated"] or number == 0):
            now = Version.of(activated["critic"], settings.recipe.out)
            await self._served.current(now)
            await self._stage(
                number, "evaluate", lambda: stages.evaluate_all(self._client, self._judge, settings, plan, now, folder)
            )
        await self._stage(number, END, nothing)

    def report(self) -> dict[str, Any]:
        """Of all rounds, as far as they are."""
        rounds = []
        for number in range(self._state.begun):
            found = {name: self._state.result(number, name) for name in stages.STAGES}
            rounds.append({"round": number, **found, "seconds": self._state.seconds_of(number)})
        return {"critic": self._remembered(self._state.begun), "seconds": self._state.seconds, "rounds": rounds}

    async def _stage(self, number: int, name: str, work: Work) -> dict[str, Any]:
        result = await self._state.stage(number, name, work)
        write_json(self._folder / REPORT, self.report())
        return result

    async def _begin(self, number: int) -> dict[str, Any]:
        remembered = Version.of(self._remembered(number), self._settings.recipe.out)
        active = await self._served.current(remembered)
        return {"critic": active.key if active else None}

    def _remembered(self, number: int) -> str | None:
        """The version that the rounds before a round left active."""
        for before in reversed(range(number)):
            done = self._state.result(before, "activate")
            if done is not None:
                key: str | None = done["critic"]
                return key
        return None


async def nothing() -> dict[str, Any]:
    """What a round's end does: it is noted."""
    return {}
