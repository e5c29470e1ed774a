"""Accuracy against KL for fixed etas, and for budgets at one strong eta, on a preset's own task through HTTP.

    python -m benchmarks.budget_frontier                       the default model's sums
    python -m benchmarks.budget_frontier --preset star-graph --limit 1000 --samples 1

Writes `report.json` and `report.png`; the same command goes on where it was stopped.
"""

import argparse
import asyncio
from pathlib import Path

from rich.console import Console

from server.presets.known import DEFAULT
from trainer.evaluation.evaluate import PLOT, REPORT, evaluate
from trainer.evaluation.plot import plot
from trainer.evaluation.report import EvaluationReport
from trainer.evaluation.settings import Evaluation, every_setting
from trainer.evaluation.table import tables
from trainer.rewards.verifiers import OWN, Judge, TaskRef, Weighted
from trainer.rollouts.client import ServerClient
from trainer.rollouts.parameters import sampling_of
from trainer.serving import serve
from trainer.tasks.registry import find_task

TASKS = {DEFAULT: "sums", "star-graph": "star_graph"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(TASKS), default=DEFAULT)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--limit", type=int, help="only the first so many problems")
    parser.add_argument("--etas", type=float, nargs="+", default=[1.0, 0.5, 0.3, 0.2, 0.1, 0.03])
    parser.add_argument("--strong", type=float, default=0.03, help="the eta of budgets (default: %(default)s)")
    parser.add_argument("--totals", type=float, nargs="*", default=[0.06, 0.2, 0.4, 0.8], help="nats an answer")
    parser.add_argument("--tokens", type=float, nargs="*", default=[0.01, 0.03, 0.1], help="nats a token")
    parser.add_argument("--methods", nargs="+", default=["qsharp", "cd"])
    given = parser.parse_args()
    out = Path("runs/budget-frontier") / given.preset
    out.mkdir(parents=True, exist_ok=True)
    with serve([given.preset], out / "server.log", patience=900) as url:
        report = asyncio.run(measure(given, url, out))
    Console(width=100).print(*tables(report.samples, report.results))
    plot(out / PLOT, report)
    print(f"{out / REPORT}, {PLOT}")


async def measure(given: argparse.Namespace, url: str, out: Path) -> EvaluationReport:
    """Samples every setting by turns."""
    task = TaskRef(find_task(TASKS[given.preset]), TASKS[given.preset])
    settings = (
        *every_setting(given.methods, given.etas),
        *every_setting(given.methods, [given.strong], kl_totals=given.totals),
        *every_setting(given.methods, [given.strong], kl_tokens=given.tokens),
    )
    async with Judge([Weighted(OWN)]) as judge, ServerClient(url, connections=32) as client:
        critic = await client.critic(None)
        assert critic is not None
        evaluation = Evaluation(
            split="held_out",
            model=await client.model(),
            samples=given.samples,
            sampling=sampling_of(task.task.sampling),
            settings=settings,
            critic=critic["id"],
            guidance=(("candidates", 10), ("min_prob", 0)),
            scored=False,
            limit=given.limit,
        )
        return (await evaluate(client, judge, task, evaluation, out, concurrency=32)).report


if __name__ == "__main__":
    main()
