"""Word problems that are asked after solved ones, in turns of a chat; a solution is calculations and a number.

26 - 6 = 20, 20 / 4 = 5. The answer is 5.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qsharp_core.answers import vote_number
from trainer.tasks.base import Problem, TaskError

LONGEST_EXAMPLE = 160  # characters of a question: solved ones stand before every other
_CALCULATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


@dataclass(frozen=True)
class Worked:
    """A question with its solution.

    Attributes:
        id: of the problem.
        question: what is asked.
        calculations: of the solution, as `26 - 6 = 20`.
        answer: the number that is asked for, as `vote_number` spells it.
    """

    id: str
    question: str
    calculations: tuple[str, ...]
    answer: str

    def operations(self) -> str | None:
        """The operations of the calculations, as `-/`; None if these are no example to show.

        An example is short, and its calculations are of two whole numbers each, the last one's result being the answer.
        Numbers of several digits are in the question, or results; others may be words in it, as `twice`.
        """
        if len(self.question) > LONGEST_EXAMPLE:
            return None
        known, operations, result = set(re.findall(r"\d+", self.question)), "", None
        for calculation in self.calculations:
            match = _CALCULATION.fullmatch(calculation)
            if match is None or any(len(number) > 1 and number not in known for number in (match[1], match[3])):
                return None
            operations, result = operations + match[2], match[4]
            known.add(result)
        return operations if result == self.answer else None

    def said(self) -> str:
        """The solution as it is shown."""
        return f"{', '.join(self.calculations)}. The answer is {self.answer}."


def as_number(answer: str, where: str) -> str:
    """A number as `vote_number` spells it.

    Args:
        answer: a number's text.
        where: whose answer it is, for the message.

    Raises:
        TaskError: it is no number.
    """
    spelled = vote_number(answer)
    if spelled is None:
        raise TaskError(f"the answer of {where} must be a number; got {answer!r}")
    return spelled


def examples(every: Iterable[Worked], most: int, alike: int) -> list[Worked]:
    """The first problems that can be shown as examples, of different operations.

    Args:
        every: problems in the order in which they are looked at.
        most: the number of examples, if there are so many.
        alike: how many of them may have the same operations.
    """
    shown: list[Worked] = []
    counts: Counter[str] = Counter()
    for worked in every:
        operations = worked.operations()
        if len(shown) < most and operations is not None and counts[operations] < alike:
            counts[operations] += 1
            shown.append(worked)
    return shown


def asked_after(shown: Sequence[Worked], worked: Worked) -> Problem:
    """A problem that is asked in a chat whose first turns are solved ones."""
    turns = [("user", worked.question)]
    for example in reversed(shown):
        turns = [("user", example.question), ("assistant", example.said()), *turns]
    return Problem(
        id=worked.id, messages=[{"role": role, "content": said} for role, said in turns], answer=worked.answer
    )


def right(problem: Problem, text: str) -> float:
    """1 if a completion's last number is the answer, else 0."""
    return float(vote_number(text) == problem.answer)
