"""Critics that a recipe trains once."""

from pathlib import Path

from trainer.loop.settings import CriticRecipe
from trainer.loop.training import train_version
from trainer.loop.versions import Version
from trainer.training.report import TrainingReport
from trainer.training.run import REPORT


async def trained(recipe: CriticRecipe, folder: Path, data: list[Path]) -> tuple[Version, TrainingReport]:
    """A version that learned from these rollouts, and the report of its training. If it is there, nothing is trained.

    Args:
        recipe: how the version is made.
        folder: of the work; the training run is in `folder/training`.
        data: Parquet files of rollouts.

    Raises:
        TrainingError, LoopError
    """
    path = folder / "training" / REPORT  # written once the version is published
    if path.is_file():
        report = TrainingReport.read(path)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        report = await train_version(recipe, folder, data, None)
    return Version.of(report.critic, recipe.out), report
