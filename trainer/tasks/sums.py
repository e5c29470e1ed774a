"""Sums of three one-digit numbers: a task that a 135M model half solves, with an exact reward.

A problem is an ordered triple of digits 1..9 (729 of them). The order does not change the sum, so
the split is by *unordered* triple: no held-out problem has a permutation in training. The prompt
shows eight solved examples, all of them training triples, and the answer is one line.
"""

import hashlib
import re
from functools import cache
from itertools import combinations_with_replacement, permutations
from typing import Literal, cast

from trainer.tasks import base

Triple = tuple[int, int, int]
Split = Literal["train", "held_out"]

STOP = "\n"
"""An answer ends at the first newline."""

EXAMPLES: tuple[Triple, ...] = (
    (1, 5, 3),
    (7, 8, 6),
    (4, 2, 9),
    (9, 9, 3),
    (2, 6, 1),
    (5, 7, 8),
    (8, 3, 4),
    (6, 4, 7),
)
MIN_HELD_OUT_PROBLEMS = 140

_ANSWER = re.compile(r"The answer is (-?\d+(?:[.,]\d+)*)")


def problems(split: Split) -> list[Triple]:
    """The ordered triples of a split, sorted. The solved examples themselves are in neither split."""
    held_out = _held_out_triples()
    triples = [t for t in _unordered_triples() if (t in held_out) == (split == "held_out")]
    ordered = {p for triple in triples for p in _orders(triple)}
    return sorted(ordered - set(EXAMPLES))


def unordered(problem: Triple) -> Triple:
    """A triple's digits in ascending order, which the split goes by."""
    a, b, c = sorted(problem)
    return a, b, c


def prompt(problem: Triple) -> str:
    """The eight solved examples and then the triple's question; the model goes on after `Answer:`."""
    shots = "".join(f"{_question(p)} {_solution(p)}\n\n" for p in EXAMPLES)
    return shots + _question(problem)


def reward(problem: Triple, text: str) -> float:
    """1.0 if the number after the line's `The answer is` equals the sum, else 0.0."""
    return float(answer(text) == str(sum(problem)))


def answer(text: str) -> str | None:
    """The number that a completion gives as its answer; None if it gives none."""
    match = _ANSWER.search(text.split(STOP, 1)[0])
    return match.group(1) if match else None


def _question(problem: Triple) -> str:
    a, b, c = problem
    return f"Question: What is {a} + {b} + {c}?\nAnswer:"


def _solution(problem: Triple) -> str:
    a, b, c = problem
    return f"{a} + {b} = {a + b}. {a + b} + {c} = {a + b + c}. The answer is {a + b + c}."


@cache
def _unordered_triples() -> list[Triple]:
    return [(a, b, c) for a, b, c in combinations_with_replacement(range(1, 10), 3)]


def _orders(triple: Triple) -> set[Triple]:
    return {(a, b, c) for a, b, c in permutations(triple)}


@cache
def _held_out_triples() -> frozenset[Triple]:
    """The first triples in the order of a hash (the same on every Python), up to the wanted number of problems."""
    examples = {unordered(p) for p in EXAMPLES}
    held_out: set[Triple] = set()
    size = 0
    for triple in sorted(set(_unordered_triples()) - examples, key=_hash):
        if size >= MIN_HELD_OUT_PROBLEMS:
            break
        held_out.add(triple)
        size += len(_orders(triple))
    return frozenset(held_out)


def _hash(triple: Triple) -> str:
    return hashlib.sha256(repr(triple).encode()).hexdigest()


def _asked(split: str) -> list[base.Problem]:
    return [
        base.Problem(id="+".join(map(str, p)), prompt=prompt(p), answer=str(sum(p)), data={"digits": list(p)})
        for p in problems(cast(Split, split))
    ]


def _reward(problem: base.Problem, text: str) -> float:
    a, b, c = problem.data["digits"]
    return reward((a, b, c), text)


TASK = base.Task(
    name="sums",
    problems=_asked,
    splits=("train", "held_out"),
    sampling=base.SamplingDefaults(max_tokens=48, stop=(STOP,)),
    reward=_reward,
    vote=answer,
)
