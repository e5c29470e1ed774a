"""A recipe's fields. The defaults are for two CPU cores; GPUs' recipes set all that the paper says."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qsharp_core.wire.guidance import METHODS, MethodName
from trainer.experiments.fields import RecipeFields
from trainer.experiments.star_graph.model import PretrainedModel, SmallModel
from trainer.experiments.star_graph.optimizer import OptimizerSpec
from trainer.tasks.star_graph import Shape


class Stage(RecipeFields):
    """Steps on graphs of one size; see `tasks.star_graph.Shape`."""

    degree: int = Field(ge=1)
    length: int = Field(ge=2)
    steps: int = Field(ge=0)


class ReferenceSettings(RecipeFields):
    """How the reference is pre-trained.

    Attributes:
        model: what it is made of.
        curriculum: stages of graphs, easy ones first.
        graphs: the number of different graphs of each stage; None means that each graph is new.
        batch: graphs of a step.
        heads, weight: the number of tokens after the next one that are predicted, too, and the weight of their loss.
        optimizer: how steps are made.
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


class CriticSettings(RecipeFields):
    """How the critic's rollouts are sampled, and how it is trained.

    Attributes:
        curriculum: stages of graphs, easy ones first.
        samples: rollouts of each graph.
        batch: graphs of a step; `fresh` of them are new, the others are drawn from the last `buffer` ones.
        per_request: graphs of a request to the server.
        log_every: steps between two entries of the log.
        optimizer: how steps are made.
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


class EvaluationSettings(RecipeFields):
    """What is measured: one completion of each held-out graph of the last size, under each setting."""

    problems: int = Field(default=1000, ge=1)
    etas: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(1.0, 0.5, 0.3, 0.2, 0.15, 0.1, 0.05), min_length=1)
    methods: tuple[MethodName, ...] = Field(default=METHODS, min_length=1)
    candidates: int = Field(default=10, ge=1)
    concurrency: int = Field(default=64, ge=1)


class StarGraphRecipe(RecipeFields):
    """The fields of the recipe: Star-Graph from nothing to the report.

    Attributes:
        labels: the number of names that nodes may have.
        reference, critic, evaluation: the stages.
        server: flags of `qsharp serve`, after the model.
        device: of both trainings; `auto` is a GPU if there is one.
        threads: of PyTorch, on a CPU.
        eta: what the critic's card recommends.
        seed: of weights, graphs and samples.
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
        """The shape of a stage's graphs."""
        return Shape(degree=stage.degree, length=stage.length, labels=self.labels)

    @property
    def shape(self) -> Shape:
        """The shape of the graphs that are measured."""
        return self.shape_of(self.critic.curriculum[-1])
