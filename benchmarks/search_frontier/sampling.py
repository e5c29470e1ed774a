"""Samples a task's problems through a running server: pools of plain samples, and searches."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.search_frontier.choosing import Sample
from trainer.evaluation.searches import search_of
from trainer.rewards.base import Case
from trainer.rewards.verifiers import Judge, TaskRef
from trainer.rollouts.client import JSONObject, ServerClient
from trainer.rollouts.collection import digest, seed_of
from trainer.rollouts.concurrency import each
from trainer.rollouts.journal import Journal
from trainer.rollouts.parameters import SamplingParameters
from trainer.tasks.base import Problem

REFERENCE, GUIDED = "reference", "guided"
REFERENCE_ETA = 100.0
"""So weak that it is the reference's own law, to 1e-4 nats and less; but the critic's values are reported."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way of sampling.

    Attributes:
        name: of it, unique.
        eta: strength of the guidance.
        search: the request's field.
        size: samples of a request.
        returned: how many of them are returned.
    """

    name: str
    eta: float
    search: Mapping[str, Any]
    size: int
    returned: int = 1


def pool(name: str, eta: float, size: int) -> Way:
    """Plain samples, with the critic's estimate of each: the best `size` of `size`."""
    return Way(name=name, eta=eta, search={"kind": "best_of", "n": size}, size=size, returned=size)


def way_of(text: str, eta: float, vote: str) -> Way:
    """A search, as `qsharp evaluate --search` spells it."""
    fields = search_of(text)
    return Way(name=text, eta=eta, search={**fields, "vote": vote}, size=fields["n"])


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is sampled.

    Attributes:
        task, problems: whose problems.
        sampling: how.
        model, critic: that are served.
        repeats: searches of a kind for each problem.
        pools: pools of a kind for each problem.
        rows: samples at once.
        seed: another one makes other samples.
    """

    task: TaskRef
    problems: Sequence[Problem]
    sampling: SamplingParameters
    model: str
    critic: str
    repeats: int
    pools: int
    rows: int
    seed: int

    def identity(self) -> dict[str, Any]:
        """What tells these samples from others; problems, ways and repeats may be added later."""
        return {
            "command": "search_frontier", "task": self.task.task.name, "sampling": asdict(self.sampling),
            "model": self.model, "critic": self.critic, "seed": self.seed,
        }  # fmt: skip

    def key(self, way: Way, problem: Problem, repeat: int) -> str:
        """Names a request; its seed derives from it."""
        return digest([self.identity(), asdict(way), problem.id, repeat])[:32]


Found = dict[str, dict[str, list[list[Sample]]]]
"""Of each way and problem, what each request returned."""


async def sample(client: ServerClient, judge: Judge, asked: Asked, ways: Sequence[Way], out: Path) -> Found:
    """Samples what the journal `out` lacks, all ways once before any is repeated."""
    items = [
        (way, problem, asked.key(way, problem, repeat))
        for repeat in range(max(asked.repeats, asked.pools))
        for way in sorted(ways, key=lambda way: way.size)
        if repeat < (asked.repeats if way.returned == 1 else asked.pools)
        for problem in asked.problems
    ]
    with Journal(out, asked.identity()) as journal:
        done = {entry["item"]: entry["samples"] for entry in journal.entries}
        total = sum(way.size for way, *_ in items)
        with tqdm(total=total, unit="sample", desc="search", smoothing=0.05) as bar:
            bar.update(sum(way.size for way, _, key in items if key in done))

            async def one(item: tuple[Way, Problem, str]) -> None:
                way, problem, key = item
                found = await _ask(client, judge, asked, way, problem, seed_of(key))
                done[key] = [asdict(sample) for sample in found]
                journal.add({"item": key, "way": way.name, "problem": problem.id, "samples": done[key]})
                bar.update(way.size)

            todo = [item for item in items if item[2] not in done]
            for size, of_size in groupby(todo, key=lambda item: item[0].size):
                await each(of_size, one, max(asked.rows // size, 1))
    found: Found = {way.name: {problem.id: [] for problem in asked.problems} for way in ways}
    for way, problem, key in items:
        found[way.name][problem.id].append([Sample(**sample) for sample in done[key]])
    return found


async def _ask(client: ServerClient, judge: Judge, asked: Asked, way: Way, problem: Problem, seed: int) -> list[Sample]:
    route, question = problem.request()
    body = {
        **question, **asked.sampling.fields(), "model": asked.model, "n": way.returned, "seed": seed, "eta": way.eta,
        "guidance": {"critic": asked.critic, "candidates": 10, "min_prob": 0, "search": way.search},
    }  # fmt: skip
    choices = (await client.post(route, body))["choices"]
    choices.sort(key=lambda choice: choice["guidance"]["search"]["sample"] or 0)  # they come with the best first
    return [await _judged(judge, asked.task, problem, choice, alone=way.returned == 1) for choice in choices]


async def _judged(judge: Judge, task: TaskRef, problem: Problem, choice: JSONObject, *, alone: bool) -> Sample:
    case = Case.of_choice(problem, choice)
    verdict = await judge.judge(case, task)
    if verdict.reward is None:
        raise RuntimeError(f"problem {problem.id}: {case.completion!r} could not be judged: {verdict.failures}")
    guidance = choice["guidance"]
    report = guidance["search"]
    tokens = report["tokens_spent"] if alone else guidance["tokens_total"]
    return Sample(text=case.completion, reward=verdict.reward, estimate=report["estimate"], tokens=tokens)
