"""Samples a task's problems through a running server: pools of plain samples, and searches."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.search_frontier.choosing import Sample
from qsharp_core.wire.guidance import DEFAULT_METHOD, MethodName
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
        eta: strength of the guidance; None is without guidance.
        search: the request's field; None is plain samples.
        size: samples of a request.
        returned: how many of them are returned.
        method: of the guidance.
    """

    name: str
    eta: float | None
    search: Mapping[str, Any] | None
    size: int
    returned: int = 1
    method: MethodName = DEFAULT_METHOD

    def identity(self) -> dict[str, Any]:
        """What tells it from others; the usual method is not named, as older journals do not."""
        return {name: value for name, value in asdict(self).items() if name != "method" or value != DEFAULT_METHOD}

    def fields(self, critic: str | None) -> dict[str, Any]:
        """The request's fields."""
        if self.eta is None:
            return {"n": self.returned, "return_token_ids": True}
        options = {"critic": critic, "method": self.method, "candidates": 10, "min_prob": 0, "search": self.search}
        return {"n": self.returned, "eta": self.eta, "guidance": options}


def pool(name: str, eta: float, size: int, method: MethodName = DEFAULT_METHOD) -> Way:
    """Plain samples, with the critic's estimate of each: the best `size` of `size`."""
    search = {"kind": "best_of", "n": size}
    return Way(name=name, eta=eta, search=search, size=size, returned=size, method=method)


def unguided(name: str, size: int) -> Way:
    """Plain samples of a model without a critic, with their token ids."""
    return Way(name=name, eta=None, search=None, size=size, returned=size)


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
        model, critic: that are served; None is no critic.
        repeats: searches of a kind for each problem.
        pools: pools of a kind for each problem.
        rows: samples at once.
        seed: another one makes other samples.
    """

    task: TaskRef
    problems: Sequence[Problem]
    sampling: SamplingParameters
    model: str
    critic: str | None
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
        return digest([self.identity(), way.identity(), problem.id, repeat])[:32]


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
        **question, **asked.sampling.fields(), "model": asked.model, "seed": seed, **way.fields(asked.critic),
    }  # fmt: skip
    answer = await client.post(route, body)
    choices: list[JSONObject] = sorted(answer["choices"], key=lambda choice: choice["index"])
    if way.search is not None:  # they come with the best first
        choices.sort(key=lambda choice: choice["guidance"]["search"]["sample"] or 0)
    cases = [Case.of_choice(problem, choice) for choice in choices]
    texts = [case.completion for case in cases]
    rewards = [await _reward(judge, asked.task, case) for case in cases]
    if way.search is None:
        prompt = answer.get("prompt_token_ids") or choices[0]["prompt_token_ids"]
        return [_plain(*one, prompt) for one in zip(texts, rewards, choices, strict=True)]
    alone = way.returned == 1
    return [_searched(*one, alone) for one in zip(texts, rewards, choices, strict=True)]


async def _reward(judge: Judge, task: TaskRef, case: Case) -> float:
    verdict = await judge.judge(case, task)
    if verdict.reward is None:
        assert case.problem is not None
        raise RuntimeError(f"problem {case.problem.id}: {case.completion!r} could not be judged: {verdict.failures}")
    return verdict.reward


def _searched(text: str, reward: float, choice: JSONObject, alone: bool) -> Sample:
    """Of a search that returns a single sample, the tokens are the whole search's."""
    guidance = choice["guidance"]
    report = guidance["search"]
    tokens = report["tokens_spent"] if alone else guidance["tokens_total"]
    return Sample(text=text, reward=reward, estimate=report["estimate"], tokens=tokens, kl=guidance["kl"])


def _plain(text: str, reward: float, choice: JSONObject, prompt: list[int]) -> Sample:
    ids = choice["token_ids"]
    return Sample(text=text, reward=reward, estimate=None, tokens=len(ids), token_ids=[*prompt, *ids])
