"""Scores candidates in packed passes of any shape, with any backbone.

Each step, what the cache lacks of a row's history is run: usually nothing, because the chosen token was a candidate of
the step before, whose keys and values were kept. Then all candidates of all rows are run together, each attending to
its row's prefix and to itself (V head); or the last token is run, and all candidates are read off its hidden state
(Q head).

Shapes: R rows, K most candidates of a row, N packed tokens, D hidden width.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qsharp_core.critic.scoring.backbone import CachedBackbone, PendingRow
from qsharp_core.critic.scoring.base import Question
from qsharp_core.critic.scoring.cache import CachedSequence
from qsharp_core.critic.scoring.cached import CachedScorer
from qsharp_core.critic.scoring.check import LoadCheck
from qsharp_core.critic.scoring.choices import Choices, Scratch

# A row that lacks at most so many tokens has them run together with its candidates; one that lacks more gets a pass
# before. Few are missing after a token that was no candidate, and after steps that did not ask the critic; one forward
# pass more would cost its launches.
PATCH_TOKENS = 16


class _LastHidden(NamedTuple):
    """The last hidden state `[D]` of a sequence, valid as long as the sequence has that length and was not cut."""

    length: int
    cuts: int
    hidden_D: Tensor


class PagedScorer(CachedScorer):
    """Scores candidates in packed passes; see the module's docstring.

    Args:
        backbone: the critic with its cache. Its scratch blocks hold the candidates of one pass. Rows whose candidates
            do not fit together are run in several passes; the candidates of one row must fit.
        background: runs what `catch_up` begins; without it `catch_up` does nothing.

    Raises:
        CriticError: the hidden states of cached passes differ from those of a plain forward pass.
    """

    def __init__(self, backbone: CachedBackbone, background: Executor | None = None) -> None:
        super().__init__(backbone)
        self._is_q = self.critic.head.shape.kind == "Q"
        self._scratch = Scratch(self.blocks.total, backbone.scratch_blocks, self.blocks.block_size)
        self._choices = Choices(self._scratch, self.pool)
        self._last: dict[CachedSequence, _LastHidden] = {}
        self._background = background
        self._running: Future[None] | None = None
        self._check()

    def answer(self, question: Question) -> Tensor:
        """Outputs `[R, K, n_out]` of every candidate in the critic's dtype; zeros outside `question.mask_RK`."""
        histories = [question.read(i) for i in range(len(question.sequences))]
        return self.score(question.sequences, histories, question.ids_RK, question.mask_RK)

    @torch.inference_mode()
    def score(
        self, sequences: list[CachedSequence], histories: list[list[int]], ids_RK: Tensor, mask_RK: Tensor
    ) -> Tensor:
        """The head's outputs of every candidate of every row.

        Args:
            sequences: one of `open` per row, each at most once.
            histories: tokens of each row so far, at least one and at most `capacity`.
            ids_RK: candidates, int64.
            mask_RK: which of them are asked for, bool.

        Returns:
            `[R, K, n_out]` in the critic's dtype; zeros outside the mask.
        """
        self.wait()
        outputs = torch.zeros(*ids_RK.shape, self.distribution.n_out, dtype=self.dtype, device=self.backbone.device)
        group: list[PendingRow] = []
        scratch_R = [0] * len(sequences)  # scratch blocks of each row; a Q head runs no candidates
        if not self._is_q:
            scratch_R = self._scratch.blocks_for(mask_RK.sum(-1).cpu().numpy()).tolist()
        free = self._scratch.blocks
        try:
            for index, (sequence, history) in enumerate(zip(sequences, histories, strict=True)):
                assert 0 < len(history) <= self.capacity, (len(history), self.capacity)
                self.blocks.touch(sequence)
                row = self._reserve(index, sequence, history, group) if scratch_R[index] <= free else None
                if row is None:  # the rows of this call fill the memory: finish them first
                    self._run(group, ids_RK, mask_RK, outputs)
                    group, free = [], self._scratch.blocks
                    self._splits += 1
                    row = self._reserve(index, sequence, history, group)
                    assert row is not None
                group.append(row)
                free -= scratch_R[index]
            self._run(group, ids_RK, mask_RK, outputs)
        except BaseException:
            self._forget()  # blocks may be published that were never computed
            raise
        return outputs

    # -- sequences

    def close(self, sequence: CachedSequence) -> None:
        super().close(sequence)
        self._choices.forget(sequence)
        self._last.pop(sequence, None)

    def discard(self, sequence: CachedSequence) -> None:
        super().discard(sequence)
        self._choices.clear()

    def catch_up(
        self, sequences: Sequence[CachedSequence], lengths: Sequence[int], histories: Sequence[Callable[[], list[int]]]
    ) -> None:
        """Begins to run, in the background, what the cache lacks of these rows.

        For callers that know the histories before they know the candidates. The rows of a Q head then need no pass in
        `score`. Those of a V head are run only where they lack more than would join their candidates' pass.

        Args:
            sequences: one of `open` per row, each at most once.
            lengths: number of tokens in each row's history.
            histories: each returns a row's history, and is called only for rows that are run.
        """
        self.wait()
        if self._background is None:
            return
        rows = [
            (sequence, history())
            for sequence, length, history in zip(sequences, lengths, histories, strict=True)
            if self._is_q or length - len(sequence.tokens) > PATCH_TOKENS
        ]
        if rows:
            self._running = self._background.submit(self._catch_up, rows)

    def wait(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.result()
        super().wait()

    @torch.inference_mode()
    def _catch_up(self, rows: list[tuple[CachedSequence, list[int]]]) -> None:
        group: list[PendingRow] = []
        try:
            for index, (sequence, history) in enumerate(rows):
                # `score` knows all rows that run: it decides who loses blocks.
                if not self.blocks.has_room(sequence, len(history)):
                    break
                row = self._reserve(index, sequence, history, group)
                if row is None:
                    break
                group.append(row)
            self._choices.move()
            self._prefill(group)
        except Exception:  # nobody waits for an answer here; `score` will run the rows and raise what they raise
            self._forget()

    def _forget(self) -> None:
        super()._forget()
        self._choices.clear()
        self._last.clear()

    def _reserve(
        self, index: int, sequence: CachedSequence, history: list[int], group: list[PendingRow]
    ) -> PendingRow | None:
        """Takes blocks for a whole history; None if the rows in `group` leave too little room."""
        if self._was_run(sequence, history):
            return PendingRow(index, sequence, history, len(history))
        # A Q head reads the hidden state of the last token, which is therefore run.
        self.blocks.adopt(sequence, history, len(history) - self._is_q)
        if not self._make_room(sequence, len(history), group):
            return None
        self._take_choice(sequence, history)
        start = len(sequence.tokens)
        if start < len(history):
            self.blocks.extend(sequence, history[start:])
        return PendingRow(index, sequence, history, start)

    def _was_run(self, sequence: CachedSequence, history: list[int]) -> bool:
        """Whether all of this history was run, and its last hidden state, which a Q head reads, was kept."""
        last = self._last.get(sequence)
        return (
            last is not None
            and (last.length, last.cuts) == (len(history), sequence.cuts)
            and sequence.tokens == history
        )

    def _take_choice(self, sequence: CachedSequence, history: list[int]) -> None:
        """Appends the last token by moving its keys and values, if it is a candidate of the last pass."""
        source = self._choices.slot_of_last(sequence, history)
        if source is None:
            return
        self.blocks.extend(sequence, history[-1:])
        block, offset = divmod(len(history) - 1, self.blocks.block_size)
        self._choices.plan_move(source, sequence.blocks[block] * self.blocks.block_size + offset)

    # -- forward passes

    def _run(self, group: list[PendingRow], ids_RK: Tensor, mask_RK: Tensor, outputs: Tensor) -> None:
        """Writes the outputs of these rows to their places in `outputs`."""
        if not group:
            return
        self._choices.move()
        at: Tensor | slice = slice(None)  # all rows: a view, no copy
        if len(group) < len(outputs):
            at = torch.tensor([row.index for row in group], device=self.backbone.device)
        ids, mask = ids_RK[at], mask_RK[at]
        ids = ids.clamp(max=self.vocab - 1)  # ids past the tokenizer's end are padding of the reference's table
        if self._is_q:
            self._prefill(group)
            hidden = torch.stack([self._last[row.sequence].hidden_D for row in group])
            outputs[at] = self.critic.head.of_tokens(hidden, ids).masked_fill_(~mask[..., None], 0.0)
            return
        if max(len(row.history) - row.start for row in group) > PATCH_TOKENS:
            self._prefill(group)
        scored = self.critic.head.at_tokens(self._run_candidates(group, ids, mask))
        if isinstance(at, Tensor):
            mask = torch.zeros_like(mask_RK).index_copy_(0, at, mask)
        outputs.masked_scatter_(mask[..., None], scored)

    def _prefill(self, group: list[PendingRow]) -> None:
        """Runs what is missing of the rows, and keeps their last hidden states."""
        for row, hidden_D in zip(group, self.backbone.prefill(group), strict=True):
            if hidden_D is not None:
                self._last[row.sequence] = _LastHidden(len(row.history), row.sequence.cuts, hidden_D)

    def _run_candidates(self, group: list[PendingRow], ids: Tensor, mask: Tensor) -> Tensor:
        """Hidden states of all candidates in the mask, packed `[N, D]`; their keys and values stay in scratch.

        What is missing of a row is run in the same pass, before the candidates of the row.
        """
        size, layouts = self.blocks.block_size, self.backbone.layouts
        asked = mask.sum(-1).cpu().numpy()
        lengths = np.array([len(row.history) for row in group])
        missing = lengths - np.array([row.start for row in group])
        counts = missing + asked
        if not counts.any():
            return torch.empty(0, self.critic.head.shape.hidden, dtype=self.dtype, device=self.backbone.device)
        written, scratch = self._scratch.lay_out(asked)
        prefix = layouts.table([row.sequence for row in group], int(lengths.max()))
        rank = np.arange(counts.max()) - missing[:, None]  # of the candidates; negative for missing tokens
        slots = scratch[:, :1] * size + rank
        position = np.broadcast_to(lengths[:, None], rank.shape)
        valid = np.arange(rank.shape[1]) < counts[:, None]
        candidates = ids[mask].tolist()
        ends = np.cumsum(asked).tolist()
        by_row = [candidates[end - count : end] for end, count in zip(ends, asked.tolist(), strict=True)]
        tokens = candidates
        if missing.any():
            position = np.minimum(position, lengths[:, None] + rank)
            slots = np.where(rank < 0, layouts.slots(prefix, position), slots)
            tokens = [t for row, own in zip(group, by_row, strict=True) for t in (*row.history[row.start :], *own)]
        layout = layouts.build(
            counts, position, slots[valid], np.concatenate([prefix, scratch], axis=1), lengths,
            candidates_from=prefix.shape[1] * size, listed=missing,
        )  # fmt: skip
        for row, row_ids, slot in zip(group, by_row, (scratch[:, 0] * size).tolist(), strict=True):
            self._choices.remember(row.sequence, row_ids, slot, written)
        hidden = self.backbone.forward(torch.tensor(tokens, device=self.backbone.device), layout)
        return hidden[torch.tensor((rank >= 0)[valid], device=hidden.device)] if missing.any() else hidden

    @torch.inference_mode()
    def _check(self) -> None:
        """Refuses a backbone whose attention the cached passes do not reproduce."""
        check = LoadCheck(self.backbone)
        sequence = self.open()
        row = self._reserve(0, sequence, check.history, [])
        assert row is not None
        self._prefill([row])
        hidden = [self._last[sequence].hidden_D]
        if not self._is_q:
            ids = torch.tensor([[check.candidate]], device=self.backbone.device)
            hidden.append(self._run_candidates([row], ids, torch.ones_like(ids, dtype=torch.bool))[0])
        self.close(sequence)
        self._forget()
        self.take_counts()  # counts are of requests
        check.compare(torch.stack(hidden))
