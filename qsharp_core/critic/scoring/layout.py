"""Where the packed tokens of a pass and their keys lie in the pool, and which keys each token sees.

Shapes: N packed tokens of all rows, R rows, M most tokens of a row, B most blocks of a row, L slots of these blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qsharp_core.critic.scoring.cache import CachedSequence


@dataclass
class Layout:
    """One pass over packed tokens.

    Attributes:
        valid_RM: which entries are tokens, bool; None where every row has M tokens.
        packed_RM: index of a row's `m`-th token among the packed ones; padding points at token 0. None where `valid_RM`
            is None.
        position_RM: each token's position in its sequence.
        write_N: pool slots for the tokens' own keys and values.
        shared_B: blocks with which all rows begin and whose positions every token sees; may be empty.
        table_RB: the blocks behind these, whose slots a row's tokens may see.
        start: position of the first slot of `table_RB`.
        key_length_R: number of positions of a row's sequence that its blocks hold, those in shared blocks included.
        candidates_from: index, among the slots of `table_RB`, of the first slot for candidates; of these slots a
            candidate sees its own alone. None where all tokens belong to the sequences.
        listed_R: number of a row's tokens, the first ones, that belong to the sequence; the others are candidates.
    """

    valid_RM: Tensor | None
    packed_RM: Tensor | None
    position_RM: Tensor
    write_N: Tensor
    shared_B: Tensor
    table_RB: Tensor
    start: int
    key_length_R: Tensor
    candidates_from: int | None = None
    listed_R: Tensor | None = None

    @property
    def position_N(self) -> Tensor:
        """Positions of the packed tokens."""
        position = self.position_RM if self.valid_RM is None else self.position_RM[self.valid_RM]
        return position.flatten()

    def bias_RML(self, slots: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """The attention bias: 0 where a token sees a slot, -inf elsewhere.

        A token sees its row's positions up to its own, within the window. A candidate also sees its own slot.

        Args:
            slots: number of slots of `table_RB`, L.
            window: how many positions back a token sees, itself included; None without a limit.
            dtype: of the bias.
        """
        if self.candidates_from is None or self.listed_R is None:
            return _bias(self._seen_RML(slice(None), slots, window), dtype)
        bias = self._bias_of_candidates(self.candidates_from, slots, window, dtype)
        mixed = self.listed_R.nonzero()[:, 0]
        if len(mixed):
            bias[mixed] = _bias(self._seen_RML(mixed, slots, window), dtype)
        return bias

    def _seen_RML(self, rows: Tensor | slice, slots: int, window: int | None) -> Tensor:
        """Which slots the tokens of these rows see: the definition."""
        slot_L = torch.arange(slots, device=self.table_RB.device)
        position_L = self.start + slot_L
        position_RM = self.position_RM[rows]
        seen = (position_L <= position_RM[..., None]) & (position_L < self.key_length_R[rows][:, None, None])
        if window is not None:
            seen &= position_L > position_RM[..., None] - window
        if self.candidates_from is not None and self.listed_R is not None:
            rank_RM = torch.arange(position_RM.shape[1], device=seen.device) - self.listed_R[rows][:, None]
            seen |= (rank_RM >= 0)[..., None] & (slot_L == self.candidates_from + rank_RM[..., None])
        if self.valid_RM is not None:
            seen[..., 0] |= ~self.valid_RM[rows]  # a padded query must see something: a row without a key is NaN
        return seen

    def _bias_of_candidates(self, first: int, slots: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """The bias of rows with candidates only, as most rows are: a row's candidates see the same prefix."""
        rows, most = self.position_RM.shape
        position_L = self.start + torch.arange(first, device=self.table_RB.device)
        hidden_RL = position_L >= self.key_length_R[:, None]
        if window is not None:
            hidden_RL |= position_L <= self.position_RM[:, :1] - window
        bias = torch.full((rows, most, slots), float("-inf"), dtype=dtype, device=hidden_RL.device)
        bias[..., :first] = _bias(~hidden_RL, dtype)[:, None]
        bias[..., first : first + most].diagonal(dim1=1, dim2=2).zero_()
        bias[:, slots - first :, 0] = 0  # a row of more tokens than candidate slots: the further ones are padding
        return bias


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


class LayoutBuilder:
    """Makes layouts, and the block tables that they are made from.

    Args:
        block_size: slots per block.
        device: of the layouts' tensors; tables are NumPy arrays on the host.
        share: whether blocks with which all rows begin may be listed once, in `Layout.shared_B`. Not where layers see
            a window only: its edge differs by row.
    """

    def __init__(self, block_size: int, device: torch.device, share: bool) -> None:
        self._block_size, self._device, self._share = block_size, device, share

    def table(self, sequences: Sequence[CachedSequence], positions: int) -> NDArray[np.int64]:
        """The block table `[R, B]` for so many positions, padded with each row's first block.

        Padded so, a row reads no blocks but its own.
        """
        table = np.empty((len(sequences), -(-positions // self._block_size)), dtype=np.int64)
        for row, sequence in zip(table, sequences, strict=True):
            blocks = sequence.blocks[: len(row)]
            row[: len(blocks)] = blocks
            row[len(blocks) :] = blocks[0]
        return table

    def slots(self, table: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.int64]:
        """The pool slots of each row's positions `[R, M]`. For positions past the table's end they mean nothing."""
        block = np.minimum(position // self._block_size, table.shape[1] - 1)
        return np.take_along_axis(table, block, axis=1) * self._block_size + position % self._block_size

    def build(
        self,
        counts: NDArray[np.int64],
        position: NDArray[np.int64],
        slots: NDArray[np.int64],
        table: NDArray[np.int64],
        key_lengths: NDArray[np.int64],
        candidates_from: int | None = None,
        listed: NDArray[np.int64] | None = None,
    ) -> Layout:
        """The layout of one pass.

        Args:
            counts: number of tokens of each row.
            position: positions of the tokens `[R, M]`; entries past a row's count are not read.
            slots: pool slots for the packed tokens' keys and values `[N]`.
            table: block table `[R, B]`, the blocks for candidates last.
            key_lengths: see `Layout.key_length_R`.
            candidates_from: index of the first slot for candidates among the slots of `table`.
            listed: see `Layout.listed_R`.
        """
        shared = self._shared_blocks(table, int(position[:, 0].min()))
        valid = np.arange(position.shape[1]) < counts[:, None]
        valid_RM = packed_RM = None
        if not valid.all():
            valid_RM = self._tensor(valid)
            packed = np.where(valid, (np.cumsum(counts) - counts)[:, None] + np.arange(position.shape[1]), 0)
            packed_RM, position = self._tensor(packed), np.where(valid, position, 0)
        start = shared * self._block_size
        return Layout(
            valid_RM=valid_RM,
            packed_RM=packed_RM,
            position_RM=self._tensor(position),
            write_N=self._tensor(slots),
            shared_B=self._tensor(table[0, :shared]),
            table_RB=self._tensor(table[:, shared:]),
            start=start,
            key_length_R=self._tensor(key_lengths),
            candidates_from=None if candidates_from is None else candidates_from - start,
            listed_R=None if listed is None else self._tensor(listed),
        )

    def _shared_blocks(self, table: NDArray[np.int64], first: int) -> int:
        """How many blocks all rows begin with, all of them before position `first`; 0 where sharing gains nothing."""
        if len(table) == 1 or not self._share:
            return 0
        same = (table == table[0]).all(0)
        shared = len(same) if same.all() else int(same.argmin())
        return min(shared, first // self._block_size)

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.tensor(array, device=self._device)
