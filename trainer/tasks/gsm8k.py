"""GSM8K (Cobbe et al., 2021): grade-school word problems whose answer is a number.

`gsm8k-short` is those of at most two calculations, asked after solved ones and answered in a line.
"""

import re
from collections.abc import Sequence

from qsharp_core.answers import vote_number
from trainer.tasks.base import Problem, SamplingDefaults, Task, TaskError
from trainer.tasks.benchmarks import Source, asked, correct
from trainer.tasks.worked import Worked, as_number, asked_after, examples, right

SOURCES = {
    split: Source(f"gsm8k_{split}.jsonl", "openai/gsm8k", split, configs=("main",)) for split in ("train", "test")
}
SHORT_CALCULATIONS = 2
EXAMPLES = 8
_CALCULATION = re.compile("<<(.*?)>>")  # as solutions have them: <<48/2=24>>
_SIGN = re.compile(r"\s*([-+*/=])\s*")


def problems(split: str) -> Sequence[Problem]:
    """The problems of a split, in the order of the data set.

    Raises:
        TaskError
    """
    return [asked(i, question, final(answer)) for i, (question, answer) in enumerate(SOURCES[split].rows())]


def short_problems(split: str) -> Sequence[Problem]:
    """A split's problems of one or two calculations, in the order of the data set. Solved ones of `train` are shown.

    Raises:
        TaskError
    """
    shown = examples(_short("train"), EXAMPLES, alike=1)
    return [asked_after(shown, worked) for worked in _short(split) if worked not in shown]


def calculations(solution: str) -> tuple[str, ...]:
    """The calculations of a worked solution, spaced as `48 / 2 = 24`."""
    return tuple(_SIGN.sub(r" \1 ", found).strip() for found in _CALCULATION.findall(solution))


def final(solution: str) -> str:
    """The final answer of a worked solution: the number after `####`, without thousands' commas.

    Raises:
        TaskError: there is none.
    """
    _, mark, number = solution.rpartition("####")
    if not mark or not number.strip():
        raise TaskError(f"a solution of GSM8K ends with #### and a number; got {solution[-60:]!r}")
    return number.strip().replace(",", "")


def _short(split: str) -> list[Worked]:
    every = [
        # Both splits count from 0, but the ids of a task are different ones.
        Worked(f"{split}-{i}", question, calculations(solution), as_number(final(solution), f"GSM8K's {split}-{i}"))
        for i, (question, solution) in enumerate(SOURCES[split].rows())
    ]
    return [worked for worked in every if 1 <= len(worked.calculations) <= SHORT_CALCULATIONS]


TASK = Task(
    name="gsm8k",
    splits=tuple(SOURCES),
    problems=problems,
    sampling=SamplingDefaults(max_tokens=1024),
    reward=correct,
    vote=vote_number,
)
SHORT = Task(
    name="gsm8k-short",
    splits=tuple(SOURCES),
    problems=short_problems,
    sampling=SamplingDefaults(max_tokens=60, stop=("\n",)),
    reward=right,
    vote=vote_number,
)
