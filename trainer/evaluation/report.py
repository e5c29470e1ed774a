"""An evaluation's `report.json`. Figures are means over problems, and `…_se` are their standard errors."""

from dataclasses import fields
from typing import Any, Literal

from trainer.evaluation.settings import REFERENCE, Setting, budget_text
from trainer.reports import Report, ReportPart


class MeanReward(ReportPart):
    """A mean reward and its standard error; None where there is none."""

    mean: float | None
    mean_se: float | None


class Figures(ReportPart):
    """What the samples under one setting came to. A figure that could not be had is None, and so is its error.

    Attributes:
        problems: problems with a judged sample.
        n: judged samples.
        unjudged: samples that no verifier could judge; they count nowhere.
        accuracy: mean reward (pass@1).
        gain: accuracy less the reference's, paired by problem.
        full: share of the judged samples that earn 1, which of graded rewards is not their mean.
        kl: KL divergence to the reference in nats, per completion.
        tokens: tokens per completion; with a search, those of all its samples.
        majority: reward of the answer that most of a problem's samples give.
        weighted_majority: reward of the answer with the most weight, where the critic's scores are the weights.
        oracle: the greatest reward among a problem's samples.
        best_of: reward of the sample that the critic scores highest.
        by_k: `oracle` and `best_of` of k samples, by name and k.
    """

    problems: int
    n: int
    unjudged: int
    accuracy: float | None
    accuracy_se: float | None
    gain: float | None
    gain_se: float | None
    full: float | None = None
    full_se: float | None = None
    kl: float | None
    kl_se: float | None
    tokens: float | None
    tokens_se: float | None
    majority: float | None
    majority_se: float | None
    weighted_majority: float | None
    weighted_majority_se: float | None
    oracle: float | None
    oracle_se: float | None
    best_of: float | None
    best_of_se: float | None
    by_k: dict[Literal["oracle", "best_of"], dict[str, MeanReward]]

    def figure(self, name: str) -> tuple[float | None, float | None]:
        """A figure by its name, and its standard error."""
        return getattr(self, name), getattr(self, f"{name}_se")


class SettingReport(Figures):
    """A setting (`evaluation.settings.Setting`) and its figures."""

    method: str
    eta: float | None
    samples: int | None
    kl_total: float | None = None
    kl_token: float | None = None
    search: str | None = None

    @property
    def setting(self) -> Setting:
        """The setting alone."""
        return Setting(**{field.name: getattr(self, field.name) for field in fields(Setting)})

    @property
    def budget(self) -> str:
        """What limits its KL divergence, as people read it; empty where nothing does."""
        return budget_text(self.kl_total, self.kl_token)

    @property
    def guided(self) -> bool:
        """Whether a critic guided the samples."""
        return self.method != REFERENCE

    @property
    def point(self) -> tuple[float, float]:
        """KL and accuracy, of a setting that has both."""
        assert self.kl is not None
        assert self.accuracy is not None
        return self.kl, self.accuracy


class EvaluationReport(Report):
    """The report.

    Attributes:
        task, verifiers, split, model, samples, sampling, critic, guidance, scored, vote, seed: what was measured; see
            `evaluation.settings.Evaluation`. `verifiers` are weights by name.
        seconds: how long the last run of the command took.
        failures: messages of verifiers that failed in that run.
        graded: whether there are rewards other than 0 and 1, so that their mean is no share of right answers.
        results: the reference first, then the other settings.
    """

    format: Literal[1] = 1
    command: Literal["evaluate"] = "evaluate"
    task: str
    verifiers: dict[str, float]
    split: str
    model: str
    samples: int
    sampling: dict[str, Any]
    critic: str | None
    guidance: dict[str, float | int | str]
    scored: bool
    vote: str | None
    seed: int
    seconds: float
    failures: list[str]
    graded: bool = False
    results: list[SettingReport]

    @property
    def reference(self) -> SettingReport:
        """The figures of the reference."""
        return self.results[0]
