"""The long-running mode: a server is used, its rollouts get rewards from whoever judges them, and the critic keeps up.

A watch waits until enough rollouts that can be trained on are new in the store, trains the next version from all of
them, activates it if it is better, and waits again. A server that is away is waited for.

    RUN/state.jsonl           the stages that are done
    RUN/round-0/              the round's files: rollouts.parquet, training/
"""

import asyncio
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from pydantic import TypeAdapter
from rich.console import Console
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential
from tqdm import tqdm

from trainer.loop.activation import ServedCritic
from trainer.loop.report import ActivateResult, BeginResult, FailedTraining, WaitResult
from trainer.loop.rounds import STATE
from trainer.loop.settings import CriticRecipe
from trainer.loop.stages import ROLLOUTS, export_to
from trainer.loop.state import LoopState
from trainer.loop.training import activate_if_better, train_version
from trainer.loop.trial import Trial, TrialSettings
from trainer.loop.versions import Version
from trainer.rollouts.client import ServerClient, StoredCount
from trainer.rollouts.errors import TransientError
from trainer.rollouts.journal import Journal
from trainer.training.report import TrainingReport
from trainer.training.settings import TrainingError
from trainer.trust import EVERYBODY, Trust

LONGEST_PAUSE = 60.0  # seconds between two looks for a server that is away
TRAINING: TypeAdapter[TrainingReport | FailedTraining] = TypeAdapter(TrainingReport | FailedTraining)


@dataclass(frozen=True, kw_only=True)
class WatchSettings:
    """What a watch does.

    Attributes:
        recipe: how versions are made.
        query: filters of `GET /v1/rollouts` for the rollouts that are learned from.
        least: the number of new rollouts that a training is worth.
        interval: seconds between two looks into the store.
        rounds: the watch stops after so many; None is never.
        trial: how a new version is tried on live traffic before it is activated; None: it is not.
        trust: whose rollouts and rewards are learned from.
    """

    recipe: CriticRecipe
    query: tuple[tuple[str, str], ...] = ()
    least: int = 500
    interval: float = 60.0
    rounds: int | None = None
    trial: TrialSettings | None = None
    trust: Trust = EVERYBODY

    def identity(self) -> dict[str, Any]:
        """What tells this watch from others, as JSON's data."""
        common = {"format": 1, "command": "watch", "query": dict(self.query)}
        return {**common, **self.recipe.identity(), **self.trust.identity()}


async def watch(
    client: ServerClient, served: ServedCritic, settings: WatchSettings, folder: Path, console: Console
) -> None:
    """Runs until it is cancelled, or has made as many rounds as the settings say.

    Raises:
        RequestError: the server refuses.
        JournalError
    """

    def say(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        console.print(f"{error}; trying again", style="yellow", highlight=False)

    with Journal(folder / STATE, settings.identity()) as journal:
        state = LoopState(journal, console)
        watcher = _Watcher(client, served, settings, folder, state, console)
        trying = AsyncRetrying(
            retry=retry_if_exception_type(TransientError), wait=wait_random_exponential(1.0, LONGEST_PAUSE),
            before_sleep=say,
        )  # fmt: skip
        while settings.rounds is None or state.ended < settings.rounds:
            await trying(watcher.round, state.ended)


class _Watcher:
    def __init__(
        self,
        client: ServerClient,
        served: ServedCritic,
        settings: WatchSettings,
        folder: Path,
        state: LoopState,
        console: Console,
    ) -> None:
        self._client = client
        self._served = served
        self._settings = settings
        self._folder = folder
        self._state = state
        self._console = console
        self._trial = None if settings.trial is None else Trial(client, served, settings.trial, console)

    async def round(self, number: int) -> None:
        """Makes one version; stages that are done are skipped."""
        recipe, folder, state = self._settings.recipe, self._folder / f"round-{number}", self._state
        folder.mkdir(parents=True, exist_ok=True)
        await state.stage(number, "wait", WaitResult, lambda: self._wait(number))
        begun = await state.stage(number, "begin", BeginResult, lambda: self._begin(number))
        active = None if begun.critic is None else Version.of(begun.critic, recipe.out)
        report = await state.stage(number, "train", TRAINING, lambda: self._train(folder, active))
        if isinstance(report, TrainingReport):
            done = await state.stage(
                number,
                "activate",
                ActivateResult,
                lambda: activate_if_better(self._served, recipe, report, active, self._trial),
            )
            self._console.print(f"{report.critic}: {done.why}", highlight=False)
        await state.end(number)
        if number:
            shutil.rmtree(self._folder / f"round-{number - 1}", ignore_errors=True)

    async def _wait(self, number: int) -> WaitResult:
        """Waits until enough rollouts are new; the round's file then has all of them, old and new."""
        before = self._folder / f"round-{number - 1}" / ROLLOUTS
        known = trainable(before) if number else set[str]()
        last = self._state.result(number - 1, "wait", WaitResult) if number else None
        since = None if last is None else last.last_reward
        path, least = self._folder / f"round-{number}" / ROLLOUTS, self._settings.least
        query = {**dict(self._settings.query), **self._settings.trust.rewards, "has_reward": "true"}
        excess = 0  # what counts have too many: rewards that were given between a count and the file
        with tqdm(total=least, unit="rollout", desc="new") as bar:
            while True:
                stored = await count_trainable(self._client, query, since)
                new = stored.count - excess - (len(known) if since is None else 0)
                bar.update(new - bar.n)
                if new >= least:
                    rows = await export_to(self._client, path, query)
                    ids = await asyncio.to_thread(trainable, path)
                    exact = len(ids - known)
                    if exact >= least:
                        return WaitResult(rows=rows, trainable=len(ids), new=exact, last_reward=stored.last_reward)
                    excess += new - exact
                await self._look_after(number)
                await asyncio.sleep(self._settings.interval)

    async def _look_after(self, number: int) -> None:
        """Loads the version that was activated last where a restarted server has lost it."""
        if (remembered := self._remembered(number)) is not None:
            await self._served.current(remembered)

    async def _begin(self, number: int) -> BeginResult:
        active = await self._served.current(self._remembered(number))
        return BeginResult(critic=active.key if active else None)

    async def _train(self, folder: Path, active: Version | None) -> TrainingReport | FailedTraining:
        try:
            return await train_version(self._settings.recipe, folder, [folder / ROLLOUTS], active)
        except TrainingError as error:
            # More rollouts may help: too few prompts to hold some out, rewards that are all the same.
            self._console.print(f"{error}; waiting for more rollouts", style="red", highlight=False)
            return FailedTraining(failed=str(error))

    def _remembered(self, number: int) -> Version | None:
        key = self._state.active_after(number)
        return None if key is None else Version.of(key, self._settings.recipe.out)


async def count_trainable(client: ServerClient, query: dict[str, str], since: int | None) -> StoredCount:
    """The number of stored rollouts that can be trained on, among those that the query leaves.

    Args:
        client: of the server.
        query: filters of `GET /v1/rollouts`.
        since: only those that got their first reward after this place in the order of rewards; None: all. A look then
            takes as long as there are new rewards, however many rollouts are stored.

    Raises:
        RequestError
    """
    later: dict[str, str] = {} if since is None else {"rewarded_after": str(since)}
    return await client.counted({**query, **later, "has_valid_position": "true"})


def trainable(path: Path) -> set[str]:
    """Ids of the rollouts in an export that have a reward and a position that may be trained on."""
    columns = ["id", "completion_token_ids", "first_valid_position", "reward"]
    ids: set[str] = set()
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=columns):
            first = batch["first_valid_position"].to_numpy(zero_copy_only=False).astype(float)
            lengths = batch["completion_token_ids"].value_lengths().to_numpy(zero_copy_only=False)
            rewards = batch["reward"].to_numpy(zero_copy_only=False).astype(float)
            chosen = np.nonzero((first < lengths) & ~np.isnan(rewards))[0]  # a comparison with NaN is False
            ids.update(batch["id"][i].as_py() for i in chosen.tolist())
    return ids
