"""What peers share: the tilt, added to the logits as the definition says."""

from torch import Tensor

from qsharp_core.returns import ReturnDistribution


def tilted(
    logits_RV: Tensor, ids_RK: Tensor, outputs: Tensor, distribution: ReturnDistribution, eta_R: Tensor
) -> Tensor:
    """Logits at temperature 1 with the candidates' tilts added, all other tokens as if they earned the least reward.

    Args:
        ids_RK: candidates.
        outputs: `[R, K, n_out]`, the critic's.
        eta_R: float64.
    """
    low, high = distribution.reward_range
    tilt_RK = distribution.relative_tilt(outputs.double(), eta_R[:, None]).to(logits_RV.dtype)
    floor_R = ((low - high) / eta_R).to(logits_RV.dtype)
    return (logits_RV + floor_R[:, None]).scatter(1, ids_RK, logits_RV.gather(1, ids_RK) + tilt_RK)
