"""What peers share: the tilt, added to the logits as the definition says."""

import torch
from torch import Tensor

from qsharp_core.returns import ReturnDistribution


def tilted(
    logits_RV: Tensor,
    ids_RK: Tensor,
    outputs: Tensor,
    distribution: ReturnDistribution,
    eta_R: Tensor,
    min_prob: float = 0.0,
) -> Tensor:
    """Logits at temperature 1 with the candidates' tilts added, all other tokens as if they earned the least reward.

    Args:
        ids_RK: candidates.
        outputs: `[R, K, n_out]`, the critic's.
        eta_R: float64.
        min_prob: what is less likely is no candidate; a row of which one is left stays as it is.
    """
    low, high = distribution.reward_range
    tilt_RK = distribution.relative_tilt(outputs.double(), eta_R[:, None]).to(logits_RV.dtype)
    floor_R = ((low - high) / eta_R).to(logits_RV.dtype)
    if min_prob == 0:
        return (logits_RV + floor_R[:, None]).scatter(1, ids_RK, logits_RV.gather(1, ids_RK) + tilt_RK)
    weighed_RK = logits_RV.softmax(-1).gather(1, ids_RK) >= min_prob
    tilt_RK = torch.where(weighed_RK, tilt_RK, floor_R[:, None])
    guided_RV = (logits_RV + floor_R[:, None]).scatter(1, ids_RK, logits_RV.gather(1, ids_RK) + tilt_RK)
    return torch.where(weighed_RK.sum(1, keepdim=True) > 1, guided_RV, logits_RV)
