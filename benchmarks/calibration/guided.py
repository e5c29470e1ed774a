"""Accuracy and KL of guidance by two critics, on the same problems at the same eta, through one server."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.evaluation.evaluate import evaluate
from trainer.evaluation.of_problems import OfProblems, of_problems
from trainer.evaluation.settings import Evaluation, Setting, every_setting
from trainer.evaluation.statistics import estimate
from trainer.experiments.ablation.seeds import differences
from trainer.rewards.verifiers import OWN, Judge, TaskRef, Weighted
from trainer.rollouts.client import ServerClient
from trainer.rollouts.parameters import sampling_of
from trainer.tasks.registry import find_task


@dataclass(frozen=True)
class Asked:
    """What is measured.

    Attributes:
        task: whose held-out problems are sampled.
        etas: of the guidance.
        samples: of each problem.
        limit: only the first so many problems; None is all.
        candidates: of each step.
        concurrency: requests at once.
    """

    task: str
    etas: Sequence[float]
    samples: int
    limit: int | None
    candidates: int
    concurrency: int = 32


async def measured(url: str, asked: Asked, critic: str, out: Path) -> dict[Setting, OfProblems]:
    """What each setting earns and spends on every problem.

    Args:
        url: of the server.
        asked: what is measured.
        critic: a name or an exact version.
        out: folder of the samples; what is there is not sampled again.
    """
    task = TaskRef(find_task(asked.task), asked.task)
    async with Judge([Weighted(OWN)]) as judge, ServerClient(url, connections=asked.concurrency) as client:
        loaded = await client.critic(critic)
        assert loaded is not None
        evaluation = Evaluation(
            split="held_out", model=await client.model(), samples=asked.samples,
            sampling=sampling_of(task.task.sampling), settings=every_setting(["qsharp"], asked.etas),
            critic=loaded["id"], guidance=(("candidates", asked.candidates), ("min_prob", 0)), scored=False,
            limit=asked.limit,
        )  # fmt: skip
        evaluated = await evaluate(client, judge, task, evaluation, out, concurrency=asked.concurrency)
    return of_problems(evaluated.samples)


def compared(
    raw: Mapping[Setting, OfProblems], scaled: Mapping[Setting, OfProblems], etas: Sequence[float]
) -> list[dict[str, Any]]:
    """Accuracy and KL of both at each eta, and what scaling changes, paired by problem; with standard errors."""
    rows: list[dict[str, Any]] = []
    reference = raw[Setting()]
    rows.append({"eta": None, "raw": {"accuracy": _estimate(reference.rewards), "kl": _estimate(reference.kl)}})
    for eta in etas:
        setting = Setting("qsharp", eta)
        both = {"raw": raw[setting], "scaled": scaled[setting]}
        rows.append(
            {"eta": eta, "problems": len(raw[setting].rewards)}
            | {name: {"accuracy": _estimate(one.rewards), "kl": _estimate(one.kl)} for name, one in both.items()}
            | {
                "change": {
                    "accuracy": _estimate(differences(scaled[setting].rewards, raw[setting].rewards)),
                    "kl": _estimate(differences(scaled[setting].kl, raw[setting].kl)),
                }
            }
        )
    return rows


def _estimate(values: Mapping[str, float]) -> dict[str, float | None]:
    """The mean over problems, and its standard error."""
    found = estimate([*values.values()])
    assert found is not None
    return {"mean": found.mean, "se": found.se}
