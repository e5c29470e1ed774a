"""What a training run writes: `metrics.json`, its report, and the lines of `metrics.jsonl`."""

from typing import Any, Literal

from pydantic import Field

from trainer.reports import Report, ReportPart


def _is_none(value: Any) -> bool:
    return value is None


class Measures(ReportPart):
    """How good predictions are at some positions; see `training.measures`.

    Attributes:
        n: positions.
        rollouts: rollouts that the positions are of.
        reward_mean: mean reward.
        log_loss: mean negative log-likelihood of the reward, in nats.
        brier: mean squared error of the expected reward.
        auc: the probability that a won position is predicted above a lost one; None if all are of one kind.
        ece: expected calibration error, in units of reward.
        brier_constant: the squared error of the best constant prediction.
        log_loss_constant: the log-loss of the best constant prediction; older reports of categorical critics lack it.
    """

    n: int
    rollouts: int
    reward_mean: float
    log_loss: float
    brier: float
    auc: float | None
    ece: float
    brier_constant: float
    log_loss_constant: float | None = Field(default=None, exclude_if=_is_none)


class PositionMeasures(Measures):
    """Measures at one part of the completions; `part` is for instance `20-40%`."""

    part: str


class HeldOutReport(ReportPart):
    """Measures on held-out rollouts; `branches` are the positions where roll-outs and branches begin."""

    overall: Measures
    by_position: list[PositionMeasures]
    last_token: Measures
    branches: Measures | None
    prompts: int


class Comparison(ReportPart):
    """A new version compared with another critic on the same held-out rollouts.

    Attributes:
        by: the measure.
        improvement: the other's mean over rollouts less the new version's: above 0 if the new version is better.
        standard_error: of `improvement`, where the rollouts of a prompt count as one draw; None for a single prompt.
        prompts: prompts of the rollouts.
        better: whether the new version is better.
    """

    by: Literal["log_loss", "squared_error"]
    improvement: float
    standard_error: float | None
    prompts: int
    better: bool


class ParentReport(ReportPart):
    """What a new version was compared with; nothing was measured if that critic cannot read the rollouts."""

    critic: str
    held_out: Measures | None
    comparison: Comparison | None


class TrainingReport(Report):
    """The report of a run.

    Attributes:
        critic: the version that the run published, `name@version`.
        data: numbers of rollouts, prompts and positions, by what became of them.
        steps: of the optimizer.
        best_epoch: whose weights were published; None if those of the last one were.
        held_out: measures of the published weights; None if nothing was held out.
        parent: the comparison with the version before; None if there was none.
    """

    format: Literal[1] = 1
    critic: str
    data: dict[str, int]
    steps: int
    best_epoch: int | None
    held_out: HeldOutReport | None
    parent: ParentReport | None


class StepLine(ReportPart):
    """A step of the optimizer.

    Attributes:
        step: from 1.
        epoch: of the training rollouts; of a head on the reference's hidden states the tenth of the steps; from 1.
        loss: mean loss of the step.
        lr: learning rate.
        grad_norm: the gradient's norm before clipping.
        rollouts: rollouts of the step.
        tokens_per_second, nodes_per_second: the speed; of a head alone in nodes.
    """

    step: int
    epoch: int
    loss: float
    lr: float
    grad_norm: float
    rollouts: int | None = Field(default=None, exclude_if=_is_none)
    tokens_per_second: float | None = Field(default=None, exclude_if=_is_none)
    nodes_per_second: float | None = Field(default=None, exclude_if=_is_none)


class HeldOutLine(ReportPart):
    """Measures on held-out rollouts after a step."""

    step: int
    epoch: int
    held_out: Measures


MetricsLine = StepLine | HeldOutLine
