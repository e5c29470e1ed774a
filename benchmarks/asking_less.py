"""How accuracy, KL and speed move with `candidates` and `min_prob`, on the default model and its task, through HTTP.

    python -m benchmarks.asking_less [--json FILE]

Accuracy: every held-out sum under every setting, at the recommended eta. Speed: tokens per second of 32 clients, the
settings by turns, `--rounds` times; with how many candidates per token the critic was asked for.
"""

import argparse
import asyncio
import json
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.load import send
from benchmarks.scrape import read_metrics
from trainer.evaluation.evaluate import evaluate
from trainer.evaluation.settings import Evaluation, Setting
from trainer.rewards.verifiers import OWN, Judge, TaskRef, Weighted
from trainer.rollouts.client import ServerClient
from trainer.rollouts.parameters import SamplingParameters
from trainer.serving import serve
from trainer.tasks.registry import find_task

OUT = Path("runs/asking-less")
ETA, CLIENTS, REQUESTS = 0.1, 32, 64


@dataclass(frozen=True)
class Asking:
    """What a request lets the critic weigh; None is not guided."""

    candidates: int | None
    min_prob: float = 0.0

    @property
    def guidance(self) -> dict[str, Any]:
        return {"candidates": self.candidates, "min_prob": self.min_prob}

    @property
    def label(self) -> str:
        return "reference" if self.candidates is None else f"{self.candidates}, {self.min_prob:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, nargs="+", default=[4, 8, 20])
    parser.add_argument("--min-prob", type=float, nargs="+", default=[0.0, 0.01, 0.05])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    settings = [Asking(None), *(Asking(k, p) for k in given.candidates for p in given.min_prob)]
    shutil.rmtree(OUT, ignore_errors=True)
    with serve([], OUT / "server.log", patience=900) as url:
        result = asyncio.run(measure(url, settings, given.samples, given.rounds))
    show(result)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(result, indent=2) + "\n")


async def measure(url: str, settings: list[Asking], samples: int, rounds: int) -> list[dict[str, Any]]:
    """One record per setting."""
    task = TaskRef(find_task("sums"), "sums")
    async with Judge([Weighted(OWN)]) as judge, ServerClient(url, connections=CLIENTS) as server:
        model = (await server.get("/v1/models"))["data"][0]["id"]
        critic = (await server.get("/v1/critics"))["data"][0]["id"]
        sampling = SamplingParameters(max_tokens=task.task.sampling.max_tokens, stop=task.task.sampling.stop)
        speeds = await speed(url, settings, task, model, sampling, rounds)
        results = []
        for asking in tqdm(settings, desc="accuracy", unit="setting"):
            guided = asking.candidates is not None
            evaluation = Evaluation(
                split="held_out",
                model=model,
                samples=1 if guided else samples,
                sampling=sampling,
                settings=(Setting("qsharp", ETA, samples),) if guided else (),
                critic=critic if guided else None,
                guidance=tuple(asking.guidance.items()) if guided else (),
                scored=False,
            )
            evaluated = await evaluate(server, judge, task, evaluation, OUT / asking.label.replace(", ", "-"))
            results.append({**asking.guidance, **evaluated.report.results[-1].model_dump(), **speeds[asking]})
        return results


async def speed(
    url: str, settings: list[Asking], task: TaskRef, model: str, sampling: SamplingParameters, rounds: int
) -> dict[Asking, dict[str, Any]]:
    """Tokens per second of each round, and candidates asked of the critic per token."""
    problems = task.task.of_split("held_out")[:REQUESTS]
    found: dict[Asking, dict[str, Any]] = {a: {"tokens_per_s": [], "asked_per_token": []} for a in settings}
    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        for seed in tqdm(range(rounds + 1), desc="speed", unit="round"):
            for asking in settings if seed % 2 else settings[::-1]:
                guidance = {} if asking.candidates is None else {"eta": ETA, "guidance": asking.guidance}
                bodies = [
                    {**problem.request()[1], **sampling.fields(), "model": model, "seed": seed, **guidance}
                    for problem in problems
                ]
                before = await scored(http)
                seconds, answers = await send(http, bodies, CLIENTS, problems[0].request()[0])
                tokens = sum(answer.json()["usage"]["completion_tokens"] for answer in answers)
                if seed:  # the first round warms up
                    found[asking]["tokens_per_s"].append(tokens / seconds)
                    found[asking]["asked_per_token"].append((await scored(http) - before) / tokens)
    return found


async def scored(http: httpx.AsyncClient) -> float:
    """Candidates that critics have scored so far."""
    return (await read_metrics(http))["qsharp_scored_candidates"]


def show(results: list[dict[str, Any]]) -> None:
    table = Table("candidates", "min_prob", "accuracy", "gain / s.e.", "KL, nats", "asked per token", "tokens/s", "n")
    for r in results:
        guided = r["candidates"] is not None
        table.add_row(
            str(r["candidates"] or "–"),
            f"{r['min_prob']:g}" if guided else "–",
            f"{100 * r['accuracy']:.1f} ± {100 * r['accuracy_se']:.1f} %",
            f"{r['gain'] / r['gain_se']:+.1f}" if guided else "",
            f"{r['kl']:.2f} ± {r['kl_se']:.2f}",
            f"{statistics.median(r['asked_per_token']):.2f}",
            f"{statistics.median(r['tokens_per_s']):.0f} ({min(r['tokens_per_s']):.0f}-{max(r['tokens_per_s']):.0f})",
            str(r["n"]),
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
