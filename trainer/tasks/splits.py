"""Problems that are made of word lists: so many are drawn, once and for all, and parted into two splits."""

import random
from collections.abc import Sequence
from typing import TypeVar

SPLITS = ("train", "held_out")
TRAIN_PROBLEMS = 400
HELD_OUT_PROBLEMS = 140

T = TypeVar("T")


def drawn(
    every: Sequence[T], seed: str, train: int = TRAIN_PROBLEMS, held_out: int = HELD_OUT_PROBLEMS
) -> dict[str, list[T]]:
    """Draws both splits without replacement, so that nothing is in both.

    Args:
        every: at least `train + held_out` things, no two of them alike.
        seed: the same seed draws the same.
        train, held_out: how many are drawn for each split.
    """
    some = random.Random(seed).sample(every, train + held_out)
    return {"train": some[held_out:], "held_out": some[:held_out]}
