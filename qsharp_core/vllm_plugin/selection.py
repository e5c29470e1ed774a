"""Candidates from the whole vocabulary: on CPUs the largest part of what a guided step computes, so two cores share it.

The reference's forward pass has ended when candidates are chosen, and the core that vLLM leaves over is idle.
"""

from concurrent.futures import Executor

import torch
from torch import Tensor

from qsharp_core import policy
from qsharp_core.policy import Candidates

# Logits from which on sharing gains: a thread takes some 0.05 ms to begin, and in this time one core normalises these.
LEAST_LOGITS = 200_000


class Selector:
    """Chooses candidates.

    Args:
        beside: a thread on another core, which takes half of the rows; None where there is none.
    """

    def __init__(self, beside: Executor | None) -> None:
        self._beside = beside

    def select(self, logits_RV: Tensor, temperature_R: Tensor | None, least_RK: Tensor) -> Candidates:
        """As `policy.select_candidates`."""
        rows = len(logits_RV)
        if self._beside is None or rows < 2 or logits_RV.numel() < LEAST_LOGITS:
            return policy.select_candidates(logits_RV, temperature_R, least_RK)
        log_ref_RV = torch.empty_like(logits_RV)

        def part(start: int, end: int) -> Candidates:
            temperatures = None if temperature_R is None else temperature_R[start:end]
            with torch.inference_mode():  # which each thread enters for itself
                return policy.select_candidates(
                    logits_RV[start:end], temperatures, least_RK[start:end], log_ref_RV[start:end]
                )

        others = self._beside.submit(part, rows // 2, rows)
        own = part(0, rows // 2)
        columns = zip(*((c.ids_RK, c.log_ref_RK, c.mask_RK) for c in (own, others.result())), strict=True)
        return Candidates(log_ref_RV, *map(torch.cat, columns))
