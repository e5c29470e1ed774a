"""Has stored rollouts judged, and gives them their rewards.

There is nothing to resume: a rollout that has its reward is not asked for again, and a reward given twice changes
nothing. A rollout that could not be judged stays without one.
"""

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qsharp_core.wire.metadata import PARENT
from trainer.rewards.base import Case
from trainer.rewards.problems import Problems, unknown
from trainer.rewards.verifiers import Judge, Tally, Verdict
from trainer.rollouts.client import JSONObject, ServerClient
from trainer.rollouts.concurrency import each
from trainer.rollouts.errors import RefusedError
from trainer.tasks.base import Problem

EXTREMES = 3
"""Of so many of the least rewards, and of so many of the greatest ones, an example is kept."""


@dataclass
class Rewarded:
    """What one run of `reward` did.

    Attributes:
        tally: what became of the completions.
        own: of those of them that the reference sampled alone, from their beginning.
        values: how many completions earned each reward.
        examples: the first completion that earned it, of the `extremes`.
        given: rewards that the server took.
        changed: those of them that differ from what the rollout had before.
        seen: rollouts that were judged, or tried.
        gone: rollouts that were deleted meanwhile.
        unknown: rollouts that were collected for a problem which is in none of the tasks.
        failures: `{rollout, verifier, reason}`.
    """

    tally: Tally = field(default_factory=Tally)
    own: Tally = field(default_factory=Tally)
    values: Counter[float] = field(default_factory=Counter)
    examples: dict[float, str] = field(default_factory=dict)
    given: int = 0
    changed: int = 0
    seen: int = 0
    gone: int = 0
    unknown: int = 0
    failures: list[dict[str, str]] = field(default_factory=list)
    seconds: float = 0.0


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
    """Judges stored rollouts, and gives them rewards.

    Args:
        client: of the server that stores the rollouts.
        judge: who judges.
        problems: finds the problems that the rollouts answer.
        source: who judged, which is kept with every reward.
        filters: of `GET /v1/rollouts`.
        again: whether rollouts that have a reward are judged, too.
        batch: rollouts of a request, and of a batch of rewards.
        concurrency: completions that are judged at once.
        failures: a file that JSON lines `{rollout, verifier, reason}` are appended to.

    Raises:
        VerifierError: nothing can be judged; see `Judge.judge`.
        RequestError
    """
    result = Rewarded()
    started = time.monotonic()
    query: dict[str, str | int] = dict(filters or {})
    if not again:
        query["has_reward"] = "false"
    with tqdm(unit="rollout", desc="reward", smoothing=0.05) as bar:
        async for page in client.pages(query, batch):
            verdicts: list[Verdict] = [Verdict(None)] * len(page)
            result.seen += len(page)

            async def one(index: int, page: list[JSONObject] = page, verdicts: list[Verdict] = verdicts) -> None:
                task, problem = problems.of(page[index])
                note = "" if problem is not None else unknown(page[index])
                result.unknown += bool(note)
                verdicts[index] = await judge.judge(case_of(page[index], problem), task, note)
                bar.update()

            await each(range(len(page)), one, concurrency)
            for rollout, verdict in zip(page, verdicts, strict=True):
                if rollout["eta"] is None and PARENT not in (rollout["metadata"] or {}):
                    result.own.add(verdict, ())
                if verdict.reward is not None:
                    result.values[verdict.reward] += 1
                    result.examples.setdefault(verdict.reward, rollout["completion_text"])
            result.examples = {value: result.examples[value] for value in extremes(result.values)}
            judged = list(zip([rollout["id"] for rollout in page], verdicts, strict=True))
            _count(result, judged, judge, failures)
            await _give(client, result, judged, source)
            mean = result.tally.mean
            bar.set_postfix(mean="–" if mean is None else f"{mean:.3f}", failed=result.tally.failed, refresh=False)
    result.seconds = time.monotonic() - started
    return result


def extremes(values: Iterable[float]) -> list[float]:
    """The least and the greatest of different rewards, ascending; all of them if they are few."""
    ordered = sorted(values)
    return ordered if len(ordered) <= 2 * EXTREMES else [*ordered[:EXTREMES], *ordered[-EXTREMES:]]


def case_of(rollout: Mapping[str, Any], problem: Problem | None) -> Case:
    """What verifiers read of a stored rollout."""
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
        result.changed += sum(entry["changed"] for entry in answer["data"])
        return
