"""Verifiers that read nothing but text and are quick, so that they need no process of their own (`verifiers.QUICK`)."""

from qsharp_core.answers import last_number, number_of
from trainer.rewards.base import Case
from trainer.tasks.star_graph import solves


def exact(case: Case) -> float | None:
    """1 if the completion is the answer, or one of several accepted answers, apart from white space around it."""
    if case.answer is None:
        return None
    accepted = case.answer if isinstance(case.answer, list) else [case.answer]
    return float(case.completion.strip() in {str(answer).strip() for answer in accepted})


def numeric(case: Case) -> float | None:
    r"""1 if the completion's last number, or the one in its last `\boxed{…}`, equals the answer's last number."""
    wanted = None if case.answer is None else last_number(str(case.answer))
    if wanted is None:
        return None
    return float(number_of(case.completion) == wanted)


def star_graph(case: Case) -> float | None:
    """1 if the completion is a path in the star graph that ends the question; None if the question ends with none."""
    return solves(case.question or "", case.completion)
