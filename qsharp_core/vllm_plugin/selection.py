"""Selects candidates from the whole vocabulary. On CPUs this is most of the work of a guided step; two cores share it.

When candidates are selected, the reference's forward pass has ended and the core that vLLM leaves over is idle.
"""

from concurrent.futures import Executor

import torch
from torch import Tensor

from qsharp_core import policy
from qsharp_core.policy import Candidates

# Sharing gains from so many logits on: a thread takes some 0.05 ms to begin, and one core normalises these meanwhile.
LEAST_LOGITS = 200_000


class CandidateSelector:
    """Selects candidates.

    Args:
        other_core: a thread on another core, which takes half of the rows; None if there is none.
    """

    def __init__(self, other_core: Executor | None) -> None:
        self._other_core = other_core

    def select(self, logits_RV: Tensor, temperature_R: Tensor | None, least_RK: Tensor) -> Candidates:
        """Arguments and result are those of `policy.select_candidates`."""
        rows = len(logits_RV)
        if self._other_core is None or rows < 2 or logits_RV.numel() < LEAST_LOGITS:
            return policy.select_candidates(logits_RV, temperature_R, least_RK)
        log_ref_RV = torch.empty_like(logits_RV)

        def select_part(start: int, end: int) -> Candidates:
            temperatures = None if temperature_R is None else temperature_R[start:end]
            with torch.inference_mode():  # a mode that each thread enters on its own
                return policy.select_candidates(
                    logits_RV[start:end], temperatures, least_RK[start:end], log_ref_RV[start:end]
                )

        second = self._other_core.submit(select_part, rows // 2, rows)
        first = select_part(0, rows // 2)
        columns = zip(*((c.ids_RK, c.log_ref_RK, c.mask_RK) for c in (first, second.result())), strict=True)
        return Candidates(log_ref_RV, *map(torch.cat, columns))
