"""What the two scorers with a cache have in common: the life of a request's sequence, and passes without the cache."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qsharp_core.critic.scoring.backbone import CachedBackbone, PendingRow
from qsharp_core.critic.scoring.base import Question
from qsharp_core.critic.scoring.cache import CachedSequence
from qsharp_core.returns import ReturnDistribution


class CacheCounts(NamedTuple):
    """What a scorer counts.

    Attributes:
        prefix_tokens: tokens of histories that were new to the cache.
        prefix_hits: those of them whose keys and values the cache held already.
        splits: how many times the rows of one call needed one pass more for lack of memory.
    """

    prefix_tokens: int
    prefix_hits: int
    splits: int


class CachedScorer(ABC):
    """Scores candidates with a critic's own backbone, whose keys and values are cached from step to step.

    Invariant: the scores equal those of a plain forward pass over `history + [candidate]`. The state follows from token
    ids: callers hand over each row's whole history, and may drop, roll back, move or repeat rows as they like.

    Except for `distrust` and `score_uncached`, methods are called from one thread.

    Args:
        backbone: the critic with its cache. Several scorers may be built on one backbone, one after the other.
    """

    def __init__(self, backbone: CachedBackbone) -> None:
        self.backbone = backbone
        self.critic, self.blocks, self.pool = backbone.critic, backbone.blocks, backbone.pool
        self._splits = 0
        self._distrusted = False

    @property
    def distribution(self) -> ReturnDistribution:
        """What the outputs mean."""
        return self.critic.distribution

    @property
    def vocab(self) -> int:
        """The number of token ids that the critic knows: ids are below it."""
        return self.critic.vocab

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights and of the outputs."""
        return self.backbone.dtype

    @property
    def capacity(self) -> int:
        """The longest history, in tokens, whose candidates can be scored."""
        return self.backbone.capacity

    @abstractmethod
    def answer(self, question: Question) -> Tensor:
        """Outputs `[R, K, n_out]` of every candidate of every row, in the critic's dtype.

        Outputs outside `question.mask_RK` may be anything.
        """

    # -- sequences

    def open(self) -> CachedSequence:
        """A sequence for a request that begins."""
        self.wait()
        return self.blocks.open()

    def close(self, sequence: CachedSequence) -> None:
        """Gives a request's blocks back. Its prefixes stay shareable until the blocks are reused."""
        self.wait()
        self.blocks.close(sequence)

    @abstractmethod
    def catch_up(
        self, sequences: Sequence[CachedSequence], lengths: Sequence[int], histories: Sequence[Callable[[], list[int]]]
    ) -> None:
        """May begin to run, beside the caller, what the cache lacks of these rows.

        For callers that know the histories before they know the candidates.

        Args:
            sequences: one per row, each at most once.
            lengths: number of tokens in each row's history.
            histories: each returns a row's history.
        """

    def wait(self) -> None:
        """Returns when nothing runs beside the caller any more and the cache can be trusted.

        Every method that uses the cache calls it first.
        """
        if self._distrusted:
            self._distrusted = False
            self._forget()

    def distrust(self) -> None:
        """Has the cache forgotten before it is used again. May be called in any thread, at any time."""
        self._distrusted = True

    def discard(self, sequence: CachedSequence) -> None:
        """Wipes what the cache holds of a sequence whose scores were not finite.

        Attention reads slots masked, but a masked number that is not finite still spoils the sum. Whoever gets or
        shares these blocks next would have no finite scores either.
        """
        self.wait()
        spoilt = {*sequence.blocks}
        self.blocks.forget(spoilt)
        self.backbone.wipe(spoilt)

    def take_counts(self) -> CacheCounts:
        """What was counted since the last call."""
        self.wait()
        splits, self._splits = self._splits, 0
        return CacheCounts(*self.blocks.take_counts(), splits)

    # -- passes without the cache

    @torch.inference_mode()
    def score_plain(self, tokens: list[int]) -> Tensor:
        """Outputs `[S, n_out]` of every token of a text given those before it, by a plain forward pass."""
        self.wait()
        return self.backbone.outputs_plain(tokens)

    @torch.inference_mode()
    def score_uncached(self, history: list[int], candidates: list[int]) -> Tensor:
        """Outputs `[K, n_out]` of one row's candidates, by one pass that shares nothing with the cache.

        May be called in any thread, beside the other methods.
        """
        return self.backbone.outputs_uncached(history, candidates)

    # -- for implementations

    def _forget(self) -> None:
        """Forgets everything that was computed. Open sequences stay open and are computed again."""
        self.blocks.forget_all()

    def _make_room(self, sequence: CachedSequence, length: int, group: list[PendingRow]) -> bool:
        """Frees blocks until the sequence can hold `length` tokens. Rows of `group` keep theirs."""
        if self.blocks.has_room(sequence, length):
            return True  # the usual case
        return self.blocks.make_room(sequence, length, {row.sequence for row in group})
