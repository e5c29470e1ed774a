"""`qsharp evaluate`: a task's accuracy against KL, over `eta` and methods, through a running server.

    qsharp evaluate --task sums --eta 0.05 --eta 0.1 --method qsharp --method cd --samples 4 --out runs/evaluation

Writes `report.json`, `report.png` and `samples.jsonl`; the same command goes on where it was stopped.
"""

import argparse
import asyncio
from pathlib import Path

from rich.console import Console

from qsharp_core.wire.guidance import METHODS
from trainer.commands import options
from trainer.commands.options import (
    add_guidance_arguments,
    add_task_arguments,
    add_verifier_arguments,
    guidance_options_of,
    judge_of,
    sampling_of,
)
from trainer.evaluation.evaluate import PLOT, REPORT, evaluate
from trainer.evaluation.plot import plot
from trainer.evaluation.report import EvaluationReport
from trainer.evaluation.settings import EvaluateError, Evaluation, Setting
from trainer.evaluation.table import table
from trainer.rewards.verifiers import OWN, TaskRef
from trainer.rollouts.client import ServerClient
from trainer.tasks import registry
from trainer.tasks.answers import VOTES
from trainer.tasks.base import Vote


def main(argv: list[str]) -> None:
    """Runs the command.

    Raises:
        EvaluateError, RequestError, TaskError, VerifierError, JournalError
    """
    args = _parser().parse_args(argv)
    args.verifier = args.verifier or [OWN]
    report = asyncio.run(_evaluate(args))
    plot(args.out / PLOT, report)
    console = Console()
    console.print(table(report.samples, report.results))
    unjudged = sum(result.unjudged for result in report.results)
    if unjudged:
        first = f", the first: {report.failures[0]}" if report.failures else ""
        console.print(f"{unjudged} completions could not be judged and count nowhere{first}", style="red")
    console.print(
        f"{report.reference.problems} problems × {report.samples} samples, ± is one standard error over problems; "
        f"{report.seconds:.0f} s; {args.out / REPORT}, {PLOT}",
        highlight=False,
    )


async def _evaluate(args: argparse.Namespace) -> EvaluationReport:
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
        evaluation = Evaluation(
            split=args.split,
            model=args.model or await server.model(),
            samples=args.samples,
            sampling=sampling_of(args, task.task),
            settings=tuple(Setting(method, eta) for method in dict.fromkeys(methods) for eta in dict.fromkeys(etas)),
            critic=critic["id"] if critic else None,
            guidance=guidance_options_of(args),
            scored=args.scores,
            vote=args.vote,
            limit=args.limit,
            seed=args.seed,
        )
        vote = None if args.vote is None else _vote(args.vote)
        return await evaluate(server, judge, task, evaluation, args.out, vote=vote, concurrency=args.concurrency)


def _vote(name: str) -> Vote:
    vote: Vote = VOTES.get(name) or registry.find(name, {}, "qsharp.votes", "vote")
    return vote


def _parser() -> argparse.ArgumentParser:
    parser = options.parser("evaluate", __doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for the report")
    parser.add_argument("--samples", type=options.positive, default=1, help="of each problem (default: %(default)s)")
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
    options.add_server_arguments(parser)
    return parser
