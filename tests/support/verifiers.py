"""Verifiers, right ones and wrong ones, in a module that imports little: processes that run them import it."""

from trainer.rewards.base import Case


def mentions(case: Case) -> float:
    """Needs the problem."""
    assert case.problem is not None
    return float(case.problem.data["letter"] in case.completion)


def of_two(prompt: str, completion: str) -> float:
    return 1.0


def broken(case: Case) -> float:
    raise ValueError("no such column")


def as_trl(prompts: list[str], completions: list[str], letter: list[str], **columns: object) -> list[float]:
    assert len(prompts) == len(completions) == len(letter) == 1
    assert columns == {"answer": [7]}
    return [float(letter[0] in completions[0])]
