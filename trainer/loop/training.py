"""The stages that a loop and a watch share: training the next version, and activating it if it is better."""

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.evaluate import write_json
from trainer.loop.activation import ServedCritic, Version, verdict
from trainer.loop.settings import Recipe
from trainer.training.job import Job
from trainer.training.settings import TrainingError


async def train_version(recipe: Recipe, folder: Path, data: Sequence[Path], active: Version | None) -> dict[str, Any]:
    """Trains and publishes, in a process of its own, and returns the run's report.

    Args:
        folder: of the round; the run is in `folder/training`.
        active: what the new version is compared with.

    Raises:
        TrainingError: it said why on the terminal.
    """
    job = Job(
        data=list(data),
        settings=recipe.settings_after(active),
        out=recipe.out,
        run=folder / "training",
        parent=active.folder if active else None,
        recommended_eta=recipe.eta,
        dtype=recipe.dtype,
        checkpoint_every=recipe.checkpoint_every,
        started_by=os.getpid(),
    )
    write_json(folder / "training.json", job.model_dump(mode="json"))
    await run_job(folder / "training.json")
    report: dict[str, Any] = json.loads((job.run / "metrics.json").read_text())
    return report


async def run_job(path: Path) -> None:
    """Runs a training job to its end; a cancelled one is stopped, and goes on from its checkpoint the next time.

    Raises:
        TrainingError
    """
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "trainer.training.job", str(path))
    try:
        status = await process.wait()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    if status:
        raise TrainingError(
            f"no version came of {path} (exit status {status}, the reason stands above); the same command tries again"
        )


async def activate_if_better(
    served: ServedCritic, recipe: Recipe, report: dict[str, Any], active: Version | None
) -> dict[str, Any]:
    """Loads and activates a new version that beats the active one; keeps these two loaded.

    Returns:
        `critic` is the version that is active now, None if there is none.

    Raises:
        ServerError
    """
    new = Version.of(report["critic"], recipe.out)
    assert new is not None
    found = verdict(report, active.key if active else None)
    if found.better:
        await served.activate(new)
        await served.unload_all_but(new, active)
    now = new if found.better else active
    return {"activated": found.better, "why": found.why, "critic": now.key if now else None}
