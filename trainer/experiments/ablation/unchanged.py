"""What is in a folder was made by the same variant, or is refused: variants may be added, and not changed."""

from pathlib import Path

from trainer.experiments.files import RecipeError
from trainer.training.job import Job
from trainer.training.settings import TrainSettings

JOB = "training.json"


def refuse_changed(place: Path, settings: TrainSettings, data: list[Path]) -> None:
    """Returns if nothing was trained in a folder, or the same.

    Args:
        place: the folder of a variant's critic.
        settings: of its training; the base may have moved.
        data: files that it learns from.

    Raises:
        RecipeError: another variant had that name.
    """
    path = place / JOB
    if not path.is_file():
        return
    job = Job.model_validate_json(path.read_bytes())
    theirs, ours = (one.model_dump(mode="json", exclude={"base"}) for one in (job.settings, settings))
    differing = next((name for name in ours if ours[name] != theirs[name]), None)
    if differing is not None:
        raise RecipeError(
            f"variants: {place.name} was trained with {differing} = {theirs[differing]!r}, not {ours[differing]!r}: "
            f"give the variant another name, or delete {place}"
        )
    if [one.name for one in job.data] != [one.name for one in data]:
        raise RecipeError(
            f"variants: {place.name} was trained on {job.data[0].name}, not {data[0].name}: give the variant another "
            f"name, or delete {place}"
        )
