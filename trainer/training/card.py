"""`critic.json` of a new version, as far as it is the same for all kinds of critics."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from qsharp_core.critic.checkpoint import CriticCard
from trainer.training.outputs import Outputs
from trainer.training.prepare import Learner, Prepared
from trainer.training.settings import TrainSettings, distribution_card

# What other fields of the card say.
ELSEWHERE = {
    "backbone", "base", "continue_from", "name", "head", "atoms", "reward_range", "mlp", "borrow_embeddings",
    "tokenizer",
}  # fmt: skip


def card_fields(
    settings: TrainSettings, outputs: Outputs, learner: Learner, prepared: Prepared, result: dict[str, Any]
) -> dict[str, Any]:
    """All but the version and what the critic is made of: nothing of this machine in it."""
    policies = [asdict(p) for p in prepared.policies]
    return {
        "name": settings.name,
        "distribution": distribution_card(learner.returns).model_dump(),
        "reward_range": learner.returns.reward_range,
        "recommended_eta": outputs.recommended_eta,
        "base": _base_name(settings, learner.continues),
        "parent": learner.continues.key if learner.continues else None,
        "sampling_policy": policies[0] if len(policies) == 1 else None,
        **({"sampling_policies": policies} if len(policies) > 1 else {}),
        "metrics": result["held_out"],
        "compared_with": result["parent"],
        "data": prepared.counts,
        "training": settings.model_dump(mode="json", exclude=ELSEWHERE),
    }


def _base_name(settings: TrainSettings, parent: CriticCard | None) -> str | None:
    if settings.base is None:
        return getattr(parent, "base", None)
    return Path(settings.base).name if Path(settings.base).is_dir() else settings.base
