"""The fields of an ablation's recipe."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator

from trainer.experiments.ablation.choice import RolloutChoice
from trainer.experiments.fields import MEASURED, SERVED, EvaluationFields, RecipeFields, RolloutFields, SampledFields
from trainer.training.settings import HEAD_ALONE, OF_A_DECODER, TrainSettings

PACE = ("epochs", "steps", "learning_rate", "batch_tokens", "grad_accumulation")
"""Fields of the training whose values suit one kind of critic only."""


class Variant(RecipeFields):
    """A critic of the ablation.

    It may have any field of `TrainSettings`, but `seed`; what it does not name is as in the recipe's `critic`. A
    variant of another `backbone` takes from there only what both kinds of critics have: neither the shape of the critic
    nor how long it is trained.

    Attributes:
        name: of the variant; the critics are `NAME` and, of further seeds, `NAME.SEED`.
        rollouts: which rollouts it learns from.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, JsonValue]

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    rollouts: RolloutChoice = RolloutChoice()

    @model_validator(mode="after")
    def _known(self) -> "Variant":
        for field in self.changes:
            if field == "seed":
                raise ValueError("seed: a variant has none of its own; name seeds beside the variants")
            if field not in TrainSettings.model_fields:
                raise ValueError(f"{field}: there is no such field of a training")
        return self

    @property
    def changes(self) -> Mapping[str, JsonValue]:
        """The fields of the training that the variant names."""
        return {name: value for name, value in self.__pydantic_extra__.items() if value is not None}


class Ablation(SampledFields):
    """The fields of the recipe.

    Attributes:
        model: the reference, a folder or a hub id; None is the default model.
        data: Parquet files of rollouts to learn from; without any, `rollouts` are sampled.
        rollouts: how many rollouts are sampled.
        critic: what the variants have in common.
        variants: each becomes version 1 of a critic of its name, for each seed.
        seeds: of the trainings, and of the rollouts that are drawn at random; none is the one of `critic`.
        evaluate: what is measured of each critic.
    """

    # More variants, seeds or measurements may be added later.
    FREE: ClassVar[dict[str, Any]] = {
        "server": True, "launcher": True, "variants": True, "seeds": True, "evaluate": MEASURED
    }  # fmt: skip

    kind: Literal["ablation"]
    model: str | None = None
    data: tuple[Path, ...] = ()
    rollouts: RolloutFields = RolloutFields()
    critic: TrainSettings = TrainSettings(base=SERVED)
    variants: tuple[Variant, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = ()
    evaluate: EvaluationFields = EvaluationFields(methods=("qsharp",))

    @field_validator("critic", mode="before")
    @classmethod
    def _start(cls, value: Any) -> Any:
        return {"base": SERVED, **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _checked(self) -> "Ablation":
        names = [variant.name for variant in self.variants]
        if len(set(names)) < len(names):
            raise ValueError("variants must have different names")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds must differ")
        for variant in self.variants:
            try:
                self.settings(variant, self.critic.seed)
            except ValueError as error:
                raise ValueError(f"variants: {variant.name}: {_first_line(error)}") from error
        return self

    @property
    def every_seed(self) -> tuple[int, ...]:
        """The seeds that each variant is trained with."""
        return self.seeds or (self.critic.seed,)

    def critic_name(self, variant: Variant, seed: int) -> str:
        """The name of a variant's critic; that of the seed of `critic` is the variant's own."""
        return variant.name if seed == self.critic.seed else f"{variant.name}.{seed}"

    def settings(self, variant: Variant, seed: int) -> TrainSettings:
        """The settings of a training.

        Raises:
            ValueError: the variant's fields contradict each other, or those of `critic`.
        """
        common = self.critic.model_dump(exclude_unset=True)
        if variant.changes.get("backbone", self.critic.backbone) != self.critic.backbone:
            common = {name: value for name, value in common.items() if name not in (*OF_A_DECODER, *HEAD_ALONE, *PACE)}
        own = {"name": self.critic_name(variant, seed), "seed": seed}
        return TrainSettings.model_validate(common | dict(variant.changes) | own)


def _first_line(error: ValueError) -> str:
    """What is wrong, of pydantic's error."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    return (f"{field}: " if field else "") + first["msg"].removeprefix("Value error, ")
