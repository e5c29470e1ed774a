"""From Parquet files to what a run trains and measures on."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qsharp_core.critic.checkpoint import CriticCard
from qsharp_core.returns import ReturnDistribution
from trainer.training import data
from trainer.training.data import DataSet
from trainer.training.rollouts import Rollouts, SamplingPolicy
from trainer.training.settings import TrainingError, TrainSettings
from trainer.training.siblings import weighed
from trainer.trust import Trust


@dataclass(frozen=True)
class DataRequirements:
    """What a critic demands of the rollouts that it learns from.

    Attributes:
        returns: the distribution that the critic predicts; the rewards must be within its range.
        max_length: the most tokens of a rollout; None without a limit.
        vocab: the number of token ids; all ids must be below it.
        continues: the card of the critic that is continued; the rollouts must have its sampling policy.
    """

    returns: ReturnDistribution
    max_length: int | None
    vocab: int
    continues: CriticCard | None


@dataclass(frozen=True)
class Prepared:
    """Rollouts that passed all checks, split by prompt.

    Attributes:
        everything: all of them.
        train: the rollouts to train on, with their weights.
        held_out: the rollouts to measure on.
        policies: the sampling policies that occur.
        counts: numbers of rollouts, prompts and positions, by what became of them.
    """

    everything: DataSet
    train: Rollouts
    held_out: Rollouts
    policies: list[SamplingPolicy]
    counts: dict[str, int]


def prepare(
    paths: list[Path], settings: TrainSettings, requirements: DataRequirements, folder: Path | None = None
) -> Prepared:
    """Reads rollouts, refuses what cannot be learned from, splits and weighs the rest.

    Args:
        paths: Parquet files, or folders of them.
        settings: what is learned.
        requirements: of the critic.
        folder: on whose disk tokens and weights are kept; None is the system's folder for temporary files.

    Raises:
        TrainingError: with what to change.
    """
    everything = data.refuse_longer(
        data.read(paths, settings.group_by, Trust(settings.owner, settings.rewards_by), folder),
        requirements.max_length,
    )
    policies = data.check(everything, requirements.returns, requirements.vocab, settings.mixed_policies)
    known = getattr(requirements.continues, "sampling_policy", None)
    if known and not settings.mixed_policies and SamplingPolicy.of(known) != policies[0]:
        raise TrainingError(
            f"the critic to continue is about {SamplingPolicy.of(known)}, these rollouts are of {policies[0]}: "
            "--mixed-policies trains on them all the same"
        )
    train_on, held_out = data.split(everything.rollouts, settings.held_out)
    counts = Counter(everything.counts)
    if settings.drop_uniform_prompts:
        kept = data.without_uniform_prompts(train_on)
        counts["uniform_prompts"] = len(train_on) - len(kept)
        train_on = kept
        if not len(train_on):
            raise TrainingError("every prompt's rollouts all earned the same: nothing is left to train on")
    if settings.weigh == "nodes":
        train_on = weighed(train_on, folder)
    reasons = ("read", "of_others", "duplicates", "unrewarded", "no_valid_position", "too_long", "uniform_prompts")
    return Prepared(
        everything,
        train_on,
        held_out,
        policies,
        {reason: counts[reason] for reason in reasons}
        | {
            "train_rollouts": len(train_on),
            "train_prompts": len(np.unique(train_on.groups)),
            "held_out_rollouts": len(held_out),
            "held_out_prompts": len(np.unique(held_out.groups)),
            "train_positions": int(train_on.valid.sum()),
        },
    )
