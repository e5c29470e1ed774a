"""The keys and values of candidates, kept from one step to the next.

A pass runs the candidates of many rows and writes their keys and values to *scratch* blocks, behind the blocks of
sequences in the pool. In the next step one candidate of each row is its chosen token: its keys and values are then
moved to the row's sequence instead of being computed again.

Passes use the same scratch blocks over and over. Each block therefore knows which pass wrote it last, and a choice
knows which pass wrote its candidates: a choice whose blocks were written since is recognised, whoever wrote them.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from qsharp_core.critic.scoring.cache import CachedSequence
from qsharp_core.critic.scoring.kv_pool import KVPool


class Scratch:
    """Blocks for the candidates of one pass.

    Args:
        first: index of the first of these blocks in the pool.
        blocks: number of blocks.
        block_size: slots per block.
    """

    def __init__(self, first: int, blocks: int, block_size: int) -> None:
        self.first, self.blocks, self.block_size = first, blocks, block_size
        self._pass = 0
        self._written: NDArray[np.int64] = np.zeros(blocks, dtype=np.int64)  # which pass wrote each block last

    def blocks_for(self, candidates: int | NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of blocks that a row with this many candidates takes; element by element for several rows."""
        return np.maximum(1, -(-np.asarray(candidates) // self.block_size))

    def lay_out(self, candidates: NDArray[np.int64]) -> tuple[int, NDArray[np.int64]]:
        """Begins a pass and gives each row blocks for its candidates, one row after the other. They must fit.

        Args:
            candidates: number of candidates of each row.

        Returns:
            The number of the pass, and the block table `[rows, most blocks of a row]`. A row that needs fewer blocks
            repeats its last one, so that no row reads what another row writes.
        """
        taken = self.blocks_for(candidates)
        end = np.cumsum(taken)
        assert end[-1] <= self.blocks, (end[-1], self.blocks)
        table = (end - taken)[:, None] + np.minimum(np.arange(taken.max()), taken[:, None] - 1)
        self._pass += 1
        self._written[: end[-1]] = self._pass
        return self._pass, self.first + table

    def written_by(self, number: int, slot: int, candidates: int) -> bool:
        """Whether the blocks of a row's candidates, the first of them at `slot`, were last written by this pass."""
        block = slot // self.block_size - self.first
        return bool((self._written[block : block + int(self.blocks_for(candidates))] == number).all())


@dataclass(frozen=True)
class _Choice:
    """The candidates of a sequence's last pass: the keys and values of `ids[i]` are at `slot + i`.

    Attributes:
        length: number of tokens of the sequence at that pass; the candidates are at the position behind them.
        cuts: `CachedSequence.cuts` at that pass: after a cut, the same length may mean other tokens.
        written: number of that pass.
    """

    length: int
    cuts: int
    ids: list[int]
    slot: int
    written: int


class Choices:
    """The last candidates of each sequence, and the moves of those that were chosen.

    Args:
        scratch: the blocks that the candidates are written to.
        pool: holds the scratch blocks and those of the sequences.
    """

    def __init__(self, scratch: Scratch, pool: KVPool) -> None:
        self._scratch, self._pool = scratch, pool
        self._by_sequence: dict[CachedSequence, _Choice] = {}
        self._moves: list[tuple[int, int]] = []

    def remember(self, sequence: CachedSequence, ids: list[int], slot: int, written: int) -> None:
        """Notes where the candidates of a sequence are written: those of pass `written`, from `slot` on."""
        self._by_sequence[sequence] = _Choice(len(sequence.tokens), sequence.cuts, ids, slot, written)

    def slot_of_last(self, sequence: CachedSequence, history: list[int]) -> int | None:
        """The slot with the keys and values of the last token of `history`.

        None unless the sequence lacks this token alone, it was a candidate, and its slot has not been written since.
        """
        choice = self._by_sequence.get(sequence)
        if choice is None or choice.cuts != sequence.cuts:
            return None
        if not choice.length == len(sequence.tokens) == len(history) - 1 or history[-1] not in choice.ids:
            return None
        if not self._scratch.written_by(choice.written, choice.slot, len(choice.ids)):
            return None
        return choice.slot + choice.ids.index(history[-1])

    def plan_move(self, source: int, target: int) -> None:
        """Has the keys and values of slot `source` copied to slot `target` by the next `move`."""
        self._moves.append((source, target))

    def move(self) -> None:
        """Copies the keys and values of all planned moves at once. Call before the next pass writes to scratch."""
        if not self._moves:
            return
        device = self._pool.keys[0].device
        self._pool.move(*torch.tensor(self._moves, device=device).unbind(1))
        self._moves.clear()

    def forget(self, sequence: CachedSequence) -> None:
        """Drops the candidates of one sequence."""
        self._by_sequence.pop(sequence, None)

    def clear(self) -> None:
        """Drops the candidates of all sequences, and the planned moves."""
        self._by_sequence.clear()
        self._moves.clear()
