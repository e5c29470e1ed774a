"""`qsharp.train`: the next version of a critic, from rollouts in Parquet files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsharp_core.critic.fetching import local_folder
from qsharp_core.locations import Location, parse_location
from trainer.api.base_model import base_of
from trainer.rollouts.address import default_key, default_url
from trainer.training.outputs import Outputs
from trainer.training.publish import working_folder
from trainer.training.report import TrainingReport
from trainer.training.run import REPORT
from trainer.training.settings import TrainingError, settings_from
from trainer.training.train import train as train_version


@dataclass(frozen=True)
class TrainedVersion:
    """A version that was published.

    Attributes:
        folder: of the critic, `out/name/version`; a path, or a URL of an object store.
        report: held-out measures, each beside that of a constant, and the comparison with the version before.
        run: has the report, plots of calibration and learning, and the metrics of each step.
    """

    folder: Location
    report: TrainingReport
    run: Path

    @property
    def key(self) -> str:
        """`name@version`."""
        return self.report.critic


def train(
    data: str | Path | Sequence[str | Path],
    *,
    out: str | Path = "critics",
    name: str = "critic",
    base: str | None = None,
    publish_anyway: bool = False,
    resume: bool = False,
    run: str | Path | None = None,
    recommended_eta: float | None = None,
    parent: str | Path | None = None,
    tensorboard: str | Path | None = None,
    log_with: Sequence[str] = (),
    url: str | None = None,
    api_key: str | None = None,
    **settings: Any,
) -> TrainedVersion:
    """Trains a critic and publishes it as the next version of its name.

    Without further settings it is a native critic, a head on the hidden states of the model, and training ends when
    held-out rollouts gain nothing more.

    Args:
        data: Parquet files of rollouts, or folders of them.
        out: versions are `out/name/version`; a folder, or a URL as `s3://bucket/folder`.
        name: of the critic.
        base: the model that the rollouts are of: a folder, a hub id, or the name that it is served under; None is the
            model that is served.
        publish_anyway: publish a critic that is no better than a constant, too.
        resume: go on with a run that was stopped.
        run: folder of checkpoints and reports; None is `out/.runs/name`, or `critics/.runs/name` where `out` is a URL.
        recommended_eta: written into the card.
        parent: folder or URL of the critic to compare with; None is the last version.
        tensorboard: folder for TensorBoard.
        log_with: trackers that see the metrics, such as `wandb` and `mlflow`.
        url, api_key: of the server that is asked for the model; None are `QSHARP_URL` and `QSHARP_API_KEY`.
        settings: fields of `trainer.training.settings.TrainSettings`, such as `weigh`, `steps`, `held_out`, `atoms`.

    Raises:
        TrainingError: above all, that the critic has learned nothing.
        CriticError
    """
    files = [Path(one) for one in ([data] if isinstance(data, str | Path) else data)]
    place = _location("out", out)
    if settings.get("continue_from") is not None:
        settings["continue_from"] = local_folder(_location("continue_from", settings["continue_from"]))
    if base is not None or settings.get("continue_from") is None:
        base = base_of(base, url or default_url(), api_key or default_key())
    made = settings_from({**settings, "base": base, "name": name})
    outputs = Outputs(
        out=place,
        run=Path(run) if run is not None else working_folder(place) / ".runs" / name,
        resume=resume,
        publish_anyway=publish_anyway,
        parent=None if parent is None else local_folder(_location("parent", parent)),
        recommended_eta=recommended_eta,
        tensorboard=None if tensorboard is None else Path(tensorboard),
        log_with=tuple(log_with),
    )
    folder = train_version(files, made, outputs)
    return TrainedVersion(folder, TrainingReport.read(outputs.run / REPORT), outputs.run)


def _location(argument: str, given: str | Path) -> Location:
    try:
        return parse_location(given)
    except ValueError as error:
        raise TrainingError(f"{argument}: {error}") from error
