"""What decides what a training run learns. Two runs with equal settings and data end with equal weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qsharp_core.critic.checkpoint import BernoulliCard, CategoricalCard, read_card
from qsharp_core.critic.model import HeadKind
from qsharp_core.errors import QSharpError
from qsharp_core.returns import Bernoulli, Categorical, ReturnDistribution
from qsharp_core.wire.critics import CriticName

Backbone = Literal["own", "reference"]
HEAD_ALONE: dict[str, Any] = {
    "head": "Q",
    "mlp": 512,
    "warmup": 0.3,
    "input_dropout": 0.1,
    "dropout": 0.2,
}
"""Defaults of `TrainSettings` for a critic that is a head on the reference's hidden states."""
OF_A_DECODER = ("layers", "borrow_embeddings", "tokenizer")
"""Settings that such a critic does not have."""


def kind_meant(fields: Mapping[str, Any]) -> Backbone:
    """The kind of critic that settings mean which do not name it: a native one, unless they are those of a decoder."""
    own = any(fields.get(name) for name in (*OF_A_DECODER, "continue_from")) or fields.get("head") == "V"
    return "own" if own else "reference"


class TrainingError(QSharpError):
    """A training run cannot start or go on; the message says what to change."""


class TrainSettings(BaseModel):
    """All that decides what is learned.

    Attributes:
        backbone: `own` is a decoder of the critic's own. With `reference` the critic has no backbone: it is a head on
            the reference's hidden states, with a Q head and other defaults (`HEAD_ALONE`).
        base: the Hugging Face decoder to start from. With `continue_from` it is where borrowed embeddings are read;
            with `backbone: reference` it is the reference.
        layers: how many of the base's first layers are kept; None keeps all.
        continue_from: folder of the critic that is continued; None starts with a fresh one.
        name: of the critic; its versions are numbered.
        head: `V` or `Q`; see docs/method.md.
        atoms: rewards that a categorical distribution knows, ascending; None is a Bernoulli distribution.
        reward_range: the least and the greatest reward that there can be.
        mlp: width of a hidden layer in the head; None is a linear head.
        borrow_embeddings: whether the token embeddings are the reference's, and neither trained nor stored.
        tokenizer: folder or hub id of the tokenizer whose ids the rollouts have; None is the base's. It must be named
            if the base's vocabulary differs from the reference's in tokens that do not matter.
        owner: whose rollouts are learned from; none is everybody's.
        rewards_by: whose rewards count: a rollout's reward is the last one that one of these gave; none is everybody's.
        held_out: fraction of the prompts that only measure.
        group_by: the entry of the metadata that the split goes by; None is the prompt's token ids.
        drop_uniform_prompts: whether training prompts whose rollouts all have one reward are left out.
        loss: negative log-`likelihood` of the reward, or `squared` error of the expected reward.
        weigh: with `rollouts` all rollouts count alike, and so do the positions of one. With `nodes` each prefix counts
            once, and more where rollouts part (`siblings`). Held-out measures always weigh by rollouts.
        mixed_policies: whether rollouts of different sampling policies are accepted.
        epochs: passes over the training rollouts, or over their distinct prefixes with `backbone: reference`. None is
            as many as the amount of data asks for, and no more once held-out rollouts gain nothing by them (`plan`).
        steps: of the optimizer, instead of epochs, for a head on the reference's hidden states.
        max_seconds: a run's training ends after so many; its learning rate falls with the time. None is no limit.
        learning_rate: the greatest; after the warm-up it falls to 0 along a cosine. None follows from what is trained.
        batch_tokens: tokens of one step, over all processes; with `backbone: reference` distinct prefixes of one step.
            None follows from the amount of data.
        input_dropout, dropout: of a head on the reference's hidden states: of its inputs, and after its GELU layer.
        grad_accumulation: the least number of passes that a step is run in, which saves memory and changes nothing
            else.
        clip: the greatest norm of the gradient.
        warmup: fraction of the steps.
        weight_decay: of matrices; biases and norms have none.
        seed: of the head's weights, of dropout and of the order.
        share_prefixes: whether a prefix that rollouts share is run once.
        precision: of the forward pass. `auto` is bf16 on a GPU that has it, and for passes of the reference also on a
            CPU that is fast in it.
        select: whether the weights of the last epoch are kept, or those of the epoch with the least held-out log-loss.
            A tenth of a head's steps takes the place of an epoch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone: Backbone = "own"
    base: str | None = None
    layers: int | None = Field(default=None, ge=1)
    continue_from: Path | None = None
    name: CriticName = "critic"
    head: HeadKind = "V"
    atoms: tuple[float, ...] | None = Field(default=None, min_length=2)
    reward_range: tuple[float, float] = (0.0, 1.0)
    mlp: int | None = Field(default=None, ge=1)
    borrow_embeddings: bool = False
    tokenizer: str | None = None

    owner: tuple[str, ...] = ()
    rewards_by: tuple[str, ...] = ()
    held_out: float = Field(default=0.1, ge=0, lt=1)
    group_by: str | None = None
    drop_uniform_prompts: bool = False
    loss: Literal["likelihood", "squared"] = "likelihood"
    weigh: Literal["rollouts", "nodes"] = "rollouts"
    mixed_policies: bool = False

    epochs: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)
    max_seconds: float | None = Field(default=None, gt=0)
    learning_rate: float | None = Field(default=None, gt=0)
    batch_tokens: int | None = Field(default=None, ge=1)
    grad_accumulation: int = Field(default=1, ge=1)
    clip: float = Field(default=1.0, gt=0)
    warmup: float = Field(default=0.05, ge=0, le=1)
    weight_decay: float = Field(default=0.1, ge=0)
    input_dropout: float = Field(default=0.0, ge=0, lt=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    seed: int = 0
    share_prefixes: bool = True
    precision: Literal["auto", "float32", "bf16"] = "auto"
    select: Literal["best", "last"] = "best"

    @model_validator(mode="before")
    @classmethod
    def _of_a_head_alone(cls, fields: Any) -> Any:
        return HEAD_ALONE | fields if isinstance(fields, dict) and fields.get("backbone") == "reference" else fields

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.base is None and self.continue_from is None:
            raise ValueError("say where to start: --base or --continue")
        if self.backbone == "reference":
            if self.base is None:
                raise ValueError("a head on the reference's hidden states needs the reference: --base")
            if wrong := next((name for name in OF_A_DECODER if getattr(self, name)), None):
                raise ValueError(f"--{wrong.replace('_', '-')} is for critics with a backbone of their own")
            if self.head != "Q" or self.mlp is None:
                raise ValueError("a head on the reference's hidden states is --head Q with --mlp WIDTH")
        elif self.steps is not None:
            raise ValueError("--steps is for --backbone reference; others are trained for --epochs")
        elif self.dropout or self.input_dropout:
            raise ValueError("--dropout and --input-dropout are for --backbone reference")
        low, high = self.reward_range
        if not low < high:
            raise ValueError(f"--reward-range must ascend, got {low} {high}")
        if self.atoms is None:
            if self.reward_range != (0.0, 1.0):
                raise ValueError("a Bernoulli critic's rewards are 0 and 1; for others use --distribution categorical")
        elif list(self.atoms) != sorted(set(self.atoms)) or self.atoms[0] < low or self.atoms[-1] > high:
            raise ValueError(f"--atoms must ascend within --reward-range [{low}, {high}]")
        return self

    @property
    def returns(self) -> ReturnDistribution:
        """The distribution that a fresh critic predicts."""
        return Categorical(self.atoms, self.reward_range) if self.atoms else Bernoulli()


def settings_from(fields: Mapping[str, Any]) -> TrainSettings:
    """The settings that some fields make, as flags have them: None is not given, and what follows is filled in.

    The kind of critic follows from the others (`kind_meant`), or is that of the critic that is continued; the range of
    rewards is that of the atoms.

    Raises:
        TrainingError: they contradict each other, or one is out of range.
        CriticError: the critic to continue cannot be read.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    if given.get("continue_from") is not None:
        if read_card(Path(given["continue_from"])).backbone == "reference":
            given["backbone"] = "reference"
    else:
        given.setdefault("backbone", kind_meant(given))
        if given.get("atoms") and "reward_range" not in given:
            given["reward_range"] = (min(given["atoms"]), max(given["atoms"]))
    try:
        return TrainSettings.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        flag = "--" + str(first["loc"][0]).replace("_", "-") + ": " if first["loc"] else ""
        raise TrainingError(flag + first["msg"].removeprefix("Value error, ")) from error


def distribution_card(returns: ReturnDistribution) -> BernoulliCard | CategoricalCard:
    """A distribution as `critic.json` has it."""
    if isinstance(returns, Categorical):
        return CategoricalCard(kind="categorical", atoms=list(returns.atoms))
    return BernoulliCard(kind="bernoulli")
