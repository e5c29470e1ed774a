"""From Parquet files to what a run trains and measures on."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from qsharp_core.critic.checkpoint import CriticCard
from qsharp_core.returns import ReturnDistribution
from trainer.training import data
from trainer.training.data import DataSet, Rollout, SamplingPolicy
from trainer.training.settings import TrainingError, TrainSettings
from trainer.training.siblings import weighed


@dataclass(frozen=True)
class Learner:
    """What of a critic decides which rollouts it can learn from.

    Attributes:
        max_length: tokens that it can read, None without a limit.
        vocab: token ids are below this.
        continues: the card of the critic that is gone on with.
    """

    returns: ReturnDistribution
    max_length: int | None
    vocab: int
    continues: CriticCard | None


@dataclass(frozen=True)
class Prepared:
    """Data that passed all checks, split."""

    everything: DataSet
    train: list[Rollout]
    held_out: list[Rollout]
    policies: list[SamplingPolicy]
    counts: dict[str, int]


def prepare(paths: list[Path], settings: TrainSettings, learner: Learner) -> Prepared:
    """Reads rollouts, refuses what cannot be learned from, splits and weighs the rest.

    Raises:
        TrainingError: with what to change.
    """
    everything = data.refuse_longer(data.read(paths, settings.group_by), learner.max_length)
    policies = data.check(everything, learner.returns, learner.vocab, settings.mixed_policies)
    known = getattr(learner.continues, "sampling_policy", None)
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
        if not train_on:
            raise TrainingError("every prompt's rollouts all earned the same: nothing is left to train on")
    if settings.weigh == "nodes":
        train_on = weighed(train_on)
    reasons = ("read", "duplicates", "unrewarded", "no_valid_position", "too_long", "uniform_prompts")
    return Prepared(
        everything,
        train_on,
        held_out,
        policies,
        {reason: counts[reason] for reason in reasons}
        | {
            "train_rollouts": len(train_on),
            "train_prompts": len({r.group for r in train_on}),
            "held_out_rollouts": len(held_out),
            "held_out_prompts": len({r.group for r in held_out}),
            "train_positions": sum(r.valid for r in train_on),
        },
    )
