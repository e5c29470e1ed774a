"""GSM8K (Cobbe et al., 2021): grade-school word problems whose answer is a number."""

from collections.abc import Sequence

from qsharp_core.answers import vote_number
from trainer.tasks.base import Problem, SamplingDefaults, Task, TaskError
from trainer.tasks.benchmarks import Source, asked, correct

SOURCES = {
    split: Source(f"gsm8k_{split}.jsonl", "openai/gsm8k", split, configs=("main",)) for split in ("train", "test")
}


def problems(split: str) -> Sequence[Problem]:
    """The problems of a split, in the order of the data set.

    Raises:
        TaskError
    """
    return [asked(i, question, final(answer)) for i, (question, answer) in enumerate(SOURCES[split].rows())]


def final(solution: str) -> str:
    """The final answer of a worked solution: the number after `####`, without thousands' commas.

    Raises:
        TaskError: there is none.
    """
    _, mark, number = solution.rpartition("####")
    if not mark or not number.strip():
        raise TaskError(f"a solution of GSM8K ends with #### and a number; got {solution[-60:]!r}")
    return number.strip().replace(",", "")


TASK = Task(
    name="gsm8k",
    splits=tuple(SOURCES),
    problems=problems,
    sampling=SamplingDefaults(max_tokens=1024),
    reward=correct,
    vote=vote_number,
)
