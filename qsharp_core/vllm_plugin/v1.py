"""Logits processor for vLLM's V1 model runner.

vllm serve MODEL --logits-processors qsharp_core.vllm_plugin.v1:QSharpLogitsProcessor …
"""

from collections.abc import Callable
from functools import partial
from operator import add
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from qsharp_core.vllm_plugin import upstream
from qsharp_core.vllm_plugin.params import check_sampling_params
from qsharp_core.vllm_plugin.rows import LogitsRow, TrackedRequest
from qsharp_core.vllm_plugin.step import StepGuide


class QSharpLogitsProcessor(LogitsProcessor):
    """Our logits processor for the V1 runner; it keeps the batch's guided and observed requests by row.

    The interface is described in `vllm.v1.sample.logits_processor.interface`.
    """

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        check_sampling_params(sampling_params, penalties_first=False)

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.guide = StepGuide(vllm_config, device)
        # By row: the request, its prompt, and the list of its output that vLLM itself extends.
        self._rows: dict[int, tuple[TrackedRequest, list[int], list[int]]] = {}
        self._discarded: list[bool] = []
        self._hidden: Callable[[], Tensor] | None = None
        self._spared_generators: dict[str, Any] = {}
        upstream.listen_v1(QSharpLogitsProcessor)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follows the changes of the batch; called once a step, before the reference's forward pass."""
        if batch_update is not None:
            self._update_rows(batch_update)
        if self.guide.device.type == "cpu":  # where scheduling is not asynchronous, so that all tokens are known
            self.guide.catch_up(self._rows_now())

    def _update_rows(self, batch_update: BatchUpdate) -> None:
        before = {id(entry[0]): entry[0] for entry in self._rows.values()}
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, prompt, output in batch_update.added:
            self._rows.pop(index, None)  # `added` may replace a row that is in use
            request = self.guide.open(params, resumed=bool(output))
            if request is not None:
                if prompt is None:
                    self.guide.fail(request, "prompt_embeds", "the critic reads token ids, and the prompt has none")
                self._rows[index] = (request, prompt or [], output)
        for source, target, direction in batch_update.moved:
            moved, other = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if other is not None and direction == MoveDirectionality.SWAP:
                self._rows[source] = other  # a one-way move drops the target's occupant
        kept = {id(entry[0]) for entry in self._rows.values()}
        for key, request in before.items():
            if key not in kept:
                self.guide.close(request)

    def release_ended(self, runner: Any) -> None:
        """Does nothing: `update_state` is told of every request that ends."""

    def before_sample(self, runner: Any, hidden: Callable[[], Tensor]) -> None:
        self._hidden = hidden
        self._discarded = upstream.discarded_rows_v1(runner)
        if self.guide.device.type == "cpu":
            upstream.spare_cpu_generators_v1(runner, self._spared_generators)

    def apply(self, logits: Tensor) -> Tensor:
        rows = [row for row in self._rows_now() if not self._discarded[row.index]]
        for row in rows:
            # vLLM replaces placeholders of asynchronous scheduling just before this. One that is left (vLLM issue
            # 52461) would guide by a token that was never sampled.
            output = self._rows[row.index][2]
            if output and output[-1] < 0:
                self.guide.fail(row.request, "placeholder_token", "vLLM does not know which token was sampled last")
        assert self._hidden is not None
        self.guide.apply(logits, rows, self._hidden)
        return logits

    def _rows_now(self) -> list[LogitsRow]:
        return [
            LogitsRow(index, request, len(prompt) + len(output), partial(add, prompt, output))
            for index, (request, prompt, output) in sorted(self._rows.items())
        ]

    def after_sample(self, sampled_token_ids: Tensor) -> None:
        self._hidden = None  # large, and overwritten by the next step
        self.guide.report(sampled_token_ids)
