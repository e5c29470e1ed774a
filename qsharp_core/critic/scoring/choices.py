"""Where the keys and values of candidates lie from one step to the next.

A pass runs the candidates of many rows and writes their keys and values to blocks behind the pool's own. In the next
step one candidate of each row is its chosen token, whose keys and values are then moved instead of being computed
again. Passes use the same blocks over and over, so each block knows which pass wrote it last, and a choice knows which
pass wrote its candidates: a choice whose blocks were written since can be told, whoever wrote them.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Choice:
    """The candidates of a sequence's last pass: the keys and values of `ids[i]` are at `slot + i`.

    Attributes:
        length: of the sequence then; the candidates are at the position behind it.
        cuts: of the sequence then: one that was cut since may have the same length by other tokens.
        written: the pass that wrote the slots.
    """

    length: int
    cuts: int
    ids: list[int]
    slot: int
    written: int


class Scratch:
    """Blocks for the candidates of one pass.

    Args:
        first: the first of the blocks.
        blocks: how many.
        block_size: slots a block.
    """

    def __init__(self, first: int, blocks: int, block_size: int) -> None:
        self.first, self.blocks, self.block_size = first, blocks, block_size
        self._pass = 0
        self._written: NDArray[np.int64] = np.zeros(blocks, dtype=np.int64)  # which pass wrote each block last

    def wanted(self, candidates: int | NDArray[np.int64]) -> NDArray[np.int64]:
        """Blocks that a row with so many candidates takes, or each of several rows."""
        return np.maximum(1, -(-np.asarray(candidates) // self.block_size))

    def lay(self, candidates: NDArray[np.int64]) -> tuple[int, NDArray[np.int64]]:
        """Begins a pass and lays its rows' candidates one row behind the other; they must fit.

        Args:
            candidates: of each row.

        Returns:
            The pass, and the block table `[rows, most blocks of a row]`. Rows that need fewer repeat their last block,
            so that no row reads what another one writes.
        """
        taken = self.wanted(candidates)
        end = np.cumsum(taken)
        assert end[-1] <= self.blocks, (end[-1], self.blocks)
        table = (end - taken)[:, None] + np.minimum(np.arange(taken.max()), taken[:, None] - 1)
        self._pass += 1
        self._written[: end[-1]] = self._pass
        return self._pass, self.first + table

    def spoil_last(self) -> None:
        """The last block was written by something else than a pass."""
        self._pass += 1
        self._written[-1] = self._pass

    def holds(self, choice: Choice) -> bool:
        """Whether a choice's keys and values are still there."""
        block = choice.slot // self.block_size - self.first
        return bool((self._written[block : block + int(self.wanted(len(choice.ids)))] == choice.written).all())
