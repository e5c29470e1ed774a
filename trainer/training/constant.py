"""Whether a critic has learned anything: its held-out loss beside that of the best constant prediction."""

from dataclasses import dataclass

from trainer.training.report import HeldOutReport

RANKS = 0.6
"""An AUC that is not chance."""


@dataclass(frozen=True)
class AgainstConstant:
    """A critic's held-out loss, and that of the constant that fits these very rollouts best."""

    measure: str
    loss: float
    constant: float

    @property
    def better(self) -> bool:
        """Whether the critic's loss is less."""
        return self.loss < self.constant

    def __str__(self) -> str:
        return f"held-out {self.measure} {self.loss:.5f}, {self.constant:.5f}"


def against_constant(held_out: HeldOutReport) -> AgainstConstant:
    """Compares by log-loss; by squared error where a report has no log-loss of the constant."""
    overall = held_out.overall
    if overall.log_loss_constant is not None:
        return AgainstConstant("log loss", overall.log_loss, overall.log_loss_constant)
    return AgainstConstant("brier", overall.brier, overall.brier_constant)


def learned_nothing(held_out: HeldOutReport, steps: int) -> str:
    """What is said of a critic that is no better than a constant."""
    losses = f"{against_constant(held_out)} for a constant, after {steps} steps"
    area = held_out.overall.auc
    if area is not None and area >= RANKS:
        return (
            f"the critic's probabilities are no better than a constant: {losses}. But it may rank answers (AUC "
            f"{area:.2f} on {held_out.prompts} prompts), and ranks are what guides. Not published; --publish-anyway "
            "does that, and `qsharp evaluate` then shows whether it guides. What may help: more prompts, more "
            "rollouts, a reward in steps where good answers are rare"
        )
    return (
        f"the critic has learned nothing: {losses}. Not published; --publish-anyway does that. What may help: more "
        "rollouts of each prompt, branches (qsharp collect --branch), prompts that earn neither always the same nor "
        "nothing, a reward in steps where good answers are rare"
    )
