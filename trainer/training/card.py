"""The fields of a new version's `critic.json` that all kinds of critics have."""

from dataclasses import asdict
from pathlib import Path

from qsharp_core.critic.checkpoint import CriticCard
from trainer.training.outputs import Outputs
from trainer.training.prepare import DataRequirements, Prepared
from trainer.training.publish import CardFields
from trainer.training.report import HeldOutReport, ParentReport
from trainer.training.settings import TrainSettings, distribution_card

# What other fields of the card say.
ELSEWHERE = {
    "backbone", "base", "continue_from", "name", "head", "atoms", "reward_range", "mlp", "borrow_embeddings",
    "tokenizer",
}  # fmt: skip


def card_fields(
    settings: TrainSettings,
    outputs: Outputs,
    requirements: DataRequirements,
    prepared: Prepared,
    held_out: HeldOutReport | None,
    against: ParentReport | None,
) -> CardFields:
    """The card's fields, except its version and what the critic is made of. They say nothing of this machine."""
    policies = [asdict(p) for p in prepared.policies]
    return {
        "name": settings.name,
        "distribution": distribution_card(requirements.returns).model_dump(),
        "reward_range": requirements.returns.reward_range,
        "recommended_eta": outputs.recommended_eta,
        "base": _base_name(settings, requirements.continues),
        "parent": requirements.continues.key if requirements.continues else None,
        "sampling_policy": policies[0] if len(policies) == 1 else None,
        **({"sampling_policies": policies} if len(policies) > 1 else {}),
        "metrics": held_out.model_dump() if held_out else None,
        "compared_with": against.model_dump() if against else None,
        "data": prepared.counts,
        "training": settings.model_dump(mode="json", exclude=ELSEWHERE),
    }


def _base_name(settings: TrainSettings, parent: CriticCard | None) -> str | None:
    if settings.base is None:
        return getattr(parent, "base", None)
    return Path(settings.base).name if Path(settings.base).is_dir() else settings.base
