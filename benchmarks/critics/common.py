"""Trains and measures critics of the default model, by the commands that users type."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq

from qsharp_core.precision import fast_bfloat16
from server.presets.smollm2 import ensure_smollm2
from trainer.serving import serve

TASK, ETA, KEY = "sums", 0.1, "benchmark"
PRECISION = "bf16" if fast_bfloat16() else "float32"
NATIVE = ["--backbone", "reference", "--epochs", "25", "--batch-tokens", "1024", "--lr", "1e-3"]
SHARED = ["--held-out", "0.06", "--weigh", "nodes", "--dtype", "bf16", "--precision", PRECISION, "--publish-anyway"]


@dataclass(frozen=True)
class Measured:
    """Guided accuracy at `ETA` on the held-out problems, paired with the reference's; KL in nats."""

    reference: float
    accuracy: float
    accuracy_se: float
    gain: float
    gain_se: float
    kl: float
    kl_se: float
    n: int


def qsharp(*arguments: object) -> None:
    """Runs a command, on one thread: what runs beside would make more of them slower."""
    command = [str(Path(sys.executable).parent / "qsharp"), *map(str, arguments)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def subset(rollouts: Path, count: int, seed: int, path: Path) -> Path:
    """So many of a file's rollouts, drawn at random, in a file of their own."""
    table = pq.read_table(rollouts)
    rows = sorted(random.Random(seed).sample(range(table.num_rows), min(count, table.num_rows)))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.take(rows), path)
    return path


def trained(
    data: Path, folder: Path, name: str, flags: Sequence[object], base: Path | None = None
) -> tuple[Path, dict[str, Any], float]:
    """A critic, its training report, and the seconds that its training took; what is there is not trained again.

    Args:
        data: rollouts.
        folder: for critics.
        name: of the critic.
        flags: of `qsharp train`.
        base: the model that it is for; None is the default model.
    """
    critic, seconds = folder / "critics" / name / "1", folder / "critics" / f"{name}.seconds"
    if not seconds.exists():
        began = time.monotonic()
        features = ["--features", folder / "features"] if "reference" in flags else []
        to = ["--out", folder / "critics", "--name", name, "--resume", "--recommended-eta", ETA]
        qsharp("train", "--data", data, "--base", base or ensure_smollm2(), *to, *features, *SHARED, *flags)
        seconds.write_text(str(time.monotonic() - began))
    report: dict[str, Any] = json.loads((folder / "critics" / ".runs" / name / "metrics.json").read_text())
    return critic, report, float(seconds.read_text())


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The default model's server, without critics; gives its URL."""
    with serve(
        ["--no-critic", "--admin-key", KEY, "--critic-root", str(folder), "--max-model-len", "512"],
        folder / "server.log",
        patience=900,
    ) as url:
        yield url


def measured(url: str, critic: Path, folder: Path, samples: int, seed: int) -> Measured:
    """Loads a critic into the server, measures it on the 141 held-out problems, and unloads it."""
    name, version = critic.parent.name, critic.name
    admin = {"Authorization": f"Bearer {KEY}"}
    out = folder / "evaluation" / name
    if not (out / "report.json").exists():
        httpx.post(
            f"{url}/v1/critics", json={"path": str(critic.absolute())}, headers=admin, timeout=600
        ).raise_for_status()
        qsharp(
            "evaluate", "--task", TASK, "--samples", samples, "--seed", seed, "--candidates", 8, "--min-prob", 0,
            "--no-scores", "--eta", ETA, "--critic", f"{name}@{version}", "--out", out, "--url", url,
            "--concurrency", 32,
        )  # fmt: skip
        httpx.delete(f"{url}/v1/critics/{name}/{version}", headers=admin, timeout=600).raise_for_status()
    results = json.loads((out / "report.json").read_text())["results"]
    (reference,) = (r for r in results if r["method"] == "reference")
    (guided,) = (r for r in results if r["method"] == "qsharp")
    fields = {name: guided[name] for name in ("accuracy", "accuracy_se", "gain", "gain_se", "kl", "kl_se", "n")}
    return Measured(reference=reference["accuracy"], **fields)
