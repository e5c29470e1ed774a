"""Accuracy of the default model on all held-out sums, with its critic and without, through HTTP.

    python -m benchmarks.sums_accuracy                        starts the default server itself
    python -m benchmarks.sums_accuracy --url http://…         uses one that runs
    python -m benchmarks.sums_accuracy --served critics/sums/1    the default server with this critic instead of its own
    python -m benchmarks.sums_accuracy --eta 0.05 --eta 0.2   further flags are those of `qsharp evaluate`

Every held-out problem is sampled at T = 1, 4 times unless `--samples` says otherwise. The standard errors are over
problems, so samples of one problem count as one draw; the gain is paired.
"""

import argparse
import shutil
from contextlib import nullcontext
from pathlib import Path

from trainer.commands import evaluate as evaluate_command
from trainer.serving import serve

OUT = Path("runs/sums-accuracy")


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--served")
    ours, given = parser.parse_known_args()
    flags = ["--critic", ours.served] if ours.served else []
    shutil.rmtree(OUT, ignore_errors=True)  # `qsharp evaluate` would go on with what is there
    OUT.mkdir(parents=True)
    with nullcontext(None) if "--url" in given else serve(flags, OUT / "server.log", patience=900) as url:
        at = [] if url is None else ["--url", url]
        defaults = ["--task", "sums", "--samples", "4", "--candidates", "8", "--min-prob", "0", "--no-scores"]
        evaluate_command.main([*defaults, "--out", str(OUT), *at, *given])


if __name__ == "__main__":
    main()
