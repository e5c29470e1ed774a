"""SVAMP (Patel et al., 2021): word problems of one or two steps, most of them variations of a hundred stories.

The two splits are this project's own, because the published ones tell the same stories. A story is in one split with
all of its variations: problems tell one story if they share half of their words, directly or through others.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qsharp_core.answers import vote_number
from trainer.tasks.base import Problem, SamplingDefaults, Task
from trainer.tasks.benchmarks import Source
from trainer.tasks.splits import SPLITS
from trainer.tasks.worked import Worked, as_number, asked_after, examples, right

SOURCE = Source(
    "svamp_test.jsonl",
    "ChilleD/SVAMP",
    "train+test",
    configs=("default",),
    fields=("ID", "Body", "Question", "Equation", "Answer"),
)
HELD_OUT = 0.3  # of all problems
EXAMPLES = 8  # two for each operation


class Text(NamedTuple):
    """What a problem tells, and what it asks."""

    body: str
    question: str


def problems(split: str) -> Sequence[Problem]:
    """The problems of a split, in an order that is always the same. Solved ones of `train` are shown before each.

    Raises:
        TaskError
    """
    texts: dict[str, Text] = {}
    found: dict[str, Worked] = {}
    for name, body, question, equation, answer in SOURCE.rows():
        texts[name] = Text(body, question)
        found[name] = _worked(name, f"{_ended(body)} {question.strip()}", equation, answer)
    parts = parted(texts)
    shown = examples((found[name] for name in parts["train"]), EXAMPLES, alike=EXAMPLES // 4)
    return [asked_after(shown, found[name]) for name in parts[split] if found[name] not in shown]


def parted(texts: Mapping[str, Text]) -> dict[str, list[str]]:
    """The ids of both splits, by the texts of the problems.

    No story is in both. Stories are gone through in the order of a digest; one is held out if it fits into the share
    that is held out.

    Args:
        texts: by id; the order does not matter.
    """
    names = sorted(texts)
    members = defaultdict(list)
    for name, story in zip(names, stories([texts[name] for name in names]), strict=True):
        members[story].append(name)
    most = round(HELD_OUT * len(names))
    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for told in sorted(members.values(), key=lambda told: _digest(told[0])):
        parts["held_out" if len(parts["held_out"]) + len(told) <= most else "train"] += told
    # A part of a split, as `limit` takes it, is of many stories.
    return {split: sorted(part, key=_digest) for split, part in parts.items()}


def stories(texts: Sequence[Text]) -> list[int]:
    """For each text the number of its story, which is the place of the story's first text.

    Two tell the same story if their bodies share half of their words (of all that are in one or the other; numbers are
    no words), or their bodies and questions together do. So do those that a chain of such pairs joins.
    """
    near = _near([text.body for text in texts]) | _near([f"{text.body} {text.question}" for text in texts])
    story = np.arange(len(texts))
    while True:
        lowest = np.where(near, story, len(texts)).min(axis=1)
        if (lowest == story).all():
            return [int(first) for first in story]
        story = lowest


def _near(texts: Sequence[str]) -> NDArray[np.bool_]:
    """Which of n texts share half of their words: `[n, n]`."""
    words = [frozenset(re.findall(r"[a-z]+", text.lower())) for text in texts]
    places = {word: place for place, word in enumerate(sorted(frozenset().union(*words)))}
    has = np.zeros((len(words), len(places)), dtype=np.float32)  # exact, and multiplied faster than integers
    for row, said in enumerate(words):
        has[row, [places[word] for word in said]] = 1
    shared, sizes = has @ has.T, has.sum(axis=1)
    near: NDArray[np.bool_] = 2 * shared >= sizes[:, None] + sizes - shared
    return near


def _worked(name: str, question: str, equation: str, answer: str) -> Worked:
    number = as_number(answer, f"SVAMP's {name}")
    # The numbers of equations end in .0, unless they are fractions. A nested equation is no example.
    parts = [vote_number(part) or part for part in equation.strip("() ").split()]
    return Worked(name, question, (f"{' '.join(parts)} = {number}",), number)


def _ended(body: str) -> str:
    """A body that a question can follow: without a full stop it is half a sentence."""
    body = body.strip()
    return body if body.endswith((".", ",", "?", "!")) else f"{body},"


def _digest(name: str) -> str:
    return hashlib.sha256(f"svamp/{name}".encode()).hexdigest()


TASK = Task(
    name="svamp",
    splits=SPLITS,
    problems=problems,
    sampling=SamplingDefaults(max_tokens=40, stop=("\n",)),
    reward=right,
    vote=vote_number,
)
