"""What a guided step asks of a critic, and what every kind of critic promises.

Two kinds implement it: `critic.engine.CriticEngine`, which runs a backbone of its own over the rows' histories, and
`critic.native.NativeCritic`, which reads the reference's hidden states and needs nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from qsharp_core.critic.cache import Sequence
from qsharp_core.returns import ReturnDistribution


@dataclass(frozen=True)
class Question:
    """One step's candidates, and all that is known of the rows they belong to: R rows, K candidates, D hidden width.

    Attributes:
        ids_RK: candidates, int64.
        log_ref_RK: their `ln ref(y|x)`, float64, after masks and biases and at the request's temperature.
        mask_RK: which of them are asked for. What is answered for others is not read.
        sequences: each row's handle in the critic's cache; empty for a critic without one.
        lengths: tokens in each row's history.
        read: a row's history, by its place; where tokens are on an accelerator this waits for it.
        last_R: the last token of each row, int64, on the device; None where histories are known on the host.
        hidden: the hidden states `[R, D]` that the reference's language-model head reads for these rows.
    """

    ids_RK: Tensor
    log_ref_RK: Tensor
    mask_RK: Tensor
    sequences: list[Sequence]
    lengths: list[int]
    read: Callable[[int], list[int]]
    last_R: Tensor | None
    hidden: Callable[[], Tensor]


class Scorer(Protocol):
    """A critic that is ready to score."""

    @property
    def distribution(self) -> ReturnDistribution:
        """What its outputs mean."""

    @property
    def vocab(self) -> int:
        """Token ids that it can score are below this."""

    def answer(self, question: Question) -> Tensor:
        """Outputs for every candidate of every row, `[R, K, n_out]`, floating-point."""
