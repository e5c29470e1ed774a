"""Keeps a guided step within a budget of KL divergence from the reference. Pure functions on tensors.

    pi_a(y|x) ∝ ref(y|x) · exp(a · A(x, y)),   0 ≤ a ≤ 1

`a = 1` is the guided policy of `qsharp_core.policy`, and `a = 0` is the reference. Along this line
`d KL(pi_a || ref) / da = a · Var_{pi_a}(A) ≥ 0`, whatever the critic answered, so the largest `a` within a budget can
be bracketed. Along `eta` it cannot: of categorical critics KL is not monotone in it. docs/method.md ("Budgets") has the
derivation.

Shapes: R rows, K most candidates of any row, P points that are looked at together.
"""

import math

import torch
from torch import Tensor

from qsharp_core.policy import Candidates, GuidedStep

POINTS = 32  # of the bracket that are looked at together
ROUNDS = 6  # after one that brackets `a` by its power of two; the bracket ends 32^-6 = 1e-9 of `a` wide
# Nats. With less than this left, a step is the reference's: the strength would go with the square root of what is left,
# and so with the rounding of what was spent.
DUST = 1e-7


def clip(candidates: Candidates, step: GuidedStep, budget_R: Tensor) -> tuple[GuidedStep, Tensor]:
    """The guided policy of the largest `a` whose KL divergence is within the budget.

    Args:
        candidates: see `policy.select_candidates`.
        step: of `policy.guide`, which is the policy of `a = 1`.
        budget_R: nats, float64, at least 0; infinite in rows without a budget.

    Returns:
        The step and `a`, float64, `[R]`. Rows within their budget stay as they are. The value stays the critic's.
    """
    over_R = step.kl_R > budget_R
    if budget_R.device.type == "cpu" and not over_R.any():  # elsewhere looking would mean to wait
        return step, torch.ones_like(budget_R)
    mask_RK = candidates.mask_RK
    log_ref_RK = candidates.log_ref_RK.masked_fill(~mask_RK, -math.inf)
    log_tail_R = torch.log1p(-log_ref_RK.logsumexp(-1).exp().clamp(max=1.0))
    log_ref_RC = torch.cat([log_ref_RK, log_tail_R[:, None]], dim=1)
    # `A` up to a constant, which changes no policy. What cannot be drawn under `a = 1` cannot under any `a > 0`.
    tilt_RC = torch.cat([step.log_ratio_RK.masked_fill(~mask_RK, 0.0), step.tail_log_ratio_R[:, None]], dim=1)

    search_R = over_R & (budget_R > DUST)
    if budget_R.device.type == "cpu":  # few rows are at their edge at once
        low_R = torch.zeros_like(budget_R)
        if search_R.any():
            low_R[search_R] = _strongest(log_ref_RC[search_R], tilt_RC[search_R], budget_R[search_R])
    else:
        low_R = torch.where(search_R, _strongest(log_ref_RC, tilt_RC, budget_R), 0.0)
    strength_R = torch.where(over_R, low_R, 1.0)

    scaled_RPC, kl_RP = tilted(log_ref_RC, tilt_RC, low_R[:, None])
    scaled_RC, kl_R = scaled_RPC[:, 0], kl_RP[:, 0].minimum(budget_R)  # to within rounding it is
    tail_R = torch.where(over_R, scaled_RC[:, -1], step.tail_log_ratio_R)
    log_ratio_RK = torch.where(mask_RK, scaled_RC[:, :-1], tail_R[:, None])
    return (
        GuidedStep(
            log_ratio_RK=torch.where(over_R[:, None], log_ratio_RK, step.log_ratio_RK),
            tail_log_ratio_R=tail_R,
            kl_R=torch.where(over_R, kl_R, step.kl_R),
            value_R=step.value_R,
        ),
        strength_R,
    )


def _strongest(log_ref_RC: Tensor, tilt_RC: Tensor, budget_R: Tensor) -> Tensor:
    """The largest strength within the budget, from below, `[R]`; arguments as in `tilted`.

    With `Z = E_ref[exp(a·A)]`, KL is `a · E_{pi_a}[A] - ln Z`: for all points together one exponential and one product.
    """
    drawn_RC = (log_ref_RC > -math.inf) & (tilt_RC > -math.inf)
    log_ref_RC = log_ref_RC.masked_fill(~drawn_RC, -math.inf)
    best_R1 = tilt_RC.masked_fill(~drawn_RC, -math.inf).amax(-1, keepdim=True)
    tilt_RC = (tilt_RC - best_R1).masked_fill(~drawn_RC, 0.0)
    sums_RC2 = torch.stack([torch.ones_like(tilt_RC), tilt_RC], dim=-1)
    edges_P = torch.arange(-POINTS, 1, dtype=budget_R.dtype, device=budget_R.device).exp2()
    edges_P[0] = 0.0
    low_R, width_R = torch.zeros_like(budget_R), torch.ones_like(budget_R)
    for _ in range(1 + ROUNDS):
        at_RP = low_R[:, None] + width_R[:, None] * edges_P[1:-1]
        weight_RPC = torch.baddbmm(log_ref_RC[:, None], at_RP[..., None], tilt_RC[:, None])
        most_RP1 = weight_RPC.amax(-1, keepdim=True)  # a reference's probability may be below the least float
        norm_RP, first_RP = (weight_RPC.sub_(most_RP1).exp_() @ sums_RC2).unbind(-1)
        kl_RP = at_RP * first_RP / norm_RP - norm_RP.log() - most_RP1[..., 0]
        within_R = (kl_RP <= budget_R[:, None]).sum(-1)  # KL grows with `a`: they are the first ones
        low_R, width_R = low_R + width_R * edges_P[within_R], width_R * edges_P.diff()[within_R]
        edges_P = torch.linspace(0, 1, POINTS + 1, dtype=budget_R.dtype, device=budget_R.device)
    return low_R


def tilted(log_ref_RC: Tensor, tilt_RC: Tensor, strength_RP: Tensor) -> tuple[Tensor, Tensor]:
    """`ln(pi_a / ref)`, `[R, P, C]`, and `KL(pi_a || ref)` in nats, `[R, P]`, float64.

    Args:
        log_ref_RC: `ln ref` of the candidates and of the whole tail, `[R, K + 1]`, float64; `-inf` is no candidate.
        tilt_RC: `A` of these, up to a constant, float64; `-inf` for a tail that is dropped.
        strength_RP: `a`, at least 0. At 0 the policy is the reference, and a dropped tail stays.
    """
    none_RP1 = (strength_RP == 0)[..., None]
    scaled_RPC = torch.where(none_RP1, 0.0, strength_RP[..., None] * tilt_RC[:, None])
    log_norm_RP1 = (log_ref_RC[:, None] + scaled_RPC).logsumexp(-1, keepdim=True)
    log_ratio_RPC = torch.where(none_RP1, 0.0, scaled_RPC - log_norm_RP1)  # exactly: a budget may be used up
    probability_RPC = (log_ref_RC[:, None] + log_ratio_RPC).exp()
    lowest = torch.finfo(tilt_RC.dtype).min
    return log_ratio_RPC, (probability_RPC * log_ratio_RPC.clamp(min=lowest)).sum(-1).clamp(min=0.0)
