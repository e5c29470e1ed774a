"""`python -m benchmarks.bellman_residual`."""

import argparse
import json
from pathlib import Path

from benchmarks import bellman_residual
from benchmarks.bellman_residual.critics import RIGHT, critics
from benchmarks.bellman_residual.report import made, show
from benchmarks.bellman_residual.sampling import sample
from benchmarks.bellman_residual.statistics import Answer, read
from qsharp_core.residual import CERTAIN
from trainer.reports import write_json
from trainer.serving import serve

ETA = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=bellman_residual.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bellman-residual"), metavar="FOLDER")
    parser.add_argument("--rollouts", type=int, default=4, help="of each problem, for the other critics")
    parser.add_argument("--samples", type=int, default=4, help="answers to each problem by each critic")
    parser.add_argument("--certain", type=float, default=CERTAIN, help="as in qsharp_core.residual (%(default)s)")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    answers = given.out / "answers.jsonl"
    if not answers.exists():
        found = critics(given.out, given.rollouts)
        flags = [flag for name, folder in found.items() for flag in ("--critic", f"{name}={folder}")]
        settings = [{"critic": name, "eta": ETA} for name in found] + [{"critic": RIGHT, "eta": 1.0}]
        with serve([*flags, "--critic-cache-gib", "0.3"], given.out / "server.log", patience=900) as url:
            sample(url, answers, settings, given.samples)
    of_critic: dict[str, list[Answer]] = {}
    for line in map(json.loads, answers.read_text().splitlines()):
        label = line["critic"] if line["eta"] == ETA else f"{line['critic']}, eta {line['eta']:g}"
        of_critic.setdefault(label, []).append(read(line, given.certain))
    report = made(of_critic, RIGHT)
    write_json(given.out / "report.json", report)
    show(report)


if __name__ == "__main__":
    main()
