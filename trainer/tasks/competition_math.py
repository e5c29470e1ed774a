"""MATH (Hendrycks et al., 2021): competition problems; the 500 of Lightman et al. (2023) are the test split."""

import re
from collections.abc import Sequence

from qsharp_core.answers import last_boxed
from trainer.tasks.base import Problem, SamplingDefaults, Task, TaskError
from trainer.tasks.benchmarks import Source, asked, correct

_BARE = re.compile(r"\\boxed\s+([^{}$]+)\$|\\boxed\s*(\d)")
SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
FIELDS = ("problem", "solution")
SOURCES = {
    "train": Source("math_train.jsonl", "EleutherAI/hendrycks_math", "train", SUBJECTS, hub_fields=FIELDS),
    "test": Source("math500.jsonl", "HuggingFaceH4/MATH-500", "test", ("default",), hub_fields=FIELDS),
}


def problems(split: str) -> Sequence[Problem]:
    """The problems of a split, in the order of the data set.

    Raises:
        TaskError
    """
    return [asked(i, question, final(answer)) for i, (question, answer) in enumerate(SOURCES[split].rows())]


def final(solution: str) -> str:
    r"""The final answer of a worked solution: what its last `\boxed` holds.

    Raises:
        TaskError: it has none.
    """
    # Some solutions have no braces: `$\boxed 7$`. An open brace that is not closed is a cut text, and no answer.
    answer = last_boxed(solution)
    if answer is None and (bare := _BARE.findall(solution)):
        answer = "".join(bare[-1]).strip()
    if not answer:
        raise TaskError(f"a solution of MATH has its answer in \\boxed{{}}; got {solution[-60:]!r}")
    return answer


def vote(text: str) -> str | None:
    r"""What a completion's last `\boxed{…}` holds, without white space; None if it has none."""
    boxed = last_boxed(text)
    return None if boxed is None else "".join(boxed.split())


TASK = Task(
    name="math",
    splits=tuple(SOURCES),
    problems=problems,
    sampling=SamplingDefaults(max_tokens=1024),
    reward=correct,
    vote=vote,
)
