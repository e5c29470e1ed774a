"""`math_verify` as a verifier, in a module of its own because the library is slow to import."""

from trainer.rewards.base import Case
from trainer.tasks.mathematics import equal


def math_verify(case: Case) -> float | None:
    """1 if the completion's mathematical answer equals the reference; None if the reference is no mathematics."""
    return None if case.answer is None else equal(str(case.answer), case.completion)
