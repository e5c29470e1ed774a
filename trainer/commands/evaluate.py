"""`qsharp evaluate`: a task's accuracy against KL, over `eta` and methods, through a running server.

    qsharp evaluate --task sums --eta 0.05 --eta 0.1 --method qsharp --method cd --samples 4 --out runs/evaluation

With `--search` each sample is the best of a search of its own, and `tokens` counts those of all its samples.

Writes `report.json`, `report.png` and `samples.jsonl`; the same command goes on where it was stopped.
"""

import argparse
from pathlib import Path

from rich.console import Console

from qsharp_core.answers import VOTES
from qsharp_core.wire.guidance import METHODS
from trainer.api.calling import by_flags
from trainer.api.evaluate import evaluate
from trainer.commands import options
from trainer.commands.options import add_guidance_arguments, add_task_arguments, add_verifier_arguments
from trainer.evaluation.evaluate import PLOT, REPORT
from trainer.evaluation.table import tables
from trainer.rewards.verifiers import OWN
from trainer.tasks.sources import task_of


def main(argv: list[str]) -> None:
    """Runs the command.

    Raises:
        EvaluateError, RequestError, TaskError, VerifierError, JournalError
    """
    args = _parser().parse_args(argv)
    report = by_flags(evaluate, task_of(args.task, args.prompts), args=args, tell=options.say)
    console = Console()
    console.print(*tables(report.samples, report.results, graded=report.graded))
    if report.samples > 1:
        console.print(f"oracle {report.samples}: the best of {report.samples} by their true rewards", highlight=False)
    unjudged = sum(result.unjudged for result in report.results)
    if unjudged:
        first = f", the first: {report.failures[0]}" if report.failures else ""
        console.print(f"{unjudged} completions could not be judged and count nowhere{first}", style="red")
    console.print(
        f"{report.reference.problems} problems × {report.samples} samples, ± is one standard error over problems; "
        f"{report.seconds:.0f} s; {args.out / REPORT}, {PLOT}",
        highlight=False,
    )


def _parser() -> argparse.ArgumentParser:
    parser = options.parser("evaluate", __doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for the report")
    parser.add_argument("--samples", type=options.positive, default=1, help="of each problem (default: %(default)s)")
    add_task_arguments(parser, split="held_out")
    group = add_guidance_arguments(parser)
    group.add_argument("--eta", type=float, action="append", help="may be repeated; default: the critic's own")
    group.add_argument("--method", choices=METHODS, action="append", help="may be repeated; default: qsharp")
    for flag, of in (("--kl-total", "a completion"), ("--kl-token", "each token")):
        group.add_argument(
            flag,
            type=options.nats,
            action="append",
            metavar="NATS",
            help=f"most KL divergence that {of} may spend; may be repeated, `none` is without",
        )
    group.add_argument(
        "--search",
        type=options.search,
        action="append",
        metavar="KIND:FIELD=VALUE,…",
        help="search for each sample, as best_of:n=8,by=majority or particles:n=8,every=16; may be repeated, `none` is "
        "without",
    )
    add_verifier_arguments(parser, [OWN])
    parser.add_argument(
        "--vote", help=f"what completions vote for: {', '.join(VOTES)} or module:function; default: the task's"
    )
    parser.add_argument(
        "--no-scores", dest="scores", action="store_false", help="do not ask the critic: no best-of-k by its score"
    )
    options.add_server_arguments(parser)
    return parser
