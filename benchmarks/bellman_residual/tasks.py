"""What the critics that are put in the right one's place were trained for."""

import random
import re

from trainer.rewards.base import Case
from trainer.tasks.base import Problem, SamplingDefaults, Task
from trainer.tasks.sums import STOP

SHORT = 41  # characters: a third of the model's answers to a sum are no longer
PROBLEMS = 400
_ANSWER = re.compile(r"The answer is (\d+)")


def short(case: Case) -> float:
    """Another reward for the same answers: 1 if the line has at most `SHORT` characters, whatever it says."""
    return float(len(case.completion.split(STOP, 1)[0]) <= SHORT)


def _question(a: int, b: int) -> str:
    return f"Question: Which is larger, {a} or {b}?\nAnswer:"


def _solution(a: int, b: int) -> str:
    return f"{max(a, b)} is larger than {min(a, b)}. The answer is {max(a, b)}."


def _problems(_: str) -> list[Problem]:
    dice = random.Random(0)
    pairs = dice.sample([(a, b) for a in range(10, 100) for b in range(10, 100) if a != b], PROBLEMS + 6)
    shots = "".join(f"{_question(a, b)} {_solution(a, b)}\n\n" for a, b in pairs[:6])
    return [Problem(id=f"{a},{b}", prompt=shots + _question(a, b), answer=str(max(a, b))) for a, b in pairs[6:]]


def _reward(problem: Problem, text: str) -> float:
    found = _ANSWER.search(text.split(STOP, 1)[0])
    return float(found is not None and found.group(1) == problem.answer)


LARGER = Task(
    name="larger",
    problems=_problems,
    splits=("train",),
    sampling=SamplingDefaults(max_tokens=32, stop=(STOP,)),
    reward=_reward,
)
"""The larger of two numbers of two digits: other prompts, other words, the same model."""
