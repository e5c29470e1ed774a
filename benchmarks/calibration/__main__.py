"""`python -m benchmarks.calibration`."""

import argparse
import asyncio
import json
import os
import shlex
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks import calibration
from benchmarks.calibration.fitting import bootstrapped, cross_fitted, fit
from benchmarks.calibration.guided import Asked, compared, measured
from benchmarks.calibration.outputs import outputs
from benchmarks.calibration.report import diagrams, page, rows
from benchmarks.calibration.scaled import write_scaled
from qsharp_core.critic.checkpoint import read_card
from server.presets.known import DEFAULT, PRESETS
from trainer.experiments.machine import machine
from trainer.serving import serve
from trainer.training.data import read, split
from trainer.training.heldout import compare


def main() -> None:
    given = parse(sys.argv[1:])
    base = given.base or PRESETS[DEFAULT].model()
    given.out.mkdir(parents=True, exist_ok=True)
    report = calibrated(given.critic, base, given.data, given.held_out, given.out)
    report |= {
        "command": shlex.join(["python", "-m", "benchmarks.calibration", *sys.argv[1:]]),
        "date": date.today().isoformat(), "machine": machine().model_dump(),
    }  # fmt: skip
    if given.etas:
        asked = Asked(given.task, given.etas, given.samples, given.limit, given.candidates)
        report |= {"asked": asdict(asked), "guided": served(given, base, asked)}
    (given.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (given.out / "report.md").write_text(page(report))
    print(page(report))


def calibrated(critic: Path, base: Path, data: list[Path], held_out: float | None, out: Path) -> dict[str, Any]:
    """Fits the temperature, and writes the diagrams and the scaled critic's folder.

    Args:
        critic: the critic's folder.
        base: the reference's.
        data: Parquet files of rollouts.
        held_out: the fraction of the prompts that measures; None is what the critic's card says.
        out: gets `reliability.png`, `scaled` and the reference's features.
    """
    card = read_card(critic)
    training = (card.model_extra or {}).get("training") or {}
    fraction = training.get("held_out") if held_out is None else held_out
    if not fraction:
        raise SystemExit(f"{critic} does not say which prompts it was not trained on: --held-out")
    rollouts = read(data, training.get("group_by")).rollouts
    unseen = rollouts if fraction == 1 else split(rollouts, fraction)[1]
    found = outputs(critic, base, unseen, out / "features")
    temperature = fit(found)
    halves, of_labels = cross_fitted(found)
    raw, scaled = found.predictions(), found.predictions(of_labels)
    bounds = found.returns.reward_range
    diagrams(out / "reliability.png", raw, scaled, f"{card.key} on held-out prompts", bounds)
    target = out / "scaled" / card.name / f"{card.version}.scaled"
    if not target.exists():
        write_scaled(critic, target, temperature)
    if abs((read_card(target).model_extra or {})["temperature"] / temperature - 1) > 1e-3:
        raise SystemExit(f"--out: {target} has another temperature than these rollouts give: name another folder")
    return {
        "critic": card.key, "scaled": str(target), "rollouts": len(unseen), "prompts": len(set(unseen.groups.tolist())),
        "temperature": temperature, "temperature_95": bootstrapped(found), "halves": halves,
        "gain": compare(scaled, raw, unseen, same_distribution=True).model_dump(),
        "positions": rows(raw, scaled, bounds),
    }  # fmt: skip


def served(given: argparse.Namespace, base: Path, asked: Asked) -> list[dict[str, Any]]:
    """Both critics behind one server."""
    card = read_card(given.critic)
    scaled = given.out / "scaled" / card.name / f"{card.version}.scaled"
    folders = {"raw": given.critic, "scaled": scaled}
    flags = [flag for folder in folders.values() for flag in ("--critic", str(folder))]
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # else nearly all of the memory
    with serve([str(base), *flags, *given.flags], given.out / "server.log", patience=900) as url:
        found = {
            side: asyncio.run(measured(url, asked, read_card(folder).key, given.out / side))
            for side, folder in folders.items()
        }
    return compared(found["raw"], found["scaled"], asked.etas)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calibration",
        description=calibration.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--critic", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE", help="Parquet, of qsharp export")
    parser.add_argument("--base", type=Path, metavar="FOLDER", help="the reference (default: the default model)")
    parser.add_argument(
        "--held-out", type=float, help="as in the training (default: as the card says); 1: no prompt was trained on"
    )
    parser.add_argument("--task", default="sums", help="whose held-out problems are guided (default: %(default)s)")
    parser.add_argument(
        "--etas", type=float, nargs="*", default=[0.03, 0.1, 0.3, 1.0], help="none: nothing is served (%(default)s)"
    )
    parser.add_argument("--samples", type=int, default=4, help="of each problem (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="only the first so many problems")
    parser.add_argument("--candidates", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/calibration"), metavar="FOLDER")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of qsharp serve, the last")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
