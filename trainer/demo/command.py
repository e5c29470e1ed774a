"""`qsharp demo sums`: the whole loop on the default model, from nothing.

It starts the default model's server without a critic, samples the model's own sums, rewards them, trains a critic on
them, activates it, does that once more with roll-ins of that critic, and measures what guidance gains on problems that
nobody trained on. Writes report.json and report.png; the same command goes on where it was stopped.
"""

import argparse
import asyncio
import signal
import time
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from trainer.demo import sums
from trainer.demo.report import table
from trainer.loop.command import until_told
from trainer.serving import serve


def main(argv: list[str]) -> None:
    """Runs the command.

    Raises:
        ServingError, LoopError, TrainingError, CollectError, EvaluateError, ServerError, JournalError
    """
    parser = argparse.ArgumentParser(
        prog="qsharp demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=["sums"])
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), metavar="FOLDER", help="default: %(default)s")
    args = parser.parse_args(argv)
    console = Console(stderr=True)
    # While nothing listens to it yet: the server must be stopped, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ExitStack() as stack:
        began = time.monotonic()
        with console.status("starting the server"):
            url = stack.enter_context(serve(sums.server_flags(args.run), args.run / "server.log"))
        demo = _demo(url, args.run, time.monotonic() - began, console)
        if not asyncio.run(until_told(demo)):
            console.print("stopped; the same command goes on from here", highlight=False)


async def _demo(url: str, folder: Path, started: float, console: Console) -> None:
    report = await sums.run(url, folder, started, console)
    shown = Console()
    shown.print(table(report))
    minutes = report["seconds"]["all"] / 60
    shown.print(
        f"{report['critic']} at eta {report['eta']:g}: {100 * report['gain']:+.1f} points, "
        f"{report['standard_errors']:.1f} standard errors, paired by problem; {minutes:.1f} minutes; "
        f"{folder / 'report.json'}, report.png",
        highlight=False,
    )
