"""The stages of a round: each does what its own command does, on this round's rollouts."""

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from qsharp_core.wire.metadata import RUN
from trainer.client import LONGEST_WAIT, PassingError, ServerClient
from trainer.collect import Collection, Guidance, checked, collect
from trainer.evaluate import Evaluation, evaluate
from trainer.evaluate_plot import plot
from trainer.export import export
from trainer.loop.activation import LoopError, Version
from trainer.loop.settings import EvaluationPlan, LoopSettings
from trainer.rewards.run import Problems, reward
from trainer.rewards.verifiers import Judge

STAGES = ("begin", "collect", "reward", "export", "train", "activate", "evaluate")
ROLLOUTS = "rollouts.parquet"


def collection_of(settings: LoopSettings, number: int, active: Version | None) -> Collection:
    """A round's rollouts: the first round's, and those without a critic, are the reference's own."""
    guided = number > 0 and active is not None
    return Collection(
        task=settings.task.task.name,
        split=settings.split,
        model=settings.model,
        samples=settings.samples_of(number),
        sampling=settings.sampling,
        guidance=Guidance(eta=settings.eta, critic=active.key, **dict(settings.guidance))
        if guided and active
        else None,
        roll_in=guided,
        branches=0 if number else settings.branches,
        round=number,
        limit=settings.limit,
        seed=settings.seed,
    )


async def collect_all(
    client: ServerClient, settings: LoopSettings, collection: Collection, folder: Path
) -> dict[str, Any]:
    """Samples the round's rollouts.

    Raises:
        CollectError: some could not be made.
    """
    made = await collect(client, settings.task.task, collection, folder / "collect.jsonl", settings.concurrency)
    checked(made)
    counts = {name: value for name, value in asdict(made).items() if name != "failed"}
    return {**counts, "guided_by": collection.guidance.critic if collection.guidance else None}


async def reward_all(
    client: ServerClient, judge: Judge, settings: LoopSettings, collection: Collection
) -> dict[str, Any]:
    """Judges them.

    Raises:
        LoopError: none could be judged.
    """
    result = await reward(
        client,
        judge,
        Problems([settings.task]),
        source=", ".join(verifier.name for verifier in judge.verifiers),
        filters={f"metadata.{RUN}": collection.run},
        concurrency=settings.concurrency,
    )
    tally = result.tally
    judged = await client.get("/v1/rollouts", {f"metadata.{RUN}": collection.run, "has_reward": "true", "limit": 1})
    if not judged["data"]:
        first = f"; the first: {result.failures[0]['reason']}" if result.failures else ""
        raise LoopError(f"no rollout of this round could be judged: name a --verifier that applies{first}")
    return {
        "given": result.given,
        "mean": tally.mean,
        "failed": tally.failed,
        "not_applicable": tally.not_applicable,
    }


async def export_all(client: ServerClient, collection: Collection, folder: Path) -> dict[str, Any]:
    """Writes those with a reward to the round's Parquet file."""
    query = {f"metadata.{RUN}": collection.run, "has_reward": "true"}
    return {"rows": await export_to(client, folder / ROLLOUTS, query)}


async def export_to(client: ServerClient, path: Path, query: dict[str, str]) -> int:
    """`export`, in a thread that ends after one attempt, so that a loop can be stopped between two of them.

    Raises:
        ServerError
    """
    trying = AsyncRetrying(
        retry=retry_if_exception_type(PassingError), wait=wait_random_exponential(0.5, LONGEST_WAIT),
        stop=stop_after_delay(client.patience), reraise=True,
    )  # fmt: skip
    rows: int = await trying(asyncio.to_thread, export, client.url, path, query, key=client.key, patience=0.0)
    return rows


async def evaluate_all(
    client: ServerClient,
    judge: Judge,
    settings: LoopSettings,
    plan: EvaluationPlan,
    active: Version | None,
    folder: Path,
) -> dict[str, Any]:
    """Measures the version that is active now; the reference alone while there is none."""
    evaluation = Evaluation(
        split=plan.split,
        model=settings.model,
        samples=plan.samples,
        sampling=settings.sampling,
        settings=plan.settings if active else (),
        critic=active.key if active else None,
        guidance=settings.guidance,
        scored=False,
        limit=plan.limit,
        seed=settings.seed,
    )
    out = folder / "evaluation"
    report = await evaluate(client, judge, settings.task, evaluation, out, concurrency=settings.concurrency)
    plot(out / "report.png", report)
    shown = ("method", "eta", "problems", "n", *(f"{x}{se}" for x in ("accuracy", "gain", "kl") for se in ("", "_se")))
    return {
        "critic": evaluation.critic,
        "results": [{name: result[name] for name in shown} for result in report["results"]],
    }
