"""Whether the reference is the same by every way of asking for it: by `qsharp evaluate`, a loop, plain requests.

    python -m benchmarks.unguided_agreement --samples 2000
    python -m benchmarks.unguided_agreement --url http://localhost:8000 --prompts prompts.jsonl --verifier my_task:good

Every way samples the same problems equally often, unguided. Standard errors are over problems. Two tests ask whether
all ways have one accuracy: chi-square over all samples, which knows nothing of problems, and a permutation test, which
deals the samples of each problem anew among the ways (its statistic is the spread of the ways' means). Without `--url`
the default model's server is started, without its critic.
"""

import argparse
import asyncio
import json
import math
import secrets
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import chi2_contingency

from trainer.api.reward import judge_of
from trainer.evaluation.evaluate import SAMPLES, evaluate
from trainer.evaluation.settings import Evaluation
from trainer.loop.settings import CriticRecipe, EvaluationPlan, LoopSettings
from trainer.loop.stages import evaluate_all
from trainer.rewards.base import Case
from trainer.rewards.verifiers import Judge, TaskRef
from trainer.rollouts.client import ServerClient
from trainer.rollouts.concurrency import each
from trainer.rollouts.parameters import SamplingParameters, sampling_of
from trainer.serving import serving
from trainer.tasks.base import Problem
from trainer.tasks.sources import task_of
from trainer.training.settings import TrainSettings

Rewards = NDArray[np.float64]
"""`[P, K]`: what each of K samples of each of P problems earned."""
PERMUTATIONS = 5000
RAW = {
    "plain requests": (False, False, False),
    "with n": (True, False, False),
    "with seed": (False, True, False),
    "with store": (False, False, True),
    "with n, seed and store": (True, True, True),
}
"""Whether a request names n, seed and store, by way."""


@dataclass(frozen=True)
class Asked:
    """What every way samples.

    Attributes:
        client: of the server, with the admin's key.
        model: that is served.
        judge: judges completions.
        task, split, problems: whose problems.
        sampling: how.
        samples: of each problem, by each way.
        seed: of what is seeded.
        concurrency: requests at once.
    """

    client: ServerClient
    model: str
    judge: Judge
    task: TaskRef
    split: str
    problems: Sequence[Problem]
    sampling: SamplingParameters
    samples: int
    seed: int
    concurrency: int


async def by_evaluate(asked: Asked, folder: Path) -> Rewards:
    """As `qsharp evaluate` without a critic does."""
    evaluation = Evaluation(
        split=asked.split,
        model=asked.model,
        samples=asked.samples,
        sampling=asked.sampling,
        scored=False,
        limit=len(asked.problems),
        seed=asked.seed,
    )
    await evaluate(asked.client, asked.judge, asked.task, evaluation, folder, concurrency=asked.concurrency)
    return _of_journal(folder / SAMPLES, asked)


async def by_loop(asked: Asked, folder: Path) -> Rewards:
    """As a loop does that has no version to guide with yet."""
    settings = LoopSettings(
        task=asked.task,
        split=asked.split,
        model=asked.model,
        samples=(1,),
        sampling=asked.sampling,
        eta=0.1,
        recipe=CriticRecipe(settings=TrainSettings(base=asked.model), out=folder),
        seed=asked.seed + 1,
        concurrency=asked.concurrency,
    )
    plan = EvaluationPlan(split=asked.split, samples=asked.samples, settings=(), limit=len(asked.problems))
    await evaluate_all(asked.client, asked.judge, settings, plan, None, folder)
    return _of_journal(folder / "evaluation" / SAMPLES, asked)


async def by_requests(asked: Asked, n: bool, seed: bool, store: bool) -> Rewards:
    """By plain requests of a client's own."""
    found: dict[str, list[float]] = {problem.id: [] for problem in asked.problems}
    dice = np.random.default_rng([asked.seed, n, seed, store])
    requests = [
        (problem, int(dice.integers(2**40)))
        for problem in asked.problems
        for _ in range(1 if n else asked.samples)
    ]  # fmt: skip

    async def one(request: tuple[Problem, int]) -> None:
        problem, number = request
        route, question = problem.request()
        body: dict[str, Any] = {**question, **asked.sampling.fields(), "model": asked.model, "eta": None}
        body |= {"n": asked.samples} if n else {}
        body |= {"seed": number} if seed else {}
        body |= {"store": True, "metadata": {"benchmark": "unguided_agreement"}} if store else {}
        answer = await asked.client.post(route, body)
        found[problem.id] += [await _reward(asked, problem, choice) for choice in answer["choices"]]

    await each(requests, one, asked.concurrency)
    return np.array([found[problem.id] for problem in asked.problems])


def permutation_p(ways: Mapping[str, Rewards], permutations: int = PERMUTATIONS, seed: int = 0) -> float:
    """The probability that means of ways that do not differ spread as much: an exact test, sampled.

    Args:
        ways: rewards of the same problems, as many samples of each by every way.
        permutations: how often the samples of each problem are dealt anew.
        seed: of the dealing.
    """
    stacked = np.stack(list(ways.values()))  # [W, P, K]
    count, problems, samples = stacked.shape
    pooled = stacked.transpose(1, 0, 2).reshape(problems, count * samples)
    observed = float(stacked.mean(axis=(1, 2)).var())
    dice = np.random.default_rng(seed)
    as_far = 0
    for _ in range(permutations):
        dealt = dice.permuted(pooled, axis=1).reshape(problems, count, samples)
        as_far += dealt.mean(axis=(0, 2)).var() >= observed - 1e-12
    return (as_far + 1) / (permutations + 1)


def chi_square_p(ways: Mapping[str, Rewards]) -> float:
    """The p-value of homogeneity over all samples, as if they were independent; 1 if all earned the same."""
    won = [float(one.sum()) for one in ways.values()]
    lost = [one.size - float(one.sum()) for one in ways.values()]
    if not sum(won) or not sum(lost):
        return 1.0
    return float(chi2_contingency([won, lost], correction=False).pvalue)


def table(ways: Mapping[str, Rewards]) -> Table:
    """A row for each way: accuracy, its standard error over problems, and its distance from all ways together."""
    rows = Table("way", "accuracy", "less the mean of all", "n")
    for column in rows.columns[1:]:
        column.justify = "right"
    together = np.stack(list(ways.values())).mean(axis=(0, 2))  # [P]
    for name, rewards in ways.items():
        by_problem = rewards.mean(axis=1)
        rows.add_row(name, _estimate(by_problem, ".1f"), _estimate(by_problem - together, "+.1f"), str(rewards.size))
    return rows


def _estimate(values: NDArray[np.float64], form: str) -> str:
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{format(100 * values.mean(), form)} ± {100 * error:.1f} %"


async def _reward(asked: Asked, problem: Problem, choice: Mapping[str, Any]) -> float:
    text = choice["text"] if "text" in choice else choice["message"].get("content") or ""
    prompt = problem.prompt if isinstance(problem.prompt, str) else None
    case = Case(completion=text, problem=problem, prompt=prompt, messages=problem.messages)
    verdict = await asked.judge.judge(case, asked.task)
    return math.nan if verdict.reward is None else verdict.reward


def _of_journal(path: Path, asked: Asked) -> Rewards:
    """The rewards that an evaluation has noted."""
    found: dict[str, list[float]] = {}
    for line in path.read_text().splitlines()[1:]:
        entry = json.loads(line)
        found[entry["problem"]] = [one["reward"] for one in entry["samples"]]
    return np.array([found[problem.id] for problem in asked.problems], dtype=float)


@asynccontextmanager
async def _server(args: argparse.Namespace, folder: Path) -> AsyncIterator[tuple[str, str | None]]:
    """The URL of the server, and a key."""
    if args.url is not None:
        yield args.url, args.api_key
        return
    key = secrets.token_hex(16)
    flags = ["--no-critic", "--admin-key", key, "--rollouts", str(folder / "rollouts.db"), *args.serve]
    async with serving(flags, folder / "server.log", 900) as url:
        yield url, key


async def measure(args: argparse.Namespace, folder: Path, console: Console) -> dict[str, Rewards]:
    """What each way's samples earned."""
    task = TaskRef(task_of(args.task if args.prompts is None else None, args.prompts), args.task)
    problems = task.task.of_split(args.split)[: args.problems]
    found: dict[str, Rewards] = {}
    async with AsyncExitStack() as stack:
        url, key = await stack.enter_async_context(_server(args, folder))
        client = await stack.enter_async_context(ServerClient(url, key=key, connections=args.concurrency))
        asked = Asked(
            client=client,
            model=await client.model(),
            judge=await stack.enter_async_context(judge_of(args.verifier)),
            task=task,
            split=args.split,
            problems=problems,
            sampling=sampling_of(task.task.sampling, max_tokens=args.max_tokens),
            samples=max(round(args.samples / len(problems)), 1),
            seed=args.seed,
            concurrency=args.concurrency,
        )
        ways: dict[str, Callable[[], Awaitable[Rewards]]] = {
            "qsharp evaluate": lambda: by_evaluate(asked, folder / "evaluate"),
            "a loop's evaluation": lambda: by_loop(asked, folder / "loop"),
        }
        for name, flags in RAW.items():
            ways[name] = lambda flags=flags: by_requests(asked, *flags)  # type: ignore[misc]
        for name, way in ways.items():
            found[name] = await way()
            console.print(f"{name}: {100 * np.nanmean(found[name]):.1f} %", highlight=False)
    unjudged = np.isnan(np.stack(list(found.values()))).any(axis=(0, 2))
    if unjudged.any():
        console.print(f"{int(unjudged.sum())} problems with samples that could not be judged are left out")
    return {name: rewards[~unjudged] for name, rewards in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="sums")
    parser.add_argument("--prompts", metavar="FILE", help="instead of a task")
    parser.add_argument("--verifier", default="task")
    parser.add_argument("--split", default="held_out")
    parser.add_argument("--problems", type=int, default=100, help="the first so many (%(default)s)")
    parser.add_argument("--samples", type=int, default=2000, help="by each way, over all problems (%(default)s)")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--url", help="of a server that runs; store needs its rollout store")
    parser.add_argument("--api-key")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the rewards by way, as JSON")
    parser.add_argument("serve", nargs="*", help="after --: the model and flags of qsharp serve")
    args = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory(prefix="agreement-") as folder:
        ways = asyncio.run(measure(args, Path(folder), Console(stderr=True)))
    if args.out is not None:
        args.out.write_text(json.dumps({name: rewards.tolist() for name, rewards in ways.items()}))
    console.print(table(ways))
    console.print(
        f"one accuracy for all: p = {permutation_p(ways):.3f} (permutations within problems), "
        f"{chi_square_p(ways):.3f} (chi-square over all samples)",
        highlight=False,
    )


if __name__ == "__main__":
    main()
