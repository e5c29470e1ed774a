"""`qsharp evaluate`: a task's accuracy against KL, over `eta` and methods, through a running server.

    qsharp evaluate --task sums --eta 0.05 --eta 0.1 --method qsharp --method cd --samples 4 --out runs/evaluation

Writes `report.json`, `report.png` and `samples.jsonl`; the same command goes on where it was stopped.
"""

import argparse
import asyncio
from pathlib import Path
from typing import Any

from rich.console import Console

from qsharp_core.wire.guidance import METHODS
from trainer import client
from trainer.client import ServerClient
from trainer.collect_command import add_guidance_arguments, add_task_arguments, sampling_of
from trainer.evaluate import PLOT, REPORT, EvaluateError, Evaluation, Setting, evaluate
from trainer.evaluate_plot import plot, table
from trainer.rewards.command import add_verifier_arguments, judge_of
from trainer.rewards.verifiers import OWN, TaskRef
from trainer.tasks import registry
from trainer.tasks.answers import VOTES
from trainer.tasks.base import Vote


def main(argv: list[str]) -> None:
    """Runs the command.

    Raises:
        EvaluateError, ServerError, TaskError, VerifierError, JournalError
    """
    args = _parser().parse_args(argv)
    args.verifier = args.verifier or [OWN]
    report = asyncio.run(_evaluate(args))
    plot(args.out / PLOT, report)
    console = Console()
    console.print(table(report))
    unjudged = sum(result["unjudged"] for result in report["results"])
    if unjudged:
        first = f", the first: {report['failures'][0]}" if report["failures"] else ""
        console.print(f"{unjudged} completions could not be judged and count nowhere{first}", style="red")
    first = report["results"][0]
    console.print(
        f"{first['problems']} problems × {report['samples']} samples, ± is one standard error over problems; "
        f"{report['seconds']:.0f} s; {args.out / REPORT}, {PLOT}",
        highlight=False,
    )


async def _evaluate(args: argparse.Namespace) -> dict[str, Any]:
    task = TaskRef(registry.task_of(args.task, args.prompts), args.task)
    async with (
        judge_of(args) as judge,
        ServerClient(args.url, key=args.api_key, connections=args.concurrency, patience=args.patience) as server,
    ):
        critic = await server.critic(args.critic)
        etas = args.eta or ([eta] if critic and (eta := critic["card"].get("recommended_eta")) else [])
        if args.eta and critic is None:
            raise EvaluateError("--eta needs a critic, and the server has none")
        methods = args.method or METHODS[:1]
        options = {name: getattr(args, name) for name in ("candidates", "min_prob", "tail")}
        evaluation = Evaluation(
            split=args.split,
            model=args.model or await server.model(),
            samples=args.samples,
            sampling=sampling_of(args, task.task),
            settings=tuple(Setting(method, eta) for method in dict.fromkeys(methods) for eta in dict.fromkeys(etas)),
            critic=critic["id"] if critic else None,
            guidance=tuple((name, value) for name, value in options.items() if value is not None),
            scored=args.scores,
            vote=args.vote,
            limit=args.limit,
            seed=args.seed,
        )
        vote = None if args.vote is None else _vote(args.vote)
        return await evaluate(server, judge, task, evaluation, args.out, vote=vote, concurrency=args.concurrency)


def _vote(name: str) -> Vote:
    found: Vote = VOTES.get(name) or registry.find(name, {}, "qsharp.votes", "vote")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qsharp evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for the report")
    parser.add_argument("--samples", type=client.positive, default=1, help="of each problem (default: %(default)s)")
    add_task_arguments(parser, split="held_out")
    group = add_guidance_arguments(parser)
    group.add_argument("--eta", type=float, action="append", help="may be repeated; default: the critic's own")
    group.add_argument("--method", choices=METHODS, action="append", help="may be repeated; default: qsharp")
    add_verifier_arguments(parser, [OWN])
    parser.add_argument(
        "--vote", help=f"what completions vote for: {', '.join(VOTES)} or module:function; default: the task's"
    )
    parser.add_argument(
        "--no-scores", dest="scores", action="store_false", help="do not ask the critic: no best-of-k by its score"
    )
    client.add_arguments(parser)
    return parser
