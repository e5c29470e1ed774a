"""`qsharp reward`: judges stored rollouts that have no reward yet, and gives them one.

    qsharp reward --verifier task
    qsharp reward --prompts math.jsonl --verifier math_verify --verifier mine:no_rambling=0.2

A verifier is `exact`, `numeric`, `math_verify`, `star_graph`, `task` (the task's own reward), an entry point of the
group `qsharp.verifiers`, or `module:function`; with `=WEIGHT` several make a weighted mean of those that apply.
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.api.calling import by_flags
from trainer.api.reward import reward
from trainer.commands import options
from trainer.rewards.base import VerifierError
from trainer.rewards.run import Rewarded, extremes
from trainer.rewards.verifiers import TaskRef
from trainer.tasks.registry import find_task
from trainer.tasks.sources import prompts_task

SHOWN = 5  # failures
LONGEST = 160  # characters of an example


def main(argv: list[str]) -> None:
    """Runs the command.

    Raises:
        VerifierError, RequestError, TaskError
    """
    args = _parser().parse_args(argv)
    tasks = [TaskRef(find_task(spec), spec) for spec in args.task]
    tasks += [TaskRef(prompts_task(path)) for path in args.prompts]
    result = by_flags(reward, args=args, prompts=None, tasks=tasks, tell=options.say)
    _say(result, Console())
    if result.tally.failed and not result.tally.judged:
        raise VerifierError("no completion could be judged; the first failures stand above")


def _parser() -> argparse.ArgumentParser:
    parser = options.parser("reward", __doc__)
    options.add_verifier_arguments(parser, None)
    parser.add_argument("--source", help="kept with every reward; default: the verifiers")
    parser.add_argument(
        "--task", action="append", default=[], help="a task given as module:object; registered tasks need no flag"
    )
    parser.add_argument(
        "--prompts", action="append", default=[], metavar="FILE", help="the same: JSON lines, or a data set's name"
    )
    parser.add_argument("--again", action="store_true", help="also those that have a reward")
    parser.add_argument("--failures", type=Path, metavar="FILE", help="append failures to this file, as JSON lines")
    parser.add_argument("--batch", type=options.positive, default=200, help="rollouts at a time (%(default)s)")
    options.add_filter_arguments(parser)
    options.add_server_arguments(parser)
    return parser


def _examples(result: Rewarded) -> Table:
    """What earned how much; of many rewards the least and the greatest."""
    table = Table("reward", "answers", "for example")
    for value in extremes(result.values):
        text = " ".join(result.examples[value].split())
        shown = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
        table.add_row(f"{value:g}", str(result.values[value]), Text(shown))
    return table


def _say(result: Rewarded, console: Console) -> None:
    tally = result.tally
    table = Table("verifier", "judged", "not applicable", "failed")
    for name, counts in tally.by_verifier.items():
        table.add_row(name, *(str(counts[kind]) for kind in ("judged", "not_applicable", "failed")))
    table.add_row("together", str(tally.judged), str(tally.not_applicable), str(tally.failed), style="bold")
    console.print(table)
    if result.values:
        console.print(_examples(result))
    mean = "" if tally.mean is None else f", mean {tally.mean:.4f}"
    if result.own.mean is not None and result.own.judged != tally.judged:
        mean += f" ({result.own.mean:.4f} of the {result.own.judged} whole answers of the model alone)"
    if result.unknown:
        console.print(
            f"{result.unknown} rollouts answer problems that are in none of the tasks: name their file with --prompts, "
            "or their module with --task",
            style="yellow",
        )
    gone = f"; {result.gone} rollouts were deleted meanwhile" if result.gone else ""
    console.print(f"{result.given} rewards given, {result.changed} of them new{mean}{gone}; {result.seconds:.0f} s")
    for failure in result.failures[:SHOWN]:
        console.print(f"{failure['rollout']}: {failure['verifier']} {failure['reason']}", markup=False, style="red")
    if len(result.failures) > SHOWN:
        console.print(f"… and {len(result.failures) - SHOWN} more failures", style="red")
