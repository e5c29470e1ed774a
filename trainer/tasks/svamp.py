"""SVAMP (Patel et al., 2021): word problems of one or two steps, most of them variations of a hundred stories.

The two splits are this project's own, because the published ones tell the same stories. A story is in one split with
all of its variations: bodies belong to one story if they share half of their words, directly or through others.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from qsharp_core.answers import vote_number
from trainer.tasks.base import Problem, SamplingDefaults, Task, TaskError
from trainer.tasks.benchmarks import Source
from trainer.tasks.splits import SPLITS
from trainer.tasks.worked import Worked, asked_after, examples, right

SOURCE = Source(
    "svamp_test.jsonl",
    "ChilleD/SVAMP",
    "train+test",
    configs=("default",),
    fields=("ID", "Body", "Question", "Equation", "Answer"),
)
HELD_OUT = 0.3  # of all problems
EXAMPLES = 8  # two for each operation


def problems(split: str) -> Sequence[Problem]:
    """The problems of a split, in an order that is always the same. Solved ones of `train` are shown before each.

    Raises:
        TaskError
    """
    bodies: dict[str, str] = {}
    found: dict[str, Worked] = {}
    for name, body, question, equation, answer in SOURCE.rows():
        bodies[name] = body
        found[name] = _worked(name, f"{_ended(body)} {question.strip()}", equation, answer)
    parts = parted(bodies)
    shown = examples((found[name] for name in parts["train"]), EXAMPLES, alike=EXAMPLES // 4)
    return [asked_after(shown, found[name]) for name in parts[split] if found[name] not in shown]


def parted(bodies: dict[str, str]) -> dict[str, list[str]]:
    """The ids of both splits, by the bodies of the problems.

    No story is in both. Stories are gone through in the order of a digest; one is held out if it fits into the share
    that is held out.

    Args:
        bodies: by id; the order does not matter.
    """
    names = sorted(bodies)
    members = defaultdict(list)
    for name, story in zip(names, stories([bodies[name] for name in names]), strict=True):
        members[story].append(name)
    most = round(HELD_OUT * len(names))
    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for told in sorted(members.values(), key=lambda told: _digest(told[0])):
        parts["held_out" if len(parts["held_out"]) + len(told) <= most else "train"] += told
    # A part of a split, as `limit` takes it, is of many stories.
    return {split: sorted(part, key=_digest) for split, part in parts.items()}


def stories(bodies: Sequence[str]) -> list[int]:
    """For each body the number of its story, which is the place of the story's first body.

    Two bodies that share half of their words (of all that are in one or the other; numbers are no words) tell the same
    story, and so do those that a chain of such pairs joins.
    """
    words = [frozenset(re.findall(r"[a-z]+", body.lower())) for body in bodies]
    places = {word: place for place, word in enumerate(sorted(frozenset().union(*words)))}
    has = np.zeros((len(words), len(places)), dtype=np.float32)  # exact, and multiplied faster than integers
    for row, said in enumerate(words):
        has[row, [places[word] for word in said]] = 1
    shared, sizes = has @ has.T, has.sum(axis=1)
    near = 2 * shared >= sizes[:, None] + sizes - shared
    story = np.arange(len(words))
    while True:
        lowest = np.where(near, story, len(words)).min(axis=1)
        if (lowest == story).all():
            return [int(number) for number in story]
        story = lowest


def _worked(name: str, question: str, equation: str, answer: str) -> Worked:
    number = vote_number(answer)
    if number is None:
        raise TaskError(f"the answer of SVAMP's {name} must be a number; got {answer!r}")
    # The numbers of equations end in .0, unless they are fractions. A nested equation is no example.
    parts = [vote_number(part) or part for part in equation.strip("() ").split()]
    return Worked(name, question, (f"{' '.join(parts)} = {number}",), number)


def _ended(body: str) -> str:
    """A body that a question can follow: without a full stop it is half a sentence."""
    body = body.strip()
    return body if body.endswith((".", ",", "?", "!")) else f"{body},"


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


TASK = Task(
    name="svamp",
    splits=SPLITS,
    problems=problems,
    sampling=SamplingDefaults(max_tokens=40, stop=("\n",)),
    reward=right,
    vote=vote_number,
)
