"""Logits processor for vLLM's V2 model runner, the default on GPUs.

    vllm serve MODEL --logits-processors qsharp_core.vllm_plugin.v2:QSharpLogitsProcessor …

Requests are kept by slot. A row's history is `all_token_ids[slot, : pos + 1]`, which at `apply` includes the token
sampled in the step before; up to `total_len` it may hold the rest of a prompt that is still being prefilled.

Reading the history synchronises with the device once a step.
"""

from typing import Any

from torch import Tensor
from vllm.v1.worker.gpu.sample.logits_processor import (
    LogitsContext,
    LogitsProcessor,
    LogitsProcRequestState,
)

from qsharp_core.vllm_plugin import upstream
from qsharp_core.vllm_plugin.params import check_sampling_params


class QSharpLogitsProcessor(LogitsProcessor):
    """Keeps the guided requests by slot; see `vllm.v1.worker.gpu.sample.logits_processor.interface`."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        check_sampling_params(sampling_params, penalties_first=True)

    def __init__(self, vllm_config: Any, req_states: LogitsProcRequestState) -> None:
        # The front end imports this module too, to validate requests: it shall not pay for the engine.
        from qsharp_core.vllm_plugin.core import GuidanceCore, Request

        self.core = GuidanceCore(vllm_config, req_states.device)
        self._states = req_states
        self._slots: dict[int, Request] = {}
        upstream.listen_v2(QSharpLogitsProcessor)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        self._close(req_idx)
        request = self.core.open(sampling_params)
        if request is not None:
            self._slots[req_idx] = request
        return request is not None

    def release_ended(self, runner: Any) -> None:
        """This interface has no removal hook: what the runner no longer knows has ended."""
        for slot in self._slots.keys() - upstream.occupied_slots_v2(runner):
            self._close(slot)

    def before_sample(self, runner: Any) -> None:
        self.release_ended(runner)

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        from qsharp_core.vllm_plugin.core import Row

        slots = ctx.idx_mapping_np.tolist()
        # Without speculative decoding a request has one row, and this bound is exact.
        lengths = ctx.seq_lens_upper_bound_np[: len(slots)].tolist()
        prefill_len = self._states.prefill_len.np
        rows = [  # a row before the end of its (re)fill gets a sample that is discarded
            (index, slot, length)
            for index, (slot, length) in enumerate(zip(slots, lengths, strict=True))
            if slot in self._slots and length >= prefill_len[slot]
        ]
        if rows:
            tokens = self._states.all_token_ids.gpu[[slot for _, slot, _ in rows], : max(n for _, _, n in rows)]
            histories = tokens.tolist()
            self.core.apply(
                logits,
                [
                    Row(index, self._slots[slot], history[:length])
                    for (index, slot, length), history in zip(rows, histories, strict=True)
                ],
            )
        return logits

    def after_sample(self, sampled_token_ids: Tensor) -> None:
        self.core.report(sampled_token_ids)

    def _close(self, slot: int) -> None:
        request = self._slots.pop(slot, None)
        if request is not None:
            self.core.close(request)
