"""A critic's backbone and its cache: forward passes over packed tokens, and plain ones to compare with.

Shapes: R rows, N packed tokens of all rows, S tokens of one row, K candidates, D hidden width.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qsharp_core.critic.model import Critic
from qsharp_core.critic.scoring.attention import PAGED, AttentionPass, PagedPass, PlainPass, ProbePass
from qsharp_core.critic.scoring.cache import BlockManager, CachedSequence
from qsharp_core.critic.scoring.cpu import pack_linears
from qsharp_core.critic.scoring.kv_pool import KVPool
from qsharp_core.critic.scoring.layout import Layout, LayoutBuilder
from qsharp_core.errors import CriticError

# Tokens that a prefill pass runs at once: enough to fill the matrix units, few enough to bound its workspace.
PREFILL_TOKENS = 1024


@dataclass
class PendingRow:
    """A row of the running call, and what of it the cache lacks.

    Attributes:
        index: place of the row in the call.
        sequence: has blocks for the whole history.
        history: tokens of the request; all that the cache lacks must be among them.
        start: the tokens from here to the end of `history` are missing.
    """

    index: int
    sequence: CachedSequence
    history: list[int]
    start: int


class CachedBackbone:
    """A critic whose backbone reads and writes a paged cache of keys and values.

    Args:
        critic: in evaluation mode, on its device. Its backbone's attention is switched to the paged one; on CPUs its
            linear layers get packed copies of their weights.
        cache_tokens: token positions in the cache, rounded up to blocks. The longest history must fit.
        block_size: token positions per block.
        scratch_tokens: token positions, rounded up to blocks, behind those of sequences: for what no sequence holds.

    Attributes:
        blocks: the bookkeeping of the sequences' blocks.
        scratch_blocks: number of blocks behind these.
        pool: the keys and values of all blocks.
        layouts: makes the layouts of passes.

    Raises:
        CriticError: the attention of the backbone cannot be switched.
    """

    def __init__(self, critic: Critic, cache_tokens: int, block_size: int = 16, scratch_tokens: int = 1024) -> None:
        self.critic = critic
        parameter = next(critic.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.blocks = BlockManager(-(-cache_tokens // block_size), block_size)
        self.scratch_blocks = -(-scratch_tokens // block_size)
        self._switched = threading.Lock()  # held by passes that switch the attention, and by passes in other threads
        critic.backbone.set_attn_implementation(PAGED)
        pack_linears(critic.backbone)
        probe = self._probe()
        layers = [probe.shapes[layer] for layer in sorted(probe.shapes)]
        self.pool = KVPool.zeros((self.blocks.total + self.scratch_blocks) * block_size, layers, parameter)
        self.layouts = LayoutBuilder(block_size, self.device, self.device.type == "cpu" and not probe.windowed)

    @cached_property
    def capacity(self) -> int:
        """The longest history, in tokens, whose candidates can be scored."""
        limit = self.critic.max_length
        room = self.blocks.total * self.blocks.block_size
        # A V head runs the candidate at the position after the history.
        return room if limit is None else min(room, limit - (self.critic.head.shape.kind == "V"))

    # -- passes in the cache

    def forward(self, tokens_N: Tensor, layout: Layout) -> Tensor:
        """Last hidden states `[N, D]` of packed tokens; their keys and values are written to the pool."""
        return self._run(tokens_N, layout.position_N, PagedPass(self.pool, self.blocks.block_size, layout))

    def prefill(self, rows: list[PendingRow]) -> list[Tensor | None]:
        """Runs what the cache lacks of the rows, in passes of at most `PREFILL_TOKENS`, and sets their `start`.

        Returns:
            For each row the last hidden state `[D]` of its history; None where nothing was missing.
        """
        last: dict[int, Tensor] = {}
        for pieces in _passes(rows):
            for piece, last_D in zip(pieces, self._prefill_pass(pieces), strict=True):
                last[id(piece.row)] = last_D
        for row in rows:
            row.start = len(row.history)
        return [last.get(id(row)) for row in rows]

    def _prefill_pass(self, pieces: list["_Piece"]) -> Tensor:
        """Runs these pieces; returns the last hidden state of each, `[pieces, D]`."""
        tokens = [t for piece in pieces for t in piece.row.history[piece.start : piece.stop]]
        first = np.array([piece.start for piece in pieces])
        counts = np.array([piece.stop for piece in pieces]) - first
        position = first[:, None] + np.arange(counts.max())
        lengths = first + counts
        table = self.layouts.table([piece.row.sequence for piece in pieces], int(lengths.max()))
        slots = self.layouts.slots(table, position)[np.arange(position.shape[1]) < counts[:, None]]
        layout = self.layouts.build(counts, position, slots, table, lengths)
        hidden = self.forward(torch.tensor(tokens, device=self.device), layout)
        return hidden if len(hidden) == len(pieces) else hidden[torch.tensor(np.cumsum(counts) - 1, device=self.device)]

    def wipe(self, blocks: set[int]) -> None:
        """Sets the keys and values of these blocks, and of all scratch blocks, to zero."""
        size = self.blocks.block_size
        scratch = range(self.blocks.total, self.blocks.total + self.scratch_blocks)
        first_B = torch.tensor([*blocks, *scratch], device=self.device) * size
        self.pool.wipe((first_B[:, None] + torch.arange(size, device=self.device)).flatten())

    # -- passes without the cache

    def outputs_plain(self, tokens: list[int]) -> Tensor:
        """Outputs `[S, n_out]` of every token given those before it, by a plain forward pass."""
        with self._plain_attention():
            return self.critic(torch.tensor([tokens], device=self.device))[0]

    def hidden_plain(self, tokens: list[int]) -> Tensor:
        """Last hidden states `[S, D]` by a plain forward pass."""
        with self._plain_attention():
            ids = torch.tensor([tokens], device=self.device)
            return self.critic.backbone(input_ids=ids, use_cache=False).last_hidden_state[0]

    def outputs_uncached(self, history: list[int], candidates: list[int]) -> Tensor:
        """Outputs `[K, n_out]` of one row's candidates, by one pass that shares nothing with the cache.

        May be called in any thread, beside passes in the cache.
        """
        tokens = torch.tensor(history + candidates, device=self.device).clamp_(max=self.critic.vocab - 1)
        length, head = len(history), self.critic.head
        with self._switched:
            if head.shape.kind == "Q":
                position = torch.arange(length, device=self.device)
                last_1D = self._run(tokens[:length], position, PlainPass(length))[-1:]
                return head.of_tokens(last_1D, tokens[None, length:])[0]
            position = torch.arange(len(tokens), device=self.device).clamp_(max=length)
            return head.at_tokens(self._run(tokens, position, PlainPass(length))[length:])

    @contextmanager
    def _plain_attention(self) -> Iterator[None]:
        with self._switched:
            self.critic.backbone.set_attn_implementation("sdpa")
            try:
                yield
            finally:
                self.critic.backbone.set_attn_implementation(PAGED)

    # -- both

    def _run(self, tokens_N: Tensor, position_N: Tensor, critic_pass: AttentionPass) -> Tensor:
        return self.critic.backbone(
            input_ids=tokens_N[None], position_ids=position_N[None], use_cache=False, critic_pass=critic_pass
        ).last_hidden_state[0]

    @torch.inference_mode()
    def _probe(self) -> ProbePass:
        probe = ProbePass()
        zero = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._run(zero, zero, probe)
        if not probe.shapes or sorted(probe.shapes) != list(range(len(probe.shapes))):
            raise CriticError(
                f"{type(self.critic.backbone).__name__} cannot serve as a critic's backbone: "
                "its attention does not go through transformers' AttentionInterface"
            )
        return probe


class _Piece(NamedTuple):
    """Tokens `start` to `stop` of a row's history."""

    row: PendingRow
    start: int
    stop: int


def _passes(rows: list[PendingRow]) -> Iterator[list[_Piece]]:
    """What is missing of the rows, cut into passes of at most `PREFILL_TOKENS`."""
    pieces: list[_Piece] = []
    room, longest = PREFILL_TOKENS, 0
    for row in rows:
        start, length = row.start, len(row.history)
        while start < length:
            stop = min(length, start + room)
            longest = max(longest, stop - start)
            # Attention pads rows to the longest piece: bound the padded size, too.
            if pieces and longest * (len(pieces) + 1) > 2 * PREFILL_TOKENS:
                yield pieces
                pieces, room, longest = [], PREFILL_TOKENS, 0
                continue
            pieces.append(_Piece(row, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield pieces
                pieces, room, longest = [], PREFILL_TOKENS, 0
    if pieces:
        yield pieces
