"""What a loop writes: the result of each stage, which its journal keeps, and `report.json`."""

from typing import Literal

from pydantic import Field

from trainer.reports import Report, ReportPart
from trainer.training.report import TrainingReport


class BeginResult(ReportPart):
    """The version that guides in a round, `name@version`; None without one."""

    critic: str | None


class WaitResult(ReportPart):
    """What a watch waited for.

    Attributes:
        rows: rollouts with a reward, in the round's file.
        trainable: those of them that can be trained on.
        new: those of these that the round before did not have.
        last_reward: the place of the last reward in the store before the file was made, from which the next round
            counts; None of a server that does not tell.
    """

    rows: int
    trainable: int
    new: int
    last_reward: int | None = None


class CollectResult(ReportPart):
    """What was sampled, see `rollouts.collect.Collected`; `guided_by` is the version that guided the roll-ins."""

    run: str
    wanted: int
    made: int
    found: int
    before: int
    too_short: int
    no_way_out: int = 0
    tokens: int
    retries: int
    seconds: float
    guided_by: str | None


class JudgeResult(ReportPart):
    """How many rewards were given, their mean, and the completions that verifiers failed on or did not apply to.

    `of_others` are rollouts that had rewards of other sources alone, which the loop did not take for its own.
    """

    given: int
    mean: float | None
    failed: int
    not_applicable: int
    of_others: int = 0


class ExportResult(ReportPart):
    """The number of rollouts in the round's file."""

    rows: int


class FailedTraining(ReportPart):
    """Why a watch's training made no version."""

    failed: str


TrialOutcome = Literal["better", "worse", "undecided", "ended"]


class TrialResult(ReportPart):
    """What a trial on live traffic found.

    Attributes:
        outcome: of the new version; `undecided` is what the allowed number of rewards left open, and `ended` that an
            admin decided meanwhile.
        why: the same in words and numbers.
        share: of the requests that it had, to begin with.
        alpha: the probability of a wrong verdict, at most.
        n: requests with rewards, of the new version and of the active one.
        means: mean rewards of the two; None where there are none.
        difference, low, high: estimate of the gain in mean reward, and its bounds; None while there are none.
    """

    outcome: TrialOutcome
    why: str
    share: float
    alpha: float
    n: tuple[int, int]
    means: tuple[float | None, float | None]
    difference: float | None
    low: float | None
    high: float | None


class ActivateResult(ReportPart):
    """Whether the new version was activated, and why.

    Attributes:
        critic: the version that guides now; None without one.
        trial: what live traffic said; None without a trial.
    """

    activated: bool
    why: str
    critic: str | None
    trial: TrialResult | None = None


class SettingSummary(ReportPart):
    """A row of the evaluation after a round; see `evaluation.report.SettingReport`."""

    method: str
    eta: float | None
    problems: int
    n: int
    accuracy: float | None
    accuracy_se: float | None
    gain: float | None
    gain_se: float | None
    kl: float | None
    kl_se: float | None


class EvaluateResult(ReportPart):
    """What was measured after a round, and the version that guided."""

    critic: str | None
    results: list[SettingSummary]


class EndResult(ReportPart):
    """The end of a round has no result."""


class RoundReport(ReportPart):
    """A round, as far as it is; None is a stage that is not done. `seconds` are those of each stage that is."""

    round: int
    begin: BeginResult | None
    collect: CollectResult | None
    reward: JudgeResult | None
    export: ExportResult | None
    train: TrainingReport | None
    activate: ActivateResult | None
    evaluate: EvaluateResult | None
    seconds: dict[str, float]


class LoopReport(Report):
    """The report of a loop.

    Attributes:
        critic: the version that guides after the last round, `name@version`; None without one.
        seconds: of all stages.
        rounds: all that were begun.
    """

    format: Literal[1] = Field(default=1)
    critic: str | None
    seconds: float
    rounds: list[RoundReport]
