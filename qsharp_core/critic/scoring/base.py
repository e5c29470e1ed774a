"""What a guided step asks of a critic, and what every critic that can be asked promises."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from qsharp_core.critic.scoring.cache import CachedSequence
from qsharp_core.returns import ReturnDistribution


@dataclass(frozen=True)
class Question:
    """The candidates of one step, and what is known of the rows they belong to.

    Shapes: R rows, K candidates, D width of the reference's hidden states.

    Attributes:
        ids_RK: candidates, int64.
        log_ref_RK: `ln ref(y|x)` of the candidates, float64, after masks and biases and at the request's temperature.
        mask_RK: which candidates are asked for, bool. Outputs of the others are not read.
        sequences: each row's sequence in the critic's cache; empty for a critic without a cache.
        lengths: number of tokens in each row's history.
        read: returns the history of the row at an index. Where tokens are on an accelerator, it waits for the device.
        last_R: the last token of each row, int64, on the device; None where the host knows all histories.
        hidden: returns the hidden states `[R, D]` that the reference's language-model head reads for these rows.
    """

    ids_RK: Tensor
    log_ref_RK: Tensor
    mask_RK: Tensor
    sequences: list[CachedSequence]
    lengths: list[int]
    read: Callable[[int], list[int]]
    last_R: Tensor | None
    hidden: Callable[[], Tensor]


class CandidateScorer(Protocol):
    """A critic that is ready to score candidates."""

    @property
    def distribution(self) -> ReturnDistribution:
        """What the outputs mean."""

    @property
    def vocab(self) -> int:
        """The number of token ids that the critic knows: ids are below it."""

    def answer(self, question: Question) -> Tensor:
        """Outputs `[R, K, n_out]` of every candidate of every row, floating-point.

        Outputs outside `question.mask_RK` may be anything.
        """
