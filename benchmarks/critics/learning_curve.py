"""What more rollouts are worth to a head on the default model's hidden states.

    qsharp run default-critic --out runs/default-critic
    python -m benchmarks.critics.learning_curve --rollouts runs/default-critic/loop/round-0/rollouts.parquet

Each size is drawn at random from the file, once for each seed, which is that of the training and of the samples, too.
Writes `report.json` and `report.png`.
"""

import argparse
import json
import statistics
from dataclasses import asdict
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.critics.common import NATIVE, Measured, measured, served, subset, trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=Path, required=True, metavar="FILE", help="Parquet, of qsharp export")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 2500, 5000, 10000, 16000])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=2, help="of each held-out problem, for each seed")
    parser.add_argument("--out", type=Path, default=Path("runs/learning-curve"), metavar="FOLDER")
    args = parser.parse_args()
    cases = [(size, seed) for size in args.sizes for seed in range(args.seeds)]
    critics = {}
    for size, seed in tqdm(cases, desc="training", unit="critic"):
        data = subset(args.rollouts, size, seed, args.out / "data" / f"{size}-{seed}.parquet")
        flags = [*NATIVE, "--select", "last", "--seed", seed]
        critics[size, seed], _, _ = trained(data, args.out, f"r{size}-s{seed}", flags)
    curve: dict[int, list[Measured]] = {size: [] for size in args.sizes}
    with served(args.out) as url:
        for size, seed in tqdm(cases, desc="evaluation", unit="critic"):
            curve[size].append(measured(url, critics[size, seed], args.out, args.samples, seed))
    points = {size: [asdict(one) for one in found] for size, found in curve.items()}
    (args.out / "report.json").write_text(json.dumps(points, indent=2))
    _plot(args.out / "report.png", curve)
    table = Table("rollouts", "guided, each seed", "gain, points: mean", "s.d. over seeds", "KL, nats", "n")
    for size, found in curve.items():
        gains = [100 * one.gain for one in found]
        each = ", ".join(f"{100 * one.accuracy:.1f} %" for one in found)
        spread = f"{statistics.stdev(gains):.1f}" if len(gains) > 1 else "–"
        kl = statistics.mean(one.kl for one in found)
        mean = f"{statistics.mean(gains):+.1f}"
        table.add_row(f"{size:,}", each, mean, spread, f"{kl:.2f}", str(sum(one.n for one in found)))
    Console().print(table)


def _plot(path: Path, curve: dict[int, list[Measured]]) -> None:
    figure = Figure(figsize=(6.4, 4.2), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    for size, found in curve.items():
        for one in found:
            axes.errorbar([size], [100 * one.gain], yerr=[100 * one.gain_se], color="#2b6cb0", marker="o", capsize=2.5)
    means = [100 * statistics.mean(one.gain for one in found) for found in curve.values()]
    axes.plot([*curve], means, color="#2b6cb0", linewidth=1.2)
    axes.set_xscale("log")
    axes.set_xticks([*curve], [f"{size:,}" for size in curve])
    axes.minorticks_off()
    axes.set(xlabel="rollouts", ylabel="gain at η = 0.1, points (± one standard error)")
    axes.set_title("Default model, held-out sums: a point for each seed", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e9ec", linewidth=0.8)
    axes.set_axisbelow(True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
