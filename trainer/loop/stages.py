"""The stages of a round: each does what its own command does, on this round's rollouts."""

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from tenacity import AsyncRetrying

from qsharp_core.wire.metadata import RUN
from trainer.evaluation.evaluate import PLOT, evaluate
from trainer.evaluation.plot import plot
from trainer.evaluation.settings import Evaluation
from trainer.loop.report import CollectResult, EvaluateResult, ExportResult, JudgeResult, SettingSummary
from trainer.loop.settings import EvaluationPlan, LoopSettings
from trainer.loop.versions import LoopError, Version
from trainer.rewards.problems import Problems
from trainer.rewards.run import reward
from trainer.rewards.verifiers import Judge
from trainer.rollouts.client import ServerClient
from trainer.rollouts.collect import checked, collect
from trainer.rollouts.collection import Collection
from trainer.rollouts.export import export
from trainer.rollouts.parameters import GuidanceParameters
from trainer.rollouts.retrying import policy
from trainer.trust import EVERYBODY, Trust

ROLLOUTS = "rollouts.parquet"


def collection_of(settings: LoopSettings, number: int, active: str | None) -> Collection:
    """The rollouts of a round. They are the reference's own in the first round, and as long as no version is active.

    Args:
        settings: the loop's.
        number: of the round.
        active: the version that guides in the round, `name@version`; None without one.
    """
    guidance = None
    if number > 0 and active is not None:
        guidance = GuidanceParameters(eta=settings.eta, critic=active, **dict(settings.guidance))
    return Collection(
        task=settings.task.task.name,
        split=settings.split,
        model=settings.model,
        samples=settings.samples_of(number),
        sampling=settings.sampling,
        guidance=guidance,
        roll_in=guidance is not None,
        branches=0 if number else settings.branches,
        round=number,
        limit=settings.limit,
        seed=settings.seed,
    )


async def collect_all(
    client: ServerClient,
    settings: LoopSettings,
    collection: Collection,
    folder: Path,
    tell: Callable[[str], None] = lambda text: None,
) -> CollectResult:
    """Samples a round's rollouts; tells how many were stored already.

    Raises:
        CollectError: some could not be made.
        RequestError, JournalError, TaskError
    """
    collected = checked(
        await collect(client, settings.task.task, collection, folder / "collect.jsonl", settings.concurrency)
    )
    if there := collected.found + collected.before:
        tell(f"{there} of {collected.wanted} were there from before")
    fields = asdict(collected)
    del fields["failed"]
    return CollectResult(**fields, guided_by=collection.guidance.critic if collection.guidance else None)


async def reward_all(
    client: ServerClient,
    judge: Judge,
    settings: LoopSettings,
    collection: Collection,
    tell: Callable[[str], None] = lambda text: None,
) -> JudgeResult:
    """Judges a round's rollouts that the loop's own verifiers have not judged, and gives them their rewards.

    Args:
        client: of the server.
        judge: the loop's.
        settings: the loop's.
        collection: the round's rollouts.
        tell: is told what is left out, and why.

    Raises:
        LoopError: none could be judged.
        RequestError
    """
    everybody = {f"metadata.{RUN}": collection.run, **settings.trust.rewards}
    query = {**everybody, **own_rewards(judge)}
    # Rewards that somebody else's verifiers gave the same rollouts: they may mean something else.
    others = await client.count({**everybody, "has_reward": "true"}) - await client.count(
        {**query, "has_reward": "true"}
    )
    if others:
        tell(
            f"{others} rollouts have rewards of other sources alone, from which this loop does not learn: it judges "
            f"them by {judge.source}"
        )
    result = await reward(
        client,
        judge,
        Problems([settings.task]),
        source=judge.source,
        filters=query,
        concurrency=settings.concurrency,
    )
    if not await client.count({**query, "has_reward": "true"}):
        if result.given:
            by = ", ".join(settings.trust.rewards_by)
            raise LoopError(f"this loop's rewards are not among those of {by}: --rewards-by must name its key's holder")
        first = f"; the first: {result.failures[0]['reason']}" if result.failures else ""
        raise LoopError(f"no rollout of this round could be judged: name a --verifier that applies{first}")
    tally = result.tally
    return JudgeResult(
        given=result.given,
        mean=tally.mean,
        failed=tally.failed,
        not_applicable=tally.not_applicable,
        of_others=others,
    )


def own_rewards(judge: Judge) -> dict[str, str]:
    """The query of `GET /v1/rollouts` by which no rewards count but those of a loop's own verifiers."""
    return {"reward_source": judge.source}


async def export_all(
    client: ServerClient,
    judge: Judge,
    collection: Collection,
    folder: Path,
    trust: Trust = EVERYBODY,
    tell: Callable[[str], None] = lambda text: None,
) -> ExportResult:
    """Writes a round's rollouts that have a reward that counts to the round's Parquet file; tells how many.

    Raises:
        RequestError
    """
    query = {f"metadata.{RUN}": collection.run, **trust.rewards, **own_rewards(judge), "has_reward": "true"}
    rows = await export_to(client, folder / ROLLOUTS, query)
    tell(f"{rows} rollouts with rewards, of all that were ever collected as {collection.run}")
    return ExportResult(rows=rows)


async def export_to(client: ServerClient, path: Path, query: dict[str, str]) -> int:
    """Exports rollouts to a file, in a thread that ends after one attempt, so that a loop can stop between attempts.

    Returns:
        The number of rollouts.

    Raises:
        RequestError
    """
    trying = AsyncRetrying(**policy(client.patience))
    query = {**query, **client.scope}
    rows: int = await trying(asyncio.to_thread, export, client.url, path, query, key=client.key, patience=0.0)
    return rows


async def evaluate_all(
    client: ServerClient,
    judge: Judge,
    settings: LoopSettings,
    plan: EvaluationPlan,
    active: Version | None,
    folder: Path,
) -> EvaluateResult:
    """Measures the active version; the reference alone while there is none.

    Raises:
        EvaluateError, RequestError, JournalError, TaskError
    """
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
    evaluated = await evaluate(client, judge, settings.task, evaluation, out, concurrency=settings.concurrency)
    report = evaluated.report
    plot(out / PLOT, report)
    results = [
        SettingSummary(**{name: getattr(result, name) for name in SettingSummary.model_fields})
        for result in report.results
    ]
    return EvaluateResult(critic=evaluation.critic, results=results)
