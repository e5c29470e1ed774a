"""The stages that a loop and a watch share: training the next version, and activating it if it is better."""

import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.loop.activation import ServedCritic, decide
from trainer.loop.report import ActivateResult
from trainer.loop.settings import CriticRecipe
from trainer.loop.trial import Trial
from trainer.loop.versions import Version
from trainer.reports import write_json
from trainer.training.job import Job
from trainer.training.launcher import Launcher, launch
from trainer.training.report import TrainingReport
from trainer.training.run import REPORT
from trainer.training.settings import TrainingError


async def train_version(
    recipe: CriticRecipe, folder: Path, data: Sequence[Path], active: Version | None
) -> TrainingReport:
    """Trains and publishes the next version, in a process of its own, or in those of the recipe's launcher.

    Args:
        recipe: how it is made.
        folder: of the round; the run is in `folder/training`.
        data: Parquet files of rollouts.
        active: the version that it is compared with; None without one.

    Returns:
        The run's report.

    Raises:
        TrainingError: there is no new version; the process has printed why.
        CriticError: the active version cannot be fetched.
    """
    file = folder / "training.json"
    job = await asyncio.to_thread(_job, recipe, folder, list(data), active)
    write_json(file, job.model_dump(mode="json"))
    if recipe.launcher:
        await launch_job(recipe.launcher, file)
    else:
        await run_job(file)
    return TrainingReport.read(job.run / REPORT)


def _job(recipe: CriticRecipe, folder: Path, data: list[Path], active: Version | None) -> Job:
    """The training of the next version. The active one is fetched if it is in an object store."""
    return Job(
        data=data,
        settings=recipe.settings_after(active),
        out=recipe.out,
        run=folder / "training",
        parent=active.on_disk if active else None,
        recommended_eta=recipe.eta,
        dtype=recipe.dtype,
        checkpoint_every=recipe.checkpoint_every,
        features=recipe.features,
        features_bytes=recipe.features_bytes,
        started_by=None if recipe.launcher else os.getpid(),
    )


async def run_job(path: Path) -> None:
    """Runs the training job in a file to its end; if this is cancelled, the job stops, and goes on the next time.

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
        raise _no_version(path, f"exit status {status}, the reason stands above")


async def launch_job(launcher: Launcher, path: Path) -> None:
    """As `run_job`, in the processes that a launcher starts.

    Raises:
        TrainingError
    """
    try:
        await launch(launcher, "-m", "trainer.training.job", str(path))
    except TrainingError as error:
        raise _no_version(path, str(error)) from error


def _no_version(path: Path, why: str) -> TrainingError:
    return TrainingError(
        f"no version came of {path} ({why}); the same command tries again, with what was changed since in prompts, "
        "verifiers and rewards"
    )


async def activate_if_better(
    served: ServedCritic,
    recipe: CriticRecipe,
    report: TrainingReport,
    active: Version | None,
    trial: Trial | None = None,
) -> ActivateResult:
    """Loads and activates a new version if it is better than the active one, and keeps these two loaded.

    Args:
        served: the critic in the server.
        recipe: how versions are made.
        report: of the new version's training.
        active: the version that guides; None without one.
        trial: what is better on held-out rollouts must be so on live traffic, too; None: it need not.

    Raises:
        RequestError
    """
    new = Version.of(report.critic, recipe.out)
    decision = decide(report, active.key if active else None)
    better, why, tried = decision.better, decision.why, None
    if better and trial is not None and active is not None:
        tried = await trial.run(new, active, why)
        better, why = tried.outcome == "better", f"{why}; trial: {tried.outcome}, {tried.why}"
        if tried.outcome == "ended":
            now = await served.current(active)
            guides = now.key if now else None
            return ActivateResult(activated=guides == new.key, why=why, critic=guides, trial=tried)
    if better:
        await served.activate(new)
        await served.unload_all_but(new, active)
    now = new if better else active
    return ActivateResult(activated=better, why=why, critic=now.key if now else None, trial=tried)
