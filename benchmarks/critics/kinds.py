"""A separate critic with a V or a Q head beside one on the reference's hidden states, on the same rollouts.

    qsharp run default-critic --out runs/default-critic
    python -m benchmarks.critics.kinds --rollouts runs/default-critic/loop/round-0/rollouts.parquet

The weights kept are those of the least held-out log-loss, for each kind. What a step costs, `python -m
benchmarks.by_turns --measures step native` says. Writes `report.json`.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from benchmarks.critics.common import NATIVE, measured, served, trained

SEPARATE = ["--layers", 3, "--borrow-embeddings", "--lr", 5e-4, "--warmup", 0.1, "--batch-tokens", 13_000]
KINDS: dict[str, list[object]] = {
    "separate-v": [*SEPARATE, "--mlp", 512],
    # A Q head has an output for every token: with the MLP's width that would be a matrix of 49,152 × 512.
    "separate-q": [*SEPARATE, "--head", "Q"],
    "native-q": [*NATIVE],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=Path, required=True, metavar="FILE", help="Parquet, of qsharp export")
    parser.add_argument("--epochs", type=int, default=5, help="of separate critics (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=4, help="of each held-out problem (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/critic-kinds"), metavar="FOLDER")
    args = parser.parse_args()
    table = Table(
        "critic", "parameters", "training, s", "log-loss", "AUC at branches", "ECE", "gain, points", "KL, nats"
    )
    reports: dict[str, Any] = {}
    made = {}
    for kind, flags in KINDS.items():
        epochs = [] if kind.startswith("native") else ["--epochs", args.epochs]
        made[kind] = trained(args.rollouts, args.out, kind, [*flags, *epochs])
    with served(args.out) as url:
        for kind, (critic, training, seconds) in made.items():
            found, held_out = measured(url, critic, args.out, args.samples, 0), training["held_out"]
            reports[kind] = {
                "parameters": _parameters(critic), "seconds": seconds, "held_out": held_out, "measured": asdict(found),
            }  # fmt: skip
            branches = held_out["branches"]
            table.add_row(
                kind, f"{_parameters(critic):,}", f"{seconds:.0f}", f"{held_out['overall']['log_loss']:.3f}",
                f"{branches['auc']:.3f} ({branches['rollouts']})" if branches else "–",
                f"{held_out['overall']['ece']:.3f}", f"{100 * found.gain:+.1f} ± {100 * found.gain_se:.1f}",
                f"{found.kl:.2f} ± {found.kl_se:.2f}",
            )  # fmt: skip
    (args.out / "report.json").write_text(json.dumps(reports, indent=2))
    Console(width=140).print(table)


def _parameters(critic: Path) -> int:
    """Those that are stored: borrowed embeddings are not."""
    total = 0
    for path in critic.rglob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                size = 1
                for length in tensors.get_slice(name).get_shape():
                    size *= length
                total += size
    return total


if __name__ == "__main__":
    main()
