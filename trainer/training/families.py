"""Rollouts cut into parts whose prefix trees have nothing to do with one another, so that each is built alone.

Labels are on tokens of completions. Two rollouts share a labelled prefix, or the prefix before one, only where the
prompt of one begins with the prompt of the other. Prompts that do are a family, and a family stays together.
"""

from collections.abc import Iterator
from functools import cmp_to_key

import numpy as np
from numpy.typing import NDArray

from trainer.training.prefix_tree import shared_prefix, sort_key
from trainer.training.rollouts import Rollouts

TOGETHER = 2**20
"""Tokens of a part. Only a family that has more makes a larger one."""


def parts(rollouts: Rollouts, together: int = TOGETHER) -> Iterator[NDArray[np.int64]]:
    """Cuts rollouts into parts of about `together` tokens; yields the indices of each, ascending.

    The nodes of all parts' trees, one part after the other, are in the order of the tree of all rollouts.
    """
    if rollouts.lengths.sum() <= together:
        yield np.arange(len(rollouts))
        return
    lengths = np.bincount(rollouts.prompts, rollouts.lengths)
    rows = np.argsort(rollouts.prompts, kind="stable")
    starts = np.searchsorted(rollouts.prompts[rows], np.arange(len(lengths) + 1))
    members: list[int] = []
    tokens = 0
    for family in _families(rollouts):
        size = lengths[family].sum()
        if members and tokens + size > together:
            yield _rows(rows, starts, members)
            members, tokens = [], 0
        members += family
        tokens += size
    yield _rows(rows, starts, members)


def _rows(rows: NDArray[np.int64], starts: NDArray[np.int64], prompts: list[int]) -> NDArray[np.int64]:
    return np.sort(np.concatenate([rows[starts[p] : starts[p + 1]] for p in prompts]))


def _families(rollouts: Rollouts) -> Iterator[list[int]]:
    """The numbers of the prompts of each family, families and prompts in the order of their tokens."""

    def compare(a: int, b: int) -> int:
        ours, theirs = sort_key(rollouts.prompt(a)), sort_key(rollouts.prompt(b))
        return (ours > theirs) - (ours < theirs)

    family: list[int] = []
    head = np.empty(0, np.int32)
    # Read anew for each comparison: the prompts of all rollouts need not fit into memory.
    for number in sorted(np.unique(rollouts.prompts).tolist(), key=cmp_to_key(compare)):
        prompt = rollouts.prompt(number)
        # What begins with a prompt comes right behind it.
        if family and shared_prefix(head, prompt) == len(head):
            family.append(number)
            continue
        if family:
            yield family
        family, head = [number], prompt
    yield family
