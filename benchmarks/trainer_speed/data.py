"""Rollouts of a known shape: tokens and rewards are random, because neither changes what a step costs."""

from pathlib import Path

import numpy as np

from trainer.training.data import read
from trainer.training.prefix_tree import TokenIds
from trainer.training.rollouts import LabelledRollout, Rollouts, SamplingPolicy, kept

PROMPT, COMPLETION = 45, 25
"""Tokens, on average; both vary by up to a half of it."""
WHOLE, BRANCHES = 2, 3
"""Rollouts of each prompt, as the recipe `demo` collects them."""


class Shapes:
    """Draws rollouts.

    Args:
        vocab: the number of token ids.
        seed: another seed makes other rollouts.
        prompt, completion: tokens, on average.
    """

    def __init__(self, vocab: int, seed: int, prompt: int = PROMPT, completion: int = COMPLETION) -> None:
        self._dice = np.random.default_rng(seed)
        self._vocab = vocab
        self._prompt, self._completion = prompt, completion

    def trees(self, count: int, whole: int = WHOLE, branches: int = BRANCHES) -> Rollouts:
        """About `count` rollouts that share prefixes, as `qsharp collect --branch` leaves them.

        Whole rollouts of a prompt share the prompt and nothing else, which is less than a model's samples do. A branch
        leaves a whole one at a random token; its reward labels its own tokens.
        """
        made = []
        for _ in range(max(round(count / (whole + branches)), 1)):
            prompt = self._tokens(self._prompt)
            parents = [self._tokens(self._completion) for _ in range(whole)]
            made += [(prompt, completion, 0) for completion in parents]
            for _ in range(branches):
                parent = parents[self._dice.integers(whole)]
                at = int(self._dice.integers(len(parent)))
                own = self._tokens(max(len(parent) - at, 1), vary=False)
                made.append((prompt, np.concatenate([parent[:at], own]), at))
        return self._labelled(made)

    def apart(self, count: int) -> Rollouts:
        """Rollouts that share nothing."""
        return self._labelled([(self._tokens(self._prompt), self._tokens(self._completion), 0) for _ in range(count)])

    def _tokens(self, mean: int, vary: bool = True) -> TokenIds:
        length = self._dice.integers(mean - mean // 2, mean + mean // 2 + 1) if vary else mean
        return self._dice.integers(0, self._vocab, max(length, 1)).astype(np.int32)

    def _labelled(self, made: list[tuple[TokenIds, TokenIds, int]]) -> Rollouts:
        return kept(
            LabelledRollout(
                str(i), prompt, completion, first_valid, float(self._dice.integers(2)), SamplingPolicy(), f"{i:064x}"
            )
            for i, (prompt, completion, first_valid) in enumerate(made)
        )


def of_files(paths: list[Path], count: int, seed: int) -> Rollouts:
    """About `count` rollouts of Parquet files: all those of prompts that are drawn at random."""
    rollouts = read(paths).rollouts
    order = np.random.default_rng(seed).permutation(rollouts.prompts.max() + 1)
    sizes = np.bincount(rollouts.prompts)[order]
    chosen = order[: int(np.searchsorted(np.cumsum(sizes), count)) + 1]
    return rollouts.select(np.isin(rollouts.prompts, chosen))
