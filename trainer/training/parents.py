"""What a new version is compared with: the version before, on the same held-out rollouts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from qsharp_core.critic.checkpoint import load
from qsharp_core.returns import ReturnDistribution
from trainer.training.heldout import Predictions, compare, predict, report
from trainer.training.passes import passes_of
from trainer.training.prepare import Prepared
from trainer.training.settings import TrainSettings


@dataclass(frozen=True)
class Parent:
    """What a new version is compared with, and its predictions; None if it cannot read these rollouts."""

    key: str
    returns: ReturnDistribution
    predictions: Predictions | None


def predict_separate(
    folder: Path, base: Path | None, settings: TrainSettings, vocab: int, prepared: Prepared, accelerator: Accelerator
) -> Parent:
    """Of a parent with a backbone of its own.

    Args:
        base: where it borrows embeddings from.
        vocab: of the new version, which the rollouts are of.
    """
    card, parent = load(folder, device=accelerator.device, reference=base)
    longest = max((r.length for r in prepared.held_out), default=0)
    able = prepared.held_out and (parent.max_length or longest) >= longest and parent.vocab >= vocab
    if not able:
        return Parent(card.key, parent.distribution, None)
    passes = passes_of(settings, accelerator, parent, prepared.held_out)
    return Parent(card.key, parent.distribution, predict(parent, prepared.held_out, passes, accelerator))


def comparison(
    parent: Parent, found: Predictions | None, returns: ReturnDistribution, prepared: Prepared
) -> dict[str, Any]:
    """For the report; `found` are the new version's predictions."""
    if found is None or parent.predictions is None:
        return {"critic": parent.key, "held_out": None, "comparison": None}
    return {
        "critic": parent.key,
        "held_out": report(parent.predictions, prepared.held_out, parent.returns)["overall"],
        "comparison": compare(found, parent.predictions, prepared.held_out, parent.returns == returns),
    }
