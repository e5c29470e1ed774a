"""`qsharp run`: an experiment as its recipe describes it, with a report.

    qsharp run --list
    qsharp run tree-mdp
    qsharp run gsm8k-llama-3-8b --set evaluate.limit=100 --set "evaluate.etas=[0.1, 0.3]" --out runs/first

RECIPE is the name of a built-in recipe or a TOML file. Writes report.json and report.png; the same command goes on
where it was stopped.
"""

import argparse
import asyncio
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from trainer.commands import options
from trainer.commands.interruption import until_told
from trainer.experiments import files
from trainer.experiments.files import Recipe, RecipeError
from trainer.experiments.machine import machine
from trainer.experiments.report import RunReport
from trainer.reports import write_json
from trainer.rollouts.journal import Journal

LOCK, REPORT = "recipe.jsonl", "report.json"
WIDTH = 160  # of tables that go to a file


def main(argv: list[str]) -> None:
    """Runs the command.

    Raises:
        RecipeError, JournalError, ServingError, LoopError, TrainingError, CollectError, EvaluateError, RequestError
    """
    args = _parser().parse_args(argv)
    if args.list:
        Console().print(_listed())
        return
    if args.recipe is None:
        raise RecipeError("say which recipe to run; --list shows those that are built in")
    recipe = files.load(args.recipe, args.set)
    folder = args.out or Path("runs") / recipe.name
    if not asyncio.run(until_told(_run(recipe, folder))):
        Console(stderr=True).print("stopped; the same command goes on from here", highlight=False)


async def _run(recipe: Recipe, folder: Path) -> None:
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    # Held to the end: two processes must not work in one folder, nor one with other settings.
    with Journal(folder / LOCK, recipe.identity):
        outcome = await recipe.kind.run(recipe.settings, folder, console)
        settings = recipe.settings.model_dump(mode="json")
        about = RunReport(recipe=recipe.name, kind=recipe.kind_name, machine=machine(), settings=settings)
        write_json(folder / REPORT, about.model_dump(mode="json") | outcome.model_dump(mode="json"))
    console.print(f"{folder / REPORT}, report.png", highlight=False)


def _listed() -> Table:
    table = Table("recipe", "kind", "what it is", box=None)
    for name, path in files.built_in().items():
        table.add_row(name, *files.headline(path))
    return table


def _parser() -> argparse.ArgumentParser:
    parser = options.parser("run", __doc__)
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a name that --list shows, or a TOML file")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for everything it makes; default: runs/RECIPE")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a field, may be repeated"
    )
    parser.add_argument("--list", action="store_true", help="show the built-in recipes")
    return parser
