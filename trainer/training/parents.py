"""A new version compared with the version before it, on the same held-out rollouts."""

from dataclasses import dataclass

from qsharp_core.returns import ReturnDistribution
from trainer.training.heldout import Predictions, compare, report
from trainer.training.prepare import Prepared
from trainer.training.report import ParentReport


@dataclass(frozen=True)
class Parent:
    """The critic that a new version is compared with.

    Attributes:
        key: `name@version`.
        returns: the distribution that it predicts.
        predictions: on the held-out rollouts; None if it cannot read them.
    """

    key: str
    returns: ReturnDistribution
    predictions: Predictions | None


def comparison(
    parent: Parent, predictions: Predictions | None, returns: ReturnDistribution, prepared: Prepared
) -> ParentReport:
    """Compares a new version with its parent.

    Args:
        parent: the critic to compare with, and its predictions.
        predictions: the new version's, on the same rollouts; None if nothing is held out.
        returns: the distribution that the new version predicts.
        prepared: the run's rollouts.
    """
    if predictions is None or parent.predictions is None:
        return ParentReport(critic=parent.key, held_out=None, comparison=None)
    return ParentReport(
        critic=parent.key,
        held_out=report(parent.predictions, prepared.held_out, parent.returns).overall,
        comparison=compare(predictions, parent.predictions, prepared.held_out, parent.returns == returns),
    )
