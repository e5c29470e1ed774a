"""Scores candidates in steps of fixed shapes, for accelerators: nothing in a step waits for the device.

The host needs to know neither which tokens were sampled nor which of them were candidates, only how many tokens each
row has. `decoder` runs the step itself.

Shapes: R rows, K candidates of each.
"""

import logging
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from qsharp_core.critic.scoring.backbone import CachedBackbone, PendingRow
from qsharp_core.critic.scoring.base import Question
from qsharp_core.critic.scoring.cache import CachedSequence
from qsharp_core.critic.scoring.cached import CachedScorer
from qsharp_core.critic.scoring.check import LoadCheck
from qsharp_core.critic.scoring.decoder import Decoder
from qsharp_core.critic.scoring.prefix_attention import PrefixAttention
from qsharp_core.transfer import to_device

logger = logging.getLogger(__name__)


class FixedShapeScorer(CachedScorer):
    """Scores candidates in steps of fixed shapes; see the module's docstring.

    Args:
        backbone: the critic with its cache, and at least one scratch block, which padding rows write to.
        kernel: attention to the blocks of a row.
        graphs: numbers of rows and numbers of candidates; steps of these shapes are compiled where that succeeds, and
            captured as CUDA graphs.

    Raises:
        CriticError: the backbone cannot be run so, or its hidden states differ from those of a plain forward pass.
        Exception: whatever the kernel raises.
    """

    def __init__(
        self,
        backbone: CachedBackbone,
        kernel: PrefixAttention,
        graphs: tuple[Collection[int], Collection[int]] = ((), ()),
    ) -> None:
        super().__init__(backbone)
        self.decoder = self._make_decoder(kernel, graphs)

    def answer(self, question: Question) -> Tensor:
        """Outputs `[R, K, n_out]` of every candidate in the critic's dtype, whether it is asked for or not."""
        last_R = question.last_R
        if last_R is None:
            tokens = [question.read(i)[-1] for i in range(len(question.sequences))]
            last_R = to_device(torch.tensor(tokens), self.backbone.device)
        return self.score(question.sequences, question.lengths, last_R, question.ids_RK, question.read)

    def catch_up(
        self, sequences: Sequence[CachedSequence], lengths: Sequence[int], histories: Sequence[Callable[[], list[int]]]
    ) -> None:
        """Does nothing: on an accelerator the host runs ahead of the device as it is."""

    @torch.inference_mode()
    def score(
        self,
        sequences: list[CachedSequence],
        lengths: list[int],
        last_R: Tensor,
        ids_RK: Tensor,
        read: Callable[[int], list[int]],
    ) -> Tensor:
        """The head's outputs of every candidate of every row.

        Args:
            sequences: one of `open` per row, each at most once.
            lengths: number of tokens in each row's history, at least 1 and at most `capacity`.
            last_R: the last token of each row, int64, on the device.
            ids_RK: candidates, int64; all of them are scored.
            read: returns the history of the row at an index, from the device. Called only for rows that are new or that
                lost their blocks.

        Returns:
            `[R, K, n_out]` in the critic's dtype.
        """
        self.wait()
        device = self.backbone.device
        ids_RK = ids_RK.clamp(max=self.vocab - 1)  # ids past the tokenizer's end are padding of the reference's table
        outputs = torch.zeros(*ids_RK.shape, self.distribution.n_out, dtype=self.dtype, device=device)
        group: list[PendingRow] = []

        def run() -> None:
            if not group:
                return
            self.backbone.prefill(group)
            at = [row.index for row in group]
            tables = [row.sequence.blocks for row in group]
            length = np.array([lengths[i] for i in at], dtype=np.int32)
            if len(group) == len(sequences):
                outputs.copy_(self.decoder.score(last_R, ids_RK, length, tables))
                return
            rows = to_device(torch.tensor(at), device)
            outputs[rows] = self.decoder.score(last_R[rows], ids_RK[rows], length, tables)

        try:
            for index, sequence in enumerate(sequences):
                assert 0 < lengths[index] <= self.capacity, (lengths[index], self.capacity)
                self.blocks.touch(sequence)
                row = self._reserve(index, sequence, lengths[index], read, group)
                if row is None:  # the rows of this call fill the cache: finish them first
                    run()
                    group.clear()
                    self._splits += 1
                    row = self._reserve(index, sequence, lengths[index], read, group)
                    assert row is not None
                group.append(row)
            run()
        except BaseException:
            self._forget()  # blocks may be published that were never computed
            raise
        return outputs

    def _reserve(
        self,
        index: int,
        sequence: CachedSequence,
        length: int,
        read: Callable[[int], list[int]],
        group: list[PendingRow],
    ) -> PendingRow | None:
        """Takes blocks for a history of `length` tokens; None if the rows in `group` leave too little room.

        The row's `history` ends before the last token, which the step itself runs.
        """
        history: list[int] = []
        if sequence.length != length - 1:
            history = read(index)[: length - 1]
            self.blocks.adopt(sequence, history, len(history))
        if not self._make_room(sequence, length, group):
            return None
        start = len(sequence.tokens)
        self.blocks.extend(sequence, history[start:])
        self.blocks.advance(sequence)
        return PendingRow(index, sequence, history, start)

    # -- set-up

    def _make_decoder(self, kernel: PrefixAttention, graphs: tuple[Collection[int], Collection[int]]) -> Decoder:
        shape = (self.critic, self.pool, self.blocks.block_size, self.capacity, kernel)
        plain = Decoder(*shape)
        self._check(plain)
        if not graphs[0]:
            return plain
        try:
            compiled = Decoder(*shape, compiled=True)
            self._check(compiled)
            compiled.capture(*graphs)
            return compiled
        except Exception as error:  # whatever a compiler raises
            logger.warning("critic without compiled steps: %s", error)
        plain.capture(*graphs)
        return plain

    @torch.inference_mode()
    def _check(self, decoder: Decoder) -> None:
        """Compares a step of one row and a step of two, which a compiler tells apart, with a plain forward pass."""
        check = LoadCheck(self.backbone)
        device, history = self.backbone.device, check.history
        sequence = self.open()
        try:
            row = self._reserve(0, sequence, len(history), lambda _: history, [])
            assert row is not None
            self.backbone.prefill([row])
            last, ids = (torch.tensor(t, device=device) for t in (history[-1:], [[check.candidate]]))
            hidden = []
            for rows in (1, 2):
                lengths = np.full(rows, len(history), dtype=np.int32)
                hidden.append(decoder.hidden(last.repeat(rows), ids.repeat(rows, 1), lengths, [sequence.blocks] * rows))
        finally:
            self.close(sequence)
            self._forget()
            self.take_counts()  # counts are of requests
        check.compare(torch.cat(hidden))
