"""Samples the held-out problems, from the reference and from fine-tuned models, and takes what was sampled together."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

from benchmarks.alternatives.divergence import Completion, Divergence, divergences
from benchmarks.search_frontier.choosing import Point, Rule, Sample, plain
from benchmarks.search_frontier.sampling import Asked, Way, sample
from qsharp_core.answers import VoteName
from qsharp_core.wire.search import BEST, Best
from trainer.evaluation.statistics import Estimate, estimate
from trainer.reports import write_json
from trainer.rewards.verifiers import OWN, Judge, TaskRef, Weighted
from trainer.rollouts.client import ServerClient
from trainer.rollouts.collection import digest
from trainer.rollouts.parameters import sampling_of
from trainer.tasks.registry import find_task

Pools = dict[str, list[list[Sample]]]
"""Of each problem, pools of independent samples."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is sampled.

    Attributes:
        task: by name.
        limit: only the first so many held-out problems; None is all.
        size: samples of a pool.
        pools: of each problem.
        vote: which part of a text is its answer.
        rows: samples at once.
        seed: another one makes other samples.
    """

    task: str
    limit: int | None
    size: int
    pools: int
    vote: VoteName
    rows: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A policy and what was sampled from it.

    Attributes:
        name: of it.
        pools: its samples.
        kl: divergence from the reference in nats, the mean over each problem's samples, by problem.
        seconds: that its training took; of several seeds the mean.
        rules: how the best of several samples can be found.
    """

    name: str
    pools: Pools
    kl: Mapping[str, float]
    seconds: float
    rules: Sequence[Rule]

    @property
    def divergence(self) -> Estimate:
        """The mean over problems and its standard error."""
        found = estimate([*self.kl.values()])
        assert found is not None
        return found

    def points(self, size: int) -> list[Point]:
        """A single sample, and the best of `size`, by each rule; a single one is the same by all of them."""
        return [plain(self.name, self.pools, n, rule) for rule in self.rules for n in sorted({1, size})]


async def sampled(url: str, wanted: Wanted, ways: Sequence[Way], out: Path) -> tuple[dict[str, Pools], list[Rule]]:
    """Samples what the journal `out` lacks.

    Returns:
        The pools by way; and the rules that can choose among the samples: without a critic, the majority alone.
    """
    task = TaskRef(find_task(wanted.task), wanted.task)
    async with Judge([Weighted(OWN)]) as judge, ServerClient(url, connections=wanted.rows) as client:
        critic = await client.critic(None)
        asked = Asked(
            task=task,
            problems=task.task.of_split("held_out")[: wanted.limit],
            sampling=sampling_of(task.task.sampling),
            model=await client.model(),
            critic=critic["id"] if critic else None,
            repeats=wanted.pools,
            pools=wanted.pools,
            rows=wanted.rows,
            seed=wanted.seed,
        )
        found = await sample(client, judge, asked, ways, out)
    low, high = critic["card"]["reward_range"] if critic else (0.0, 1.0)
    by: tuple[Best, ...] = BEST if critic else ("majority",)
    return found, [Rule(by=one, vote=wanted.vote, reward_range=(low, high)) for one in by]


def reported(pools: Pools) -> dict[str, float]:
    """The divergence of each problem's samples, as the server reports it."""
    return {problem: fmean(one.kl or 0.0 for pool in some for one in pool) for problem, some in pools.items()}


def estimated(model: Path, reference: Path, pools: Pools, out: Path) -> dict[str, list[Divergence]]:
    """The estimates of each problem's samples; those of the same samples are read from the folder `out`."""
    completions = {
        problem: [Completion(one.token_ids or [], one.tokens) for pool in some for one in pool]
        for problem, some in pools.items()
    }
    kept = out / f"{digest([list(one.token_ids) for some in completions.values() for one in some])[:16]}.json"
    every = [one for some in completions.values() for one in some]
    if not kept.exists():
        out.mkdir(parents=True, exist_ok=True)
        write_json(kept, [asdict(one) for one in divergences(model, reference, every)])
    found = iter(Divergence(**one) for one in json.loads(kept.read_text()))
    return {problem: [next(found) for _ in some] for problem, some in completions.items()}


def together(policies: Sequence[Policy], name: str) -> Policy:
    """Policies of several seeds as one: pools beside pools, and the mean of the rest."""
    first = policies[0]
    return replace(
        first,
        name=name,
        pools={problem: [pool for one in policies for pool in one.pools[problem]] for problem in first.pools},
        kl={problem: fmean(one.kl[problem] for one in policies) for problem in first.kl},
        seconds=fmean(one.seconds for one in policies),
    )
