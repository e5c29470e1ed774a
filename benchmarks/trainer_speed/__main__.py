"""`python -m benchmarks.trainer_speed`."""

import argparse
import json
import os
import shlex
import sys
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks import trainer_speed
from benchmarks.trainer_speed import data
from benchmarks.trainer_speed.measuring import Case, measure
from benchmarks.trainer_speed.report import page
from server.presets.known import DEFAULT, PRESETS
from trainer.experiments.machine import machine
from trainer.training.settings import TrainSettings


def main() -> None:
    given = parse(sys.argv[1:])
    base = str(given.base or PRESETS[DEFAULT].model())
    report: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.trainer_speed", *sys.argv[1:]]),
        "date": date.today().isoformat(), "machine": machine().model_dump(), "results": [],
    }  # fmt: skip
    given.out.mkdir(parents=True, exist_ok=True)
    for case in cases(given, base):
        report["results"].append(measure(case, given.turns))
        # What there is, should the rest fail.
        (given.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        (given.out / "report.md").write_text(page(report))
    print(page(report))


def cases(given: argparse.Namespace, base: str) -> list[Case]:
    """What is measured: every kind of critic on every kind of rollouts."""
    settings = {
        "separate": TrainSettings(
            base=base, layers=given.layers, mlp=given.mlp, borrow_embeddings=True, epochs=1, held_out=0.0,
            batch_tokens=given.batch_tokens, precision="float32",
        ),
        "native": TrainSettings(
            backbone="reference", base=base, mlp=given.mlp, epochs=given.epochs, held_out=0.0,
            batch_tokens=given.batch_prefixes,
        ),
    }  # fmt: skip
    of_files = ["files"] if given.data else []
    return [
        Case(
            kind, rollouts, settings[kind], given.rollouts, tuple(given.data), given.prompt, given.completion,
            given.whole, given.branches, given.threads,
        )
        for kind in given.kinds
        for rollouts in [*given.shapes, *of_files]
    ]  # fmt: skip


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trainer_speed",
        description=trainer_speed.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kinds", nargs="+", choices=["separate", "native"], default=["separate", "native"])
    parser.add_argument("--shapes", nargs="*", choices=["trees", "apart"], default=["trees", "apart"])
    parser.add_argument("--data", nargs="*", type=Path, default=[], metavar="FILE", help="Parquet files, besides")
    parser.add_argument("--base", type=Path, help="the reference's folder (default: the default model)")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rollouts", type=int, default=400, help="of each turn (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=data.PROMPT, help="tokens, on average (%(default)s)")
    parser.add_argument("--completion", type=int, default=data.COMPLETION, help="tokens, on average (%(default)s)")
    parser.add_argument("--whole", type=int, default=data.WHOLE, help="rollouts of a prompt (%(default)s)")
    parser.add_argument("--branches", type=int, default=data.BRANCHES, help="of a prompt, besides (%(default)s)")
    parser.add_argument("--layers", type=int, default=3, help="of the separate critic (%(default)s)")
    parser.add_argument("--mlp", type=int, default=512, help="width of either head (%(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="of a separate critic's step (%(default)s)")
    parser.add_argument("--batch-prefixes", type=int, default=1024, help="of a head's step (%(default)s)")
    parser.add_argument("--epochs", type=int, default=25, help="of a head (%(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of all sides (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/trainer-speed"), metavar="FOLDER")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
