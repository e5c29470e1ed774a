"""Asks the server for rollouts without a reward, has them judged, and gives the rewards.

There is nothing to resume: a rollout that has its reward is not asked for again, and a reward given twice changes
nothing. A rollout that could not be judged stays without one.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qsharp_core.wire.metadata import PROBLEM, SPLIT, TASK
from trainer.client import RefusedError, ServerClient, each
from trainer.rewards.base import Case
from trainer.rewards.verifiers import Judge, Tally, TaskRef, Verdict
from trainer.tasks import registry
from trainer.tasks.base import Problem, TaskError


@dataclass
class Rewarded:
    """What a run of the command did; `changed` had another reward before, or none; `gone` were deleted meanwhile."""

    tally: Tally = field(default_factory=Tally)
    given: int = 0
    changed: int = 0
    gone: int = 0
    failures: list[dict[str, str]] = field(default_factory=list)
    seconds: float = 0.0


class Problems:
    """Finds a stored rollout's problem, by what `qsharp collect` put into its metadata.

    Args:
        given: tasks beyond those that are registered. A name that comes with a rollout is never imported by itself.
    """

    def __init__(self, given: Sequence[TaskRef] = ()) -> None:
        self._tasks: dict[str, TaskRef | None] = {ref.task.name: ref for ref in given}
        self._problems: dict[tuple[str, str], dict[str, Problem]] = {}

    def of(self, rollout: Mapping[str, Any]) -> tuple[TaskRef | None, Problem | None]:
        """The rollout's task and problem; None for what is not known."""
        metadata = rollout["metadata"]
        name, split = metadata.get(TASK), metadata.get(SPLIT, "")
        if name is None:
            return None, None
        if name not in self._tasks:
            known = registry.is_registered(name)
            self._tasks[name] = TaskRef(registry.find_task(name), name) if known else None
        task = self._tasks[name]
        if task is None:
            return None, None
        if (name, split) not in self._problems:
            try:
                found = task.task.of_split(split)
            except TaskError:
                found = []
            self._problems[name, split] = {problem.id: problem for problem in found}
        return task, self._problems[name, split].get(metadata.get(PROBLEM, ""))


async def reward(
    client: ServerClient,
    judge: Judge,
    problems: Problems,
    *,
    source: str,
    filters: Mapping[str, str] | None = None,
    again: bool = False,
    batch: int = 200,
    concurrency: int = 16,
    failures: Path | None = None,
) -> Rewarded:
    """Gives rewards.

    Args:
        source: kept with every reward: who judged.
        filters: of `GET /v1/rollouts`.
        again: judges those that have a reward, too.
        batch: rollouts asked for, and rewards given, at a time.
        concurrency: completions judged at once.
        failures: JSON lines `{rollout, verifier, reason}` are appended to this file.

    Raises:
        ServerError
    """
    result = Rewarded()
    started = time.monotonic()
    query: dict[str, str | int] = dict(filters or {})
    if not again:
        query["has_reward"] = "false"
    with tqdm(unit="rollout", desc="reward", smoothing=0.05) as bar:
        async for page in client.pages(query, batch):
            verdicts: list[Verdict] = [Verdict(None)] * len(page)

            async def one(index: int, page: list[dict[str, Any]] = page, verdicts: list[Verdict] = verdicts) -> None:
                task, problem = problems.of(page[index])
                verdicts[index] = await judge.judge(case_of(page[index], problem), task)
                bar.update()

            await each(range(len(page)), one, concurrency)
            judged = list(zip([rollout["id"] for rollout in page], verdicts, strict=True))
            _count(result, judged, judge, failures)
            await _give(client, result, judged, source)
            mean = result.tally.mean
            bar.set_postfix(mean="–" if mean is None else f"{mean:.3f}", failed=result.tally.failed, refresh=False)
    result.seconds = time.monotonic() - started
    return result


def case_of(rollout: Mapping[str, Any], problem: Problem | None) -> Case:
    """A stored rollout, to be judged."""
    return Case(
        completion=rollout["completion_text"],
        problem=problem,
        prompt=rollout["prompt_text"],
        messages=rollout["messages"],
        rollout=rollout,
    )


def _count(result: Rewarded, judged: list[tuple[str, Verdict]], judge: Judge, path: Path | None) -> None:
    new = []
    for rollout, verdict in judged:
        result.tally.add(verdict, judge.verifiers)
        new += [{"rollout": rollout, "verifier": name, "reason": why} for name, why in verdict.failures.items()]
    result.failures += new
    if path is not None and new:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in new)


async def _give(client: ServerClient, result: Rewarded, judged: list[tuple[str, Verdict]], source: str) -> None:
    items = [{"id": rollout, "reward": v.reward, "source": source} for rollout, v in judged if v.reward is not None]
    while items:
        try:
            answer = await client.post("/v1/rollouts/rewards", {"items": items})
        except RefusedError as error:
            gone = {problem.get("id") for problem in error.details.get("items", ()) if problem.get("param") == "id"}
            if not gone:
                raise
            # Deleted since they were listed; none of the batch was given.
            result.gone += sum(item["id"] in gone for item in items)
            items = [item for item in items if item["id"] not in gone]
            continue
        result.given += len(items)
        result.changed += sum(given["changed"] for given in answer["data"])
        return
