"""Verifiers that read nothing but text and are quick, so that they need no process of their own (`verifiers.QUICK`)."""

from fractions import Fraction

from trainer.rewards.base import Case
from trainer.tasks.answers import last_boxed, last_number
from trainer.tasks.star_graph import solves

_LONGEST_NUMBER = 400  # characters: an exponent or a fraction beyond it is no answer, but would cost memory


def exact(case: Case) -> float | None:
    """1 if the completion is the answer, or one of several accepted answers, apart from white space around it."""
    if case.answer is None:
        return None
    accepted = case.answer if isinstance(case.answer, list) else [case.answer]
    return float(case.completion.strip() in {str(answer).strip() for answer in accepted})


def numeric(case: Case) -> float | None:
    r"""1 if the completion's last number, or the one in its last `\boxed{…}`, equals the answer's last number."""
    wanted = None if case.answer is None else _number(str(case.answer))
    if wanted is None:
        return None
    return float(_number(last_boxed(case.completion) or case.completion) == wanted)


def star_graph(case: Case) -> float | None:
    """1 if the completion is a path in the star graph that ends the question; None if the question ends with none."""
    return solves(case.question or "", case.completion)


def _number(text: str) -> Fraction | None:
    """The last number in a text as an exact fraction; None if there is none."""
    number = last_number(text)
    if number is None or len(number) > _LONGEST_NUMBER:
        return None
    above, _, below = number.partition("/")
    if len(above.lower().partition("e")[2]) > 3:
        return None
    try:
        return Fraction(above) / Fraction(below or 1)
    except (ValueError, ZeroDivisionError):
        return None
