"""`qsharp collect`: samples a task's problems through a server, which stores the rollouts.

    qsharp collect --task sums --split train --n 16 --state runs/round-0.jsonl
    qsharp collect --task sums --split train --n 2 --branch 16 --state runs/branches.jsonl
    qsharp collect --task sums --split train --n 16 --eta 0.1 --roll-in --round 1 --state runs/round-1.jsonl

The same command goes on where it was stopped, killed or not; with a larger `--n`, `--branch` or `--limit` it goes on
from there. Branches are what a critic learns most from: they take, at tokens that the model is unsure of, one of its
likeliest tokens, which its own samples may hardly ever take, and go on from there.
"""

import argparse
from pathlib import Path

from rich.console import Console

from qsharp_core.wire.guidance import METHODS
from trainer.api.calling import by_flags
from trainer.api.collect import collect
from trainer.commands import options
from trainer.commands.options import add_guidance_arguments, add_task_arguments
from trainer.rollouts.collect import Collected
from trainer.tasks.sources import task_of


def main(argv: list[str]) -> None:
    """Runs the command.

    Raises:
        CollectError, RequestError, TaskError, JournalError
    """
    args = _parser().parse_args(argv)
    task = task_of(args.task, args.prompts)
    _say(by_flags(collect, task, args=args, tell=options.say), args.roll_in)


def _parser() -> argparse.ArgumentParser:
    parser = options.parser("collect", __doc__)
    parser.add_argument("--n", type=options.positive, default=1, help="rollouts of each problem (default: %(default)s)")
    parser.add_argument(
        "--branch", type=options.positive, default=0, metavar="N",
        help="then N more of each problem that leave these where the model is unsure (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--state", type=Path, required=True, help="what was done, kept in this file")
    parser.add_argument("--round", type=int, default=0, help="a label kept with every rollout (default: %(default)s)")
    add_task_arguments(parser, split="train")
    group = add_guidance_arguments(parser)
    group.add_argument("--eta", type=float, help="in units of reward, smaller is stronger; default: unguided")
    group.add_argument("--method", choices=METHODS, default="qsharp", help="default: %(default)s")
    group.add_argument(
        "--roll-in", action="store_true", help="cut each guided completion, and have the reference go on from there"
    )
    options.add_server_arguments(parser)
    return parser


def _say(result: Collected, roll_in: bool) -> None:
    rate = result.tokens / max(result.seconds, 1e-9)
    parts = [
        f"{result.wanted} rollouts wanted" + (", each after a guided completion" if roll_in else ""),
        f"{result.before} done before",
        f"{result.made} completions sampled in {result.seconds:.0f} s ({rate:.0f} tokens/s)",
    ]
    for name, count in (
        ("found in the store", result.found),
        ("too short to be cut", result.too_short),
        ("that would leave where the model is sure or ends", result.no_way_out),
        ("failed", len(result.failed)),
        ("requests tried again", result.retries),
    ):
        if count:
            parts.append(f"{count} {name}")
    Console(stderr=True).print(f"run {result.run}: " + "; ".join(parts), highlight=False)
