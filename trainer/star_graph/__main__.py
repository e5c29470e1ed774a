"""`python -m trainer.star_graph [RECIPE.toml] --out FOLDER`: Star-Graph from nothing to the report."""

import argparse
import asyncio
import signal
import sys
import tomllib
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console

from qsharp_core.errors import ConfigError, QSharpError
from trainer.loop.command import until_told
from trainer.star_graph.recipe import run
from trainer.star_graph.settings import StarGraphRecipe

RECIPE = Path(__file__).parent.parent / "recipes" / "star-graph.toml"


def read(path: Path) -> StarGraphRecipe:
    """A recipe's file.

    Raises:
        ConfigError: names the field.
    """
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if (kind := fields.pop("kind", None)) != "star_graph":
        raise ConfigError(f"{path}: kind must be star_graph; got {kind!r}")
    try:
        return StarGraphRecipe.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def main() -> int:
    """Runs the recipe; 0 if it came to its end."""
    parser = argparse.ArgumentParser(prog="python -m trainer.star_graph", description=__doc__)
    parser.add_argument("recipe", type=Path, nargs="?", default=RECIPE)
    parser.add_argument("--out", type=Path, default=Path("runs/star-graph"), metavar="FOLDER")
    args = parser.parse_args()
    console = Console()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server must be stopped, too
    try:
        if asyncio.run(until_told(_run(read(args.recipe), args.out, console))):
            return 0
    except QSharpError as error:
        print(error, file=sys.stderr)
        return 1
    console.print("stopped; the same command goes on from here")
    return 1


async def _run(recipe: StarGraphRecipe, folder: Path, console: Console) -> None:
    found = await run(recipe, folder, console)
    minutes = found["seconds"]["all"] / 60
    console.print(f"{minutes:.1f} minutes; {folder / 'report.json'}, report.png", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
