"""The long-running mode: a server is used, its rollouts get rewards from whoever judges them, and the critic keeps up.

It waits until enough rollouts that can be trained on are new in the store, trains the next version from all of them,
activates it if it is better, and waits again. A server that is away is waited for.

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
from rich.console import Console
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential
from tqdm import tqdm

from trainer.client import PassingError, ServerClient
from trainer.journal import Journal
from trainer.loop.activation import ServedCritic, Version
from trainer.loop.rounds import STATE, nothing
from trainer.loop.settings import Recipe
from trainer.loop.stages import ROLLOUTS, export_to
from trainer.loop.state import END, LoopState
from trainer.loop.training import activate_if_better, train_version
from trainer.training.settings import TrainingError

LONGEST_PAUSE = 60.0  # seconds between two looks for a server that is away


@dataclass(frozen=True, kw_only=True)
class WatchSettings:
    """What is waited for.

    Attributes:
        query: filters of `GET /v1/rollouts`.
        least: new rollouts that are worth a training.
        interval: seconds between two looks into the store.
        rounds: stop after so many; None: never.
    """

    recipe: Recipe
    query: tuple[tuple[str, str], ...] = ()
    least: int = 500
    interval: float = 60.0
    rounds: int | None = None

    def identity(self) -> dict[str, Any]:
        """What makes it this watch."""
        return {"format": 1, "command": "watch", "query": dict(self.query), **self.recipe.identity()}


async def watch(
    client: ServerClient, served: ServedCritic, settings: WatchSettings, folder: Path, console: Console
) -> None:
    """Runs until it is cancelled, or has made its rounds.

    Raises:
        ServerError: the server refuses.
        JournalError
    """

    def say(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        console.print(f"{error}; trying again", style="yellow", highlight=False)

    with Journal(folder / STATE, settings.identity()) as journal:
        state = LoopState(journal, console)
        watcher = _Watcher(client, served, settings, folder, state, console)
        trying = AsyncRetrying(
            retry=retry_if_exception_type(PassingError), wait=wait_random_exponential(1.0, LONGEST_PAUSE),
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

    async def round(self, number: int) -> None:
        """One version; stages that are done are skipped."""
        recipe, folder, stage = self._settings.recipe, self._folder / f"round-{number}", self._state.stage
        folder.mkdir(parents=True, exist_ok=True)
        await stage(number, "wait", lambda: self._wait(number))
        begun = await stage(number, "begin", lambda: self._begin(number))
        active = Version.of(begun["critic"], recipe.out)
        report = await stage(number, "train", lambda: self._train(folder, active))
        if "failed" not in report:
            done = await stage(number, "activate", lambda: activate_if_better(self._served, recipe, report, active))
            self._console.print(f"{report['critic']}: {done['why']}", highlight=False)
        await stage(number, END, nothing)
        if number:
            shutil.rmtree(self._folder / f"round-{number - 1}", ignore_errors=True)

    async def _wait(self, number: int) -> dict[str, Any]:
        """Until enough is new; the round's file then has all."""
        before = self._folder / f"round-{number - 1}" / ROLLOUTS
        known = trainable(before) if number else set[str]()
        path, least = self._folder / f"round-{number}" / ROLLOUTS, self._settings.least
        query = {**dict(self._settings.query), "has_reward": "true"}
        with tqdm(total=least, unit="rollout", desc="new") as bar:
            while True:
                rows = await export_to(self._client, path, query)
                found = await asyncio.to_thread(trainable, path)
                new = len(found - known)
                bar.update(new - bar.n)
                if new >= least:
                    return {"rows": rows, "trainable": len(found), "new": new}
                await self._look_after(number)
                await asyncio.sleep(self._settings.interval)

    async def _look_after(self, number: int) -> None:
        """A server that was restarted has lost the version that was activated last."""
        if (remembered := self._remembered(number)) is not None:
            await self._served.current(remembered)

    async def _begin(self, number: int) -> dict[str, Any]:
        active = await self._served.current(self._remembered(number))
        return {"critic": active.key if active else None}

    async def _train(self, folder: Path, active: Version | None) -> dict[str, Any]:
        try:
            return await train_version(self._settings.recipe, folder, [folder / ROLLOUTS], active)
        except TrainingError as error:
            # More rollouts may help: too few prompts to hold some out, rewards that are all the same.
            self._console.print(f"{error}; waiting for more rollouts", style="red", highlight=False)
            return {"failed": str(error)}

    def _remembered(self, number: int) -> Version | None:
        for before in reversed(range(number)):
            if (done := self._state.result(before, "activate")) is not None:
                return Version.of(done["critic"], self._settings.recipe.out)
        return None


def trainable(path: Path) -> set[str]:
    """Ids of the rollouts in an export that have a reward and a position that may be trained on."""
    columns = ["id", "completion_token_ids", "first_valid_position", "reward"]
    found: set[str] = set()
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=columns):
            first = batch["first_valid_position"].to_numpy(zero_copy_only=False).astype(float)
            lengths = batch["completion_token_ids"].value_lengths().to_numpy(zero_copy_only=False)
            rewards = batch["reward"].to_numpy(zero_copy_only=False).astype(float)
            chosen = np.nonzero((first < lengths) & ~np.isnan(rewards))[0]  # a comparison with NaN is False
            found.update(batch["id"][i].as_py() for i in chosen.tolist())
    return found
