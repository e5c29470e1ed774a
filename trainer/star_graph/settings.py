"""A recipe's fields. The defaults are for two CPU cores; GPUs' recipes set all that the paper says."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qsharp_core.wire.guidance import METHODS, MethodName
from trainer.star_graph.graphs import Shape
from trainer.star_graph.model import PretrainedModel, SmallModel
from trainer.star_graph.optimizer import OptimizerSpec


class Fields(BaseModel):
    """What no field is known by is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Stage(Fields):
    """Steps on graphs of one size."""

    degree: int = Field(ge=1)
    length: int = Field(ge=2)
    steps: int = Field(ge=0)


class ReferenceSettings(Fields):
    """Pre-training.

    Attributes:
        graphs: how many different ones there are; None: each is new.
        batch: graphs of a step.
        heads, weight: tokens after the next that are predicted, too, and the weight of their loss.
    """

    model: Annotated[SmallModel | PretrainedModel, Field(discriminator="kind")] = SmallModel()
    curriculum: tuple[Stage, ...] = Field(
        default=(
            Stage(degree=2, length=5, steps=400),
            Stage(degree=3, length=5, steps=400),
            Stage(degree=5, length=5, steps=700),
        ),
        min_length=1,
    )
    graphs: int | None = Field(default=None, ge=1)
    batch: int = Field(default=64, ge=1)
    heads: int = Field(default=3, ge=0)
    weight: float = Field(default=0.5, ge=0)
    optimizer: OptimizerSpec = OptimizerSpec(learning_rate=1e-2, other_learning_rate=3e-3)


class CriticSettings(Fields):
    """The critic's rollouts and training.

    Attributes:
        samples: rollouts of each graph.
        batch: graphs of a step; `fresh` of them are new, the others are from the last `buffer` ones.
        per_request: graphs of a request to the server.
        log_every: steps between two entries of the log.
    """

    curriculum: tuple[Stage, ...] = Field(
        default=(
            Stage(degree=2, length=5, steps=400),
            Stage(degree=3, length=5, steps=400),
            Stage(degree=5, length=5, steps=2000),
        ),
        min_length=1,
    )
    samples: int = Field(default=8, ge=1)
    batch: int = Field(default=40, ge=1)
    fresh: int = Field(default=12, ge=1)
    buffer: int = Field(default=16_000, ge=1)
    per_request: int = Field(default=64, ge=1)
    log_every: int = Field(default=100, ge=1)
    optimizer: OptimizerSpec = OptimizerSpec(learning_rate=2e-3)

    @model_validator(mode="after")
    def _fresh_of_batch(self) -> "CriticSettings":
        if self.fresh > self.batch:
            raise ValueError(f"fresh must be at most batch, {self.batch}; got {self.fresh}")
        return self


class EvaluationSettings(Fields):
    """Of held-out graphs of the last size, one completion each under each setting."""

    problems: int = Field(default=1000, ge=1)
    etas: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(1.0, 0.5, 0.3, 0.2, 0.15, 0.1, 0.05), min_length=1)
    methods: tuple[MethodName, ...] = Field(default=METHODS, min_length=1)
    candidates: int = Field(default=10, ge=1)
    concurrency: int = Field(default=64, ge=1)


class StarGraphRecipe(Fields):
    """Star-Graph from nothing to the report.

    Attributes:
        labels: names of nodes.
        server: flags of `qsharp serve`, after the model.
        device: of both trainings; auto is a GPU where there is one.
        eta: that the critic's card recommends.
    """

    labels: int = Field(default=25, ge=2)
    reference: ReferenceSettings = ReferenceSettings()
    critic: CriticSettings = CriticSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    server: tuple[str, ...] = (
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "256",
        "--block-size", "32", "--kv-cache-memory-bytes", "300000000",
    )  # fmt: skip
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(default=1, ge=1)
    eta: float = Field(default=0.1, gt=0)
    seed: int = 0

    @model_validator(mode="after")
    def _graphs_fit(self) -> "StarGraphRecipe":
        for stage in (*self.reference.curriculum, *self.critic.curriculum):
            self.shape_of(stage)
        last, other = self.critic.curriculum[-1], self.reference.curriculum[-1]
        if (last.degree, last.length) != (other.degree, other.length):
            raise ValueError("critic.curriculum must end with the graphs that reference.curriculum ends with")
        return self

    def shape_of(self, stage: Stage) -> Shape:
        """A stage's graphs."""
        return Shape(degree=stage.degree, length=stage.length, labels=self.labels)

    @property
    def shape(self) -> Shape:
        """What is measured."""
        return self.shape_of(self.critic.curriculum[-1])
