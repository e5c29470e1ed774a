"""Scores the next-token candidates of many rows at once, with a paged cache of keys and values.

Each step, for every row: what the cache lacks of the row's history is run (usually nothing: the chosen token was a
candidate of the step before, whose keys and values were kept), then all candidates of all rows are run together, each
attending to its row's prefix and to itself (V head); or the last token is run and all candidates are read off its
hidden state (Q head).

Invariant: the scores equal those of a plain forward pass over `history + [candidate]`. The state follows from token
ids: callers hand over each row's whole history, and may drop, roll back, move or repeat rows as they like.

Shapes: R rows, K most candidates of a row, N packed tokens.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qsharp_core.critic import cache
from qsharp_core.critic.attention import PAGED, Layout, PagedPass, Pass, PlainPass, Pool, ProbePass
from qsharp_core.critic.cache import BlockPool, Sequence
from qsharp_core.critic.cpu import pack_linears
from qsharp_core.critic.decode import Decoder, PrefixAttention, to_device
from qsharp_core.critic.model import Critic
from qsharp_core.critic.scorer import Question
from qsharp_core.critic.scratch import Choice, Scratch
from qsharp_core.errors import CriticError
from qsharp_core.returns import ReturnDistribution

# Tokens a prefill pass runs at once: enough to fill the matrix units, little enough to bound its workspace.
PREFILL_TOKENS = 1024
# Missing tokens of a row that are run together with its candidates; more have a pass of their own. A token that was no
# candidate, and tokens whose steps did not ask the critic, are few; a forward pass more costs its launches.
PATCH_TOKENS = 16


@dataclass
class _Row:
    """A row of the running call: its place in the call, and what must be run for it."""

    index: int
    sequence: Sequence
    history: list[int]
    start: int  # tokens from here to the end of the history are missing


class _Piece(NamedTuple):
    """Tokens `start` to `stop` of a row's history, which a prefill pass runs."""

    row: _Row
    start: int
    stop: int


class Counts(NamedTuple):
    """What an engine counts.

    Attributes:
        prefix_tokens: of histories that were new to the cache.
        prefix_hits: those of them whose keys and values were there already.
        splits: how often rows of one call had to be run in one pass more, for want of memory.
    """

    prefix_tokens: int
    prefix_hits: int
    splits: int


class _Last(NamedTuple):
    """The last hidden state `[D]` of a sequence, valid as long as it has that length and was not cut."""

    length: int
    cuts: int
    hidden: Tensor


class CriticEngine:
    """A critic, its cache, and the sequences it serves.

    Args:
        critic: in evaluation mode, on its device. Its backbone's attention is switched to the paged one; on CPUs its
            linear layers get packed copies of their weights.
        cache_tokens: token positions the pool holds (rounded up to blocks); the longest history must fit.
        block_size: positions per block.
        scratch_tokens: room for the candidates of one pass, in tokens; rows whose candidates do not fit together are
            run in several. Those of one row must fit.
        prefix: an attention kernel, with which `score_latest` runs steps in fixed shapes. Where the backbone cannot be
            run so, a warning says it and `decoder` is None.
        graphs: rows and candidates for which such steps are captured as CUDA graphs.
        aside: runs what `catch_up` begins, while its caller goes on; without one all is left to `score`.

    Raises:
        CriticError: the backbone's cached scores differ from a plain forward pass.
    """

    def __init__(
        self,
        critic: Critic,
        cache_tokens: int,
        block_size: int = 16,
        scratch_tokens: int = 1024,
        prefix: PrefixAttention | None = None,
        graphs: tuple[Collection[int], Collection[int]] = ((), ()),
        aside: Executor | None = None,
    ) -> None:
        self.critic = critic
        self._aside = aside
        self._running: Future[None] | None = None
        self.blocks = BlockPool(-(-cache_tokens // block_size), block_size)
        parameter = next(critic.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self._open: OrderedDict[int, Sequence] = OrderedDict()  # by id(), least recently used first
        self._choices: dict[int, Choice] = {}
        self._last: dict[int, _Last] = {}
        self._moves: list[tuple[int, int]] = []  # from one slot of the pool to another, before the next pass
        self._scratch = Scratch(self.blocks.blocks, -(-scratch_tokens // block_size), block_size)
        self._plain = threading.Lock()  # held where the attention is not the paged one, and by who relies on it
        self._distrusted = False
        self._splits = 0
        critic.backbone.set_attn_implementation(PAGED)
        pack_linears(critic.backbone)
        self.pool = self._allocate()
        self._check_against_plain_forward()
        self.decoder = self._make_decoder(prefix, graphs) if prefix else None
        self.take_counts()  # of requests, not of these checks

    @property
    def distribution(self) -> ReturnDistribution:
        """What the critic's outputs mean."""
        return self.critic.distribution

    @property
    def vocab(self) -> int:
        """Token ids that can be scored are below this."""
        return self.critic.vocab

    def answer(self, question: Question) -> Tensor:
        """Outputs `[R, K, n_out]`; by the `decoder` where there is one and the last tokens are on the device."""
        rows, asked = range(len(question.sequences)), question
        if asked.last_R is None or self.decoder is None:
            return self.score(asked.sequences, [asked.read(i) for i in rows], asked.ids_RK, asked.mask_RK)
        return self.score_latest(asked.sequences, asked.lengths, asked.last_R, asked.ids_RK, asked.read)

    @cached_property
    def capacity(self) -> int:
        """The longest history, in tokens, that can be scored."""
        limit = self.critic.max_length
        room = self.blocks.blocks * self.blocks.block_size
        # A V head runs the candidate at the position after the history.
        return room if limit is None else min(room, limit - (self.critic.head.shape.kind == "V"))

    def open(self) -> Sequence:
        """A handle for a request."""
        self.wait()
        sequence = Sequence()
        self._open[id(sequence)] = sequence
        return sequence

    def close(self, sequence: Sequence) -> None:
        """Gives a request's blocks back; its prefixes stay shareable until the blocks are reused."""
        self.wait()
        cache.truncate(self.blocks, sequence, 0)
        del self._open[id(sequence)]
        self._choices.pop(id(sequence), None)
        self._last.pop(id(sequence), None)

    def catch_up(self, sequences: list[Sequence], lengths: list[int], histories: list[Callable[[], list[int]]]) -> None:
        """Begins to run `aside` what the cache lacks of these rows; a later call of any method waits for it.

        For callers that know the histories before they know the candidates. A Q head's rows then want no pass any
        more; a V head's are run where they lack more than would join their candidates' pass.

        Args:
            sequences: as in `score`.
            lengths: of each row's history.
            histories: each row's, asked for where it is run.
        """
        self.wait()
        if self._aside is None:
            return
        always = self.critic.head.shape.kind == "Q"
        rows = [
            (sequence, history())
            for sequence, length, history in zip(sequences, lengths, histories, strict=True)
            if always or length - len(sequence.tokens) > PATCH_TOKENS
        ]
        if rows:
            self._running = self._aside.submit(self._catch_up, rows)

    def wait(self) -> None:
        """Returns when nothing runs `aside` any more, and the cache can be trusted."""
        running, self._running = self._running, None
        if running is not None:
            running.result()
        if self._distrusted:
            self._distrusted = False
            self._forget()

    def distrust(self) -> None:
        """Has the cache forgotten before it is used again. Any thread may say so, at any time."""
        self._distrusted = True

    def discard(self, sequence: Sequence) -> None:
        """Wipes what the cache holds of a sequence whose scores were not finite.

        Slots are read masked, and a masked number that is not finite still spoils the sum: whoever gets these blocks
        next, or shares them, would have no finite scores either.
        """
        self.wait()
        spoilt = {*sequence.blocks}
        for other in self._open.values():
            if not spoilt.isdisjoint(other.blocks):
                cache.truncate(self.blocks, other, 0)
        self.blocks.forget(spoilt)
        self._choices.clear()
        blocks = [*spoilt, *range(self._scratch.first, self._scratch.first + self._scratch.blocks)]
        size = self.blocks.block_size
        self.pool.wipe((self._tensor(np.array(blocks))[:, None] * size + self._tensor(np.arange(size))).flatten())

    def take_counts(self) -> Counts:
        """What was counted since the last time."""
        counts = Counts(self.blocks.wanted, self.blocks.found, self._splits)
        self.blocks.wanted = self.blocks.found = self._splits = 0
        return counts

    @torch.inference_mode()
    def score(self, sequences: list[Sequence], histories: list[list[int]], ids_RK: Tensor, mask_RK: Tensor) -> Tensor:
        """The head's outputs for every candidate of every row.

        Args:
            sequences: a handle of `open` per row, each at most once.
            histories: each row's tokens so far, one at least and `capacity` at most.
            ids_RK: candidates, int64.
            mask_RK: which of them are asked for.

        Returns:
            `[R, K, n_out]` in the critic's dtype; zeros outside the mask.
        """
        self.wait()
        outputs = torch.zeros(*ids_RK.shape, self.critic.distribution.n_out, dtype=self.dtype, device=self.device)
        group: list[_Row] = []
        wanted_R = [0] * len(sequences)  # blocks of the scratch memory; a Q head runs no candidates
        if self.critic.head.shape.kind == "V":
            wanted_R = self._scratch.wanted(mask_RK.sum(-1).cpu().numpy()).tolist()
        free = self._scratch.blocks
        try:
            for index, (sequence, history) in enumerate(zip(sequences, histories, strict=True)):
                assert 0 < len(history) <= self.capacity, (len(history), self.capacity)
                self._open.move_to_end(id(sequence))
                row = self._reserve(index, sequence, history, group) if wanted_R[index] <= free else None
                if row is None:  # what there is of memory is full of this call's own rows: finish them first
                    self._run(group, ids_RK, mask_RK, outputs)
                    group, free = [], self._scratch.blocks
                    self._splits += 1
                    row = self._reserve(index, sequence, history, group)
                    assert row is not None
                group.append(row)
                free -= wanted_R[index]
            self._run(group, ids_RK, mask_RK, outputs)
        except BaseException:
            self._forget()  # blocks may be published that were never computed
            raise
        return outputs

    @torch.inference_mode()
    def score_latest(
        self,
        sequences: list[Sequence],
        lengths: list[int],
        last_R: Tensor,
        ids_RK: Tensor,
        read: Callable[[int], list[int]],
    ) -> Tensor:
        """As `score`, by the `decoder`: in fixed shapes and without knowing which tokens were sampled.

        Args:
            sequences: as in `score`.
            lengths: of each row's history.
            last_R: the last token of each, int64, on the device.
            ids_RK: candidates; all of them are scored.
            read: a row's history, from the device: asked for rows that are new, or that lost their blocks.
        """
        self.wait()
        decoder = self.decoder
        assert decoder is not None
        self._scratch.spoil_last()  # by rows that pad a captured step
        ids_RK = ids_RK.clamp(max=self.critic.vocab - 1)  # see `_run`
        outputs = torch.zeros(*ids_RK.shape, self.critic.distribution.n_out, dtype=self.dtype, device=self.device)
        group: list[_Row] = []

        def run() -> None:
            if not group:
                return
            self._prefill(group)
            at = [row.index for row in group]
            tables = [row.sequence.blocks for row in group]
            length = np.array([lengths[i] for i in at], dtype=np.int32)
            if len(group) == len(sequences):
                outputs.copy_(decoder.score(last_R, ids_RK, length, tables))
                return
            rows = to_device(torch.tensor(at), self.device)
            outputs[rows] = decoder.score(last_R[rows], ids_RK[rows], length, tables)

        try:
            for index, sequence in enumerate(sequences):
                assert 0 < lengths[index] <= self.capacity, (lengths[index], self.capacity)
                self._open.move_to_end(id(sequence))
                row = self._continue(index, sequence, lengths[index], read, group)
                if row is None:  # the pool is full of this call's own rows: finish them first
                    run()
                    group.clear()
                    self._splits += 1
                    row = self._continue(index, sequence, lengths[index], read, group)
                    assert row is not None
                group.append(row)
            run()
        except BaseException:
            self._forget()
            raise
        return outputs

    @torch.inference_mode()
    def score_plain(self, tokens: list[int]) -> Tensor:
        """Outputs `[S, n_out]` for every token given those before it, by a plain forward pass without the cache."""
        self.wait()
        with self._plain_attention():
            return self.critic(torch.tensor([tokens], device=self.device))[0]

    @torch.inference_mode()
    def score_uncached(self, history: list[int], candidates: list[int]) -> Tensor:
        """`score` of one row by its definition: `[K, n_out]` by one forward pass that shares nothing with the cache.

        May be called in any thread, beside the other methods.
        """
        tokens = torch.tensor(history + candidates, device=self.device).clamp_(max=self.critic.vocab - 1)
        length = len(history)
        with self._plain:
            if self.critic.head.shape.kind == "Q":
                last_1D = self._hidden(tokens[:length], torch.arange(length, device=self.device), PlainPass(length))[
                    -1:
                ]
                return self.critic.head.of_tokens(last_1D, tokens[None, length:])[0]
            position = torch.arange(len(tokens), device=self.device).clamp_(max=length)
            return self.critic.head.at_tokens(self._hidden(tokens, position, PlainPass(length))[length:])

    # -- bookkeeping

    @torch.inference_mode()
    def _catch_up(self, rows: list[tuple[Sequence, list[int]]]) -> None:
        group: list[_Row] = []
        try:
            for index, (sequence, history) in enumerate(rows):
                # What would take other rows' blocks is left to `score`, which knows all that run.
                if cache.blocks_wanted(self.blocks, sequence, len(history)) > self.blocks.free:
                    break
                row = self._reserve(index, sequence, history, group)
                if row is None:
                    break
                group.append(row)
            self._prefill(group)
        except Exception:  # nobody waits for an answer: whoever asks for scores will meet it again
            self._forget()

    def _forget(self) -> None:
        """Forgets everything computed; open sequences stay open and are computed again."""
        for sequence in self._open.values():
            cache.truncate(self.blocks, sequence, 0)
        self._choices.clear()
        self._last.clear()
        self._moves.clear()
        self.blocks.forget_all()

    def _reserve(self, index: int, sequence: Sequence, history: list[int], group: list[_Row]) -> _Row | None:
        """Blocks for the whole history; None if the rows already in `group` leave too little room."""
        if self._was_run(sequence, history):
            return _Row(index, sequence, history, len(history))
        # A Q head reads the last token's hidden state, so that one is run.
        reuse = len(history) - (self.critic.head.shape.kind == "Q")
        cache.adopt(self.blocks, sequence, history, reuse)
        if not self._make_room(sequence, len(history), group):
            return None
        self._take_choice(sequence, history)
        start = len(sequence.tokens)
        if start < len(history):
            cache.extend(self.blocks, sequence, history[start:])
        return _Row(index, sequence, history, start)

    def _was_run(self, sequence: Sequence, history: list[int]) -> bool:
        """Whether all of this history was run, and its last hidden state, which a Q head reads, is there."""
        last = self._last.get(id(sequence))
        return (
            last is not None
            and (last.length, last.cuts) == (len(history), sequence.cuts)
            and sequence.tokens == history
        )

    def _continue(
        self, index: int, sequence: Sequence, length: int, read: Callable[[int], list[int]], group: list[_Row]
    ) -> _Row | None:
        """Blocks for a history of that length, and what is missing before its last token; None for want of room."""
        history: list[int] = []
        if sequence.length != length - 1:
            history = read(index)[: length - 1]
            cache.adopt(self.blocks, sequence, history, len(history))
        if not self._make_room(sequence, length, group):
            return None
        start = len(sequence.tokens)
        cache.extend(self.blocks, sequence, history[start:])
        cache.advance(self.blocks, sequence)
        return _Row(index, sequence, history, start)

    def _make_room(self, sequence: Sequence, length: int, group: list[_Row]) -> bool:
        """Frees blocks until the sequence can have that length: those of the least recently used, `group` excepted."""
        if cache.blocks_wanted(self.blocks, sequence, length) <= self.blocks.free:
            return True  # the usual case
        protected = {id(row.sequence) for row in group} | {id(sequence)}
        victims = (s for key, s in self._open.items() if key not in protected and s.blocks)
        while cache.blocks_wanted(self.blocks, sequence, length) > self.blocks.free:
            victim = next(victims, None)
            if victim is None:
                return False
            cache.truncate(self.blocks, victim, 0)
        return True

    def _take_choice(self, sequence: Sequence, history: list[int]) -> None:
        """Has the chosen candidate's keys and values moved to the sequence's end, where they are still there."""
        choice = self._choices.get(id(sequence))
        if choice is None or choice.cuts != sequence.cuts or not self._scratch.holds(choice):
            return
        if not choice.length == len(sequence.tokens) == len(history) - 1 or history[-1] not in choice.ids:
            return
        cache.extend(self.blocks, sequence, history[-1:])
        block, offset = divmod(choice.length, self.blocks.block_size)
        to = sequence.blocks[block] * self.blocks.block_size + offset
        self._moves.append((choice.slot + choice.ids.index(history[-1]), to))

    def _move_choices(self) -> None:
        """Moves the chosen candidates' keys and values, all rows at once."""
        if not self._moves:
            return
        self.pool.move(*torch.tensor(self._moves, device=self.device).unbind(1))
        self._moves.clear()

    # -- forward passes

    def _run(self, group: list[_Row], ids_RK: Tensor, mask_RK: Tensor, outputs: Tensor) -> None:
        if not group:
            return
        at: Tensor | slice = slice(None)  # all rows: views do
        if len(group) < len(outputs):
            at = torch.tensor([row.index for row in group], device=self.device)
        ids, mask = ids_RK[at], mask_RK[at]
        ids = ids.clamp(max=self.critic.vocab - 1)  # ids past the tokenizer's end are padding of the reference's table
        if self.critic.head.shape.kind == "Q":
            self._prefill(group)
            hidden = torch.stack([self._last[id(row.sequence)].hidden for row in group])
            outputs[at] = self.critic.head.of_tokens(hidden, ids).masked_fill_(~mask[..., None], 0.0)
            return
        if max(len(row.history) - row.start for row in group) > PATCH_TOKENS:
            self._prefill(group)
        scored = self.critic.head.at_tokens(self._run_candidates(group, ids, mask))
        if isinstance(at, Tensor):
            mask = torch.zeros_like(mask_RK).index_copy_(0, at, mask)
        outputs.masked_scatter_(mask[..., None], scored)

    def _prefill(self, group: list[_Row]) -> None:
        """Runs what is missing, in passes of `PREFILL_TOKENS`, and keeps the rows' last hidden states."""
        for pieces in _passes(group):
            for piece, last_D in zip(pieces, self._prefill_pass(pieces), strict=True):
                sequence = piece.row.sequence
                self._last[id(sequence)] = _Last(piece.stop, sequence.cuts, last_D)
        for row in group:
            row.start = len(row.history)

    def _prefill_pass(self, pieces: list[_Piece]) -> Tensor:
        """Runs these; the last hidden state of each, `[pieces, D]`."""
        tokens = [t for piece in pieces for t in piece.row.history[piece.start : piece.stop]]
        first = np.array([piece.start for piece in pieces])
        counts = np.array([piece.stop for piece in pieces]) - first
        position = first[:, None] + np.arange(counts.max())
        lengths = first + counts
        table = self._table([piece.row.sequence for piece in pieces], int(lengths.max()))
        slots = self._slots(table, position)[np.arange(position.shape[1]) < counts[:, None]]
        layout = self._layout(counts, position, slots, table, lengths)
        hidden = self._forward(torch.tensor(tokens, device=self.device), layout)
        return hidden if len(hidden) == len(pieces) else hidden[self._tensor(np.cumsum(counts) - 1)]

    def _run_candidates(self, group: list[_Row], ids: Tensor, mask: Tensor) -> Tensor:
        """Hidden states of all asked candidates, packed `[N, D]`; keeps their keys and values.

        What is missing of the rows is run in the same pass, before the candidates of each.
        """
        size = self.blocks.block_size
        asked = mask.sum(-1).cpu().numpy()
        lengths = np.array([len(row.history) for row in group])
        missing = lengths - np.array([row.start for row in group])
        counts = missing + asked
        if not counts.any():
            return torch.empty(0, self.critic.head.shape.hidden, dtype=self.dtype, device=self.device)
        written, scratch = self._scratch.lay(asked)
        prefix = self._table([row.sequence for row in group], int(lengths.max()))
        rank = np.arange(counts.max()) - missing[:, None]  # of the candidates; negative before them
        slots = scratch[:, :1] * size + rank
        position = np.broadcast_to(lengths[:, None], rank.shape)
        valid = np.arange(rank.shape[1]) < counts[:, None]
        candidates = ids[mask].tolist()
        ends = np.cumsum(asked).tolist()
        chosen = [candidates[end - many : end] for end, many in zip(ends, asked.tolist(), strict=True)]
        tokens = candidates
        if missing.any():
            position = np.minimum(position, lengths[:, None] + rank)
            slots = np.where(rank < 0, self._slots(prefix, position), slots)
            tokens = [t for row, own in zip(group, chosen, strict=True) for t in (*row.history[row.start :], *own)]
        layout = self._layout(
            counts, position, slots[valid], np.concatenate([prefix, scratch], axis=1), lengths,
            own=prefix.shape[1] * size, listed=missing,
        )  # fmt: skip
        first = (scratch[:, 0] * size).tolist()
        for row, own, slot in zip(group, chosen, first, strict=True):
            self._choices[id(row.sequence)] = Choice(len(row.history), row.sequence.cuts, own, slot, written)
        hidden = self._forward(torch.tensor(tokens, device=self.device), layout)
        return hidden[self._tensor((rank >= 0)[valid])] if missing.any() else hidden

    def _slots(self, table: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.int64]:
        """The pool's slots of each row's positions; positions past the table's end give any."""
        size = self.blocks.block_size
        block = np.minimum(position // size, table.shape[1] - 1)
        return np.take_along_axis(table, block, axis=1) * size + position % size

    def _table(self, sequences: list[Sequence], longest: int) -> NDArray[np.int64]:
        """Block tables for that many positions, padded with a row's own first block: it reads nobody else's."""
        table = np.empty((len(sequences), -(-longest // self.blocks.block_size)), dtype=np.int64)
        for row, sequence in zip(table, sequences, strict=True):
            blocks = sequence.blocks[: len(row)]
            row[: len(blocks)] = blocks
            row[len(blocks) :] = blocks[0]
        return table

    def _layout(
        self,
        counts: NDArray[np.int64],
        position: NDArray[np.int64],
        slots: NDArray[np.int64],
        table: NDArray[np.int64],
        key_lengths: NDArray[np.int64],
        own: int | None = None,
        listed: NDArray[np.int64] | None = None,
    ) -> Layout:
        """Rows of `counts` packed tokens, at the front of the rows of `position`."""
        size = self.blocks.block_size
        shared = self._shared_blocks(table, int(position[:, 0].min()))
        valid = np.arange(position.shape[1]) < counts[:, None]
        valid_RM = packed_RM = None
        if not valid.all():
            valid_RM = self._tensor(valid)
            packed = np.where(valid, (np.cumsum(counts) - counts)[:, None] + np.arange(position.shape[1]), 0)
            packed_RM, position = self._tensor(packed), np.where(valid, position, 0)
        listed_R = None if listed is None else self._tensor(listed)
        position_RM, write_N, key_length_R = map(self._tensor, (position, slots, key_lengths))
        shared_B, table_RB = self._tensor(table[0, :shared]), self._tensor(table[:, shared:])
        start = shared * size
        own = None if own is None else own - start
        return Layout(valid_RM, packed_RM, position_RM, write_N, shared_B, table_RB, start, key_length_R, own, listed_R)

    def _shared_blocks(self, table: NDArray[np.int64], first: int) -> int:
        """How many blocks all rows begin with, all of them before position `first`; 0 where it would gain nothing."""
        if len(table) == 1 or self._windowed or self.device.type != "cpu":
            return 0
        same = (table == table[0]).all(0)
        shared = len(same) if same.all() else int(same.argmin())
        return min(shared, first // self.blocks.block_size)

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.tensor(array, device=self.device)

    def _forward(self, tokens_N: Tensor, layout: Layout) -> Tensor:
        """Last hidden states `[N, D]` of packed tokens, in the cache."""
        self._move_choices()
        position = layout.position_RM if layout.valid_RM is None else layout.position_RM[layout.valid_RM]
        return self._hidden(tokens_N, position.flatten(), PagedPass(self.pool, self.blocks.block_size, layout))

    def _hidden(self, tokens_N: Tensor, position_N: Tensor, critic_pass: Pass) -> Tensor:
        return self.critic.backbone(
            input_ids=tokens_N[None], position_ids=position_N[None], use_cache=False, critic_pass=critic_pass
        ).last_hidden_state[0]

    # -- set-up

    def _allocate(self) -> Pool:
        probe = ProbePass()
        one = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        with torch.inference_mode():
            self.critic.backbone(input_ids=one, position_ids=one, use_cache=False, critic_pass=probe)
        self._windowed = probe.windowed
        layers = [probe.shapes[layer] for layer in sorted(probe.shapes)]
        if not layers or sorted(probe.shapes) != list(range(len(layers))):
            raise CriticError(
                f"{type(self.critic.backbone).__name__} cannot serve as a critic's backbone: "
                "its attention does not go through transformers' AttentionInterface"
            )
        slots = (self.blocks.blocks + self._scratch.blocks) * self.blocks.block_size
        return Pool.zeros(slots, layers, next(self.critic.parameters()))

    def _make_decoder(self, prefix: PrefixAttention, graphs: tuple[Collection[int], Collection[int]]) -> Decoder | None:
        shape = (self.critic, self.pool, self.blocks.block_size, self.capacity, prefix)
        logger = logging.getLogger(__name__)
        try:
            plain = Decoder(*shape)
            self._check_decoder(plain)
            if not graphs[0]:
                return plain
            try:
                compiled = Decoder(*shape, compiled=True)
                self._check_decoder(compiled)
                compiled.capture(*graphs)
                return compiled
            except Exception as error:  # whatever a compiler does
                self._forget()
                logger.warning("critic without compiled steps: %s", error)
            plain.capture(*graphs)
            return plain
        except Exception as error:  # whatever a kernel does: the other path serves every backbone
            self._forget()
            logger.warning("critic without fixed shapes, each step waits for the device: %s", error)
            return None

    @contextmanager
    def _plain_attention(self) -> Iterator[None]:
        with self._plain:
            self.critic.backbone.set_attn_implementation("sdpa")
            try:
                yield
            finally:
                self.critic.backbone.set_attn_implementation(PAGED)

    @torch.inference_mode()
    def _plain_hidden(self) -> tuple[list[int], Tensor]:
        """Tokens that fill some blocks, and their hidden states `[S, D]` by a plain forward pass."""
        length = min(self.capacity, 2 * self.blocks.block_size + 3)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.critic.vocab, (length + 1,), generator=generator).tolist()
        with self._plain_attention():
            ids = torch.tensor([tokens], device=self.device)
            return tokens, self.critic.backbone(input_ids=ids, use_cache=False).last_hidden_state[0]

    @torch.inference_mode()
    def _check_against_plain_forward(self) -> None:
        """Refuses a backbone whose attention the paged functions do not reproduce."""
        tokens, plain = self._plain_hidden()
        sequence, history = self.open(), tokens[:-1]
        row = self._reserve(0, sequence, history, [])
        assert row is not None
        self._prefill([row])
        got = [self._last[id(sequence)].hidden]
        if self.critic.head.shape.kind == "V":
            ids = torch.tensor([tokens[-1:]], device=self.device)
            got.append(self._run_candidates([row], ids, torch.ones_like(ids, dtype=torch.bool))[0])
        self.close(sequence)
        self._forget()
        self._compare(torch.stack(got), plain[-2:][: len(got)])

    @torch.inference_mode()
    def _check_decoder(self, decoder: Decoder) -> None:
        """The same of a step in fixed shapes, of one row and of two, which a compiler tells apart."""
        tokens, plain = self._plain_hidden()
        sequence, history = self.open(), tokens[:-1]
        row = self._continue(0, sequence, len(history), lambda _: history, [])
        assert row is not None
        self._prefill([row])
        last, ids = (torch.tensor(t, device=self.device) for t in (history[-1:], [tokens[-1:]]))
        got = []
        for rows in (1, 2):
            lengths = np.full(rows, len(history), dtype=np.int32)
            got.append(decoder.hidden(last.repeat(rows), ids.repeat(rows, 1), lengths, [sequence.blocks] * rows))
        self.close(sequence)
        self._forget()
        hidden_RMD = torch.cat(got)
        self._compare(hidden_RMD, plain[-2:][: hidden_RMD.shape[1]])

    def _compare(self, ours: Tensor, plain: Tensor) -> None:
        tolerance = 1e-3 if self.dtype == torch.float32 else 5e-2
        worst = ((ours - plain).abs().amax(-1) / plain.abs().amax(-1)).max().item()
        if not worst < tolerance:
            raise CriticError(
                f"{type(self.critic.backbone).__name__} cannot serve as a critic's backbone: with the paged cache "
                f"its hidden states differ from a plain forward pass by {worst:.2g} of their size"
            )


def _passes(group: list[_Row]) -> Iterator[list[_Piece]]:
    """What is missing of the rows, cut into passes of `PREFILL_TOKENS`."""
    pieces: list[_Piece] = []
    room, longest = PREFILL_TOKENS, 0
    for row in group:
        start, length = row.start, len(row.history)
        while start < length:
            stop = min(length, start + room)
            longest = max(longest, stop - start)
            # Rows are padded to the longest piece inside attention: bound that too.
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
