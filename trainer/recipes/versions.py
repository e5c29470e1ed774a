"""Critics of a recipe, trained once."""

import json
from pathlib import Path
from typing import Any

from trainer.loop.activation import Version
from trainer.loop.settings import Recipe
from trainer.loop.training import train_version


async def trained(recipe: Recipe, folder: Path, data: list[Path]) -> tuple[Version, dict[str, Any]]:
    """A version from these rollouts, and the report of its training; what is there is not trained again.

    Args:
        folder: of the run.

    Raises:
        TrainingError, LoopError
    """
    metrics = folder / "training" / "metrics.json"  # written once the version is published
    if metrics.is_file():
        report = json.loads(metrics.read_text())
    else:
        folder.mkdir(parents=True, exist_ok=True)
        report = await train_version(recipe, folder, data, None)
    version = Version.of(report["critic"], recipe.out)
    assert version is not None
    return version, report
