"""Logits processor for vLLM's V2 model runner, the default on GPUs.

    vllm serve MODEL --logits-processors qsharp_core.vllm_plugin.v2:QSharpLogitsProcessor …

Requests are kept by slot. A row's history is `all_token_ids[slot, : pos + 1]`; at `apply` it includes the token that
the step before sampled. Behind it, up to `total_len`, may be the rest of a prompt that is still being prefilled.

A critic that runs in fixed shapes gets the last token of each row on the device. Its histories are read, which waits
for the device, only for new requests. A critic that cannot run in fixed shapes reads histories at every step.
"""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from vllm.v1.worker.gpu.sample.logits_processor import (
    LogitsContext,
    LogitsProcessor,
    LogitsProcRequestState,
)

from qsharp_core.vllm_plugin import upstream
from qsharp_core.vllm_plugin.params import check_sampling_params


class _History:
    """The tokens of a step's rows, read from the device all together when the first row is read."""

    def __init__(self, all_token_ids: Tensor, slots: list[int], longest: int) -> None:
        self._all_token_ids, self._slots, self._longest = all_token_ids, slots, longest

    @cached_property
    def _tokens(self) -> list[list[int]]:
        return self._all_token_ids[self._slots, : self._longest].tolist()

    def read(self, row: int, length: int) -> list[int]:
        return self._tokens[row][:length]


class QSharpLogitsProcessor(LogitsProcessor):
    """Our logits processor for the V2 runner; it keeps guided and observed requests by slot.

    The interface is described in `vllm.v1.worker.gpu.sample.logits_processor.interface`.
    """

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        check_sampling_params(sampling_params, penalties_first=True)

    def __init__(self, vllm_config: Any, req_states: LogitsProcRequestState) -> None:
        # The front end imports this module, too, to validate requests: it should not import all that critics need.
        from qsharp_core.vllm_plugin.rows import TrackedRequest
        from qsharp_core.vllm_plugin.step import StepGuide

        self.guide = StepGuide(vllm_config, req_states.device)
        self._states = req_states
        self._slots: dict[int, TrackedRequest] = {}
        self._hidden: Callable[[], Tensor] | None = None
        upstream.listen_v2(QSharpLogitsProcessor)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        self._close(req_idx)
        resumed = self._states.prefill_len.np[req_idx] > self._states.prompt_len.np[req_idx]
        request = self.guide.open(sampling_params, resumed=bool(resumed))
        if request is not None:
            self._slots[req_idx] = request
        return request is not None

    def release_ended(self, runner: Any) -> None:
        """Closes requests that the runner no longer knows: its interface does not tell when a request ends."""
        for slot in self._slots.keys() - upstream.occupied_slots_v2(runner):
            self._close(slot)

    def before_sample(self, runner: Any, hidden: Callable[[], Tensor]) -> None:
        self._hidden = hidden
        self.release_ended(runner)

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        from qsharp_core.transfer import to_device
        from qsharp_core.vllm_plugin.rows import LogitsRow

        slots = ctx.idx_mapping_np.tolist()
        # Without speculative decoding a request has one row, and this bound is exact.
        lengths = ctx.seq_lens_upper_bound_np[: len(slots)].tolist()
        prefill_len = self._states.prefill_len.np
        places = [  # the sample of a row that is still being prefilled is discarded
            (index, slot, length)
            for index, (slot, length) in enumerate(zip(slots, lengths, strict=True))
            if slot in self._slots and length >= prefill_len[slot]
        ]
        if places:
            tokens = self._states.all_token_ids.gpu
            at = to_device(torch.tensor([(slot, length - 1) for _, slot, length in places]).T, tokens.device)
            history = _History(tokens, [slot for _, slot, _ in places], max(length for _, _, length in places))
            rows = [
                LogitsRow(
                    index, self._slots[slot], length, partial(history.read, i, length), tokens[slot, :length].clone
                )
                for i, (index, slot, length) in enumerate(places)
            ]
            assert self._hidden is not None
            self.guide.apply(logits, rows, self._hidden, tokens[at[0], at[1]].long())
        return logits

    def after_sample(self, sampled_token_ids: Tensor) -> None:
        self._hidden = None  # large, and overwritten by the next step
        self.guide.report(sampled_token_ids)

    def _close(self, slot: int) -> None:
        request = self._slots.pop(slot, None)
        if request is not None:
            self.guide.close(request)
