"""What is to be collected, as items with stable keys.

Round 0 is unguided. Later rounds roll in and roll out (Algorithm 1 of the paper): a guided completion is stored, cut
after `c` of its tokens, and an unguided continuation of those tokens is stored as its roll-out. The guided policy drew
the token at the cut and the reference drew all that follow, so the roll-out's labels are valid from that token on
(docs/method.md, "Label validity").

`c` is uniform over 1 … length − 1. It is never the length itself: after the last token there is nothing to go on with,
because the completion has ended or has no tokens left to sample.

Branches (`branching`) are further rollouts of the reference. Each begins as one of round 0 does, up to a token that the
reference is unsure of, takes another one of its likeliest tokens there, and goes on from it. That token was forced and
the reference drew all that follow, so here, too, labels are valid from that token on.

An item's key is a hash of what the item is. The item's seed and cut derive from its key.
"""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from trainer.rollouts.parameters import GuidanceParameters, SamplingParameters
from trainer.tasks.base import Problem


@dataclass(frozen=True, kw_only=True)
class Collection:
    """What is to be collected.

    Attributes:
        samples: the number of rollouts of each problem.
        branches: the number of further rollouts of each problem that branch off those.
        guidance: how completions are guided; None leaves them unguided.
        roll_in: whether guided completions are cut and continued by the reference.
        round: a label, kept with every rollout.
        limit: only the first so many problems are sampled; None is all of them.
        seed: another seed makes other rollouts of the same problems.
    """

    task: str
    split: str
    model: str
    samples: int
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    guidance: GuidanceParameters | None = None
    roll_in: bool = False
    round: int = 0
    limit: int | None = None
    seed: int = 0
    branches: int = 0

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this collection from others; more samples, branches or problems make no other collection of it."""
        fields = asdict(self)
        del fields["samples"], fields["branches"], fields["limit"]
        return {"format": 1, "command": "collect", **fields}

    @property
    def run(self) -> str:
        """The collection's name in the rollouts' metadata."""
        return digest(self.identity)[:16]


@dataclass(frozen=True)
class Item:
    """A rollout to be made; `parents` are the keys of the rollouts that a branch may leave, and empty without one."""

    key: str
    problem: Problem
    sample: int
    parents: tuple[str, ...] = ()


def digest(value: Any) -> str:
    """SHA-256 of a value that JSON can hold, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def content_of(problem: Problem) -> str:
    """A hash of what a problem asks, as rollouts carry it in their metadata."""
    return digest(problem.request())[:32]


def seed_of(key: str) -> int:
    """A seed that vLLM takes, the same for the same key."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:12], 16)


def cut_of(key: str, length: int) -> int:
    """After how many of `length` tokens a guided completion is cut: uniform over 1 … length − 1."""
    return random.Random(seed_of(f"{key}/cut")).randint(1, length - 1)


def items_of(collection: Collection, problems: Sequence[Problem]) -> Iterator[Item]:
    """All items, one of every problem and then the next, so that a killed command leaves samples of every problem."""
    run = collection.run
    contents = [(problem, digest(problem.request())) for problem in problems[: collection.limit]]

    def key(problem: Problem, content: str, *which: int | str) -> str:
        return digest([run, problem.id, content, *which])[:32]

    for sample in range(collection.samples):
        for problem, content in contents:
            yield Item(key(problem, content, sample), problem, sample)
    for sample in range(collection.branches):
        for problem, content in contents:
            parents = tuple(key(problem, content, n) for n in range(collection.samples))
            yield Item(key(problem, content, "branch", sample), problem, sample, parents)
