"""The guided policy: candidates, tail, tilt to logits, KL. Pure functions on tensors.

    pi(y|x) ∝ ref(y|x) · exp(A(x, y))          ref = softmax(l / T)          (Theorem 2.2)

`A` is known for the candidates `C(x)`; every token outside (the tail) gets one common `A_tail`. So the tail enters
every sum as a single term, its probability times `exp(A_tail)`, and KL and value are exact over the whole vocabulary.

All tilts here are *relative*: `A - r_max / eta` (see `qsharp_core.returns`); `value` adds `r_max` back.

Shapes: R rows (one next-token decision each), V vocabulary, K most candidates of any row. Quantities per row and
candidate are float64: there are few of them, and at large `eta` the value is `eta` times a difference of 1e-6.
"""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

CHUNK = 128  # tokens whose maximum `largest` looks at


class Tail(IntEnum):
    """What happens to tokens outside the candidates (DESIGN: per request)."""

    FLOOR = 0  # as if they earned the least reward: A = r_min / eta
    KEEP = 1  # their total mass stays as it was
    DROP = 2  # excluded


class Method(IntEnum):
    """Which tilt is applied to the critic's distribution."""

    QSHARP = 0  # A = ln E[exp(z / eta)]
    CD = 1  # A = E[z] / eta (Controlled Decoding, arXiv 2310.17022)


@dataclass(frozen=True)
class Candidates:
    """The tokens whose tilt is asked of the critic.

    Attributes:
        log_ref_RV: `ln ref(y|x)`, float32, `-inf` where vLLM has masked a token.
        ids_RK: token ids, most likely first, int64.
        log_ref_RK: `ln ref` of these, float64.
        mask_RK: which are candidates; rows that are not guided have none.
    """

    log_ref_RV: Tensor
    ids_RK: Tensor
    log_ref_RK: Tensor
    mask_RK: Tensor


@dataclass(frozen=True)
class GuidedStep:
    """One step's guided policy, relative to the reference.

    Attributes:
        log_ratio_RK: `ln pi(y|x) - ln ref(y|x)` of the candidates, float64.
        tail_log_ratio_R: the same for every token outside; `-inf` when dropped.
        kl_R: `KL(pi || ref)` in nats.
        value_R: `V(x) = eta · ln E_ref[exp A]` in units of reward; NaN for rows that are not guided.
    """

    log_ratio_RK: Tensor
    tail_log_ratio_R: Tensor
    kl_R: Tensor
    value_R: Tensor


def effective_temperature(temperature_R: Tensor) -> Tensor:
    """`T`, and 1 for greedy rows (`T = 0`): they weigh as at `T = 1` and then take the argmax."""
    return torch.where(temperature_R == 0, torch.ones_like(temperature_R), temperature_R)


def largest(values_RV: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """`topk`, for large vocabularies on CPUs: torch walks them an element at a time there.

    The `most` largest lie in the `most` chunks with the largest maxima, which a vectorised pass finds. Of equal values
    any may be taken, as by `topk`.
    """
    rows, vocab = values_RV.shape
    chunks = vocab // CHUNK
    if values_RV.device.type != "cpu" or chunks < 4 * most:
        return torch.topk(values_RV, min(most, vocab), dim=-1)
    chunked_RCS = values_RV[:, : chunks * CHUNK].view(rows, chunks, CHUNK)
    picked_RK = chunked_RCS.amax(-1).topk(most, dim=-1).indices
    offset_S = torch.arange(CHUNK, device=values_RV.device)
    rest = torch.arange(chunks * CHUNK, vocab, device=values_RV.device).expand(rows, -1)
    ids_RN = torch.cat([(picked_RK[..., None] * CHUNK + offset_S).flatten(1), rest], dim=1)
    top_RK, place_RK = values_RV.gather(1, ids_RN).topk(most, dim=-1)
    return top_RK, ids_RN.gather(1, place_RK)


def select_candidates(
    logits_RV: Tensor, temperature_R: Tensor | None, candidates_R: Tensor, min_prob_R: Tensor, most: int
) -> Candidates:
    """`C(x)`: the most likely tokens of `ref`, less those below `min_prob`; a single one is none.

    Args:
        logits_RV: float32, after vLLM's masks and biases, before temperature.
        temperature_R: float32, `0` for greedy; None where all are 0 or 1.
        candidates_R: how many at the most, int64; `0` for a row that is not guided.
        min_prob_R: least reference probability of a candidate, float64.
        most: the largest of `candidates_R`, known on the host.
    """
    if temperature_R is not None:
        logits_RV = logits_RV / effective_temperature(temperature_R).to(logits_RV.dtype)[:, None]
    log_ref_RV = logits_RV.log_softmax(-1)
    top, ids_RK = largest(log_ref_RV, most)
    log_ref_RK = top.double()
    rank_K = torch.arange(ids_RK.shape[1], device=logits_RV.device)
    mask_RK = (rank_K < candidates_R[:, None]) & (log_ref_RK > float("-inf"))
    mask_RK &= log_ref_RK.exp() >= min_prob_R[:, None]
    mask_RK &= (mask_RK.sum(-1) > 1)[:, None]
    return Candidates(log_ref_RV, ids_RK, log_ref_RK, mask_RK)


def guide(
    candidates: Candidates,
    tilt_RK: Tensor,
    eta_R: Tensor,
    tail_R: Tensor,
    reward_min_R: Tensor,
    reward_max_R: Tensor,
) -> GuidedStep:
    """The guided policy of one step.

    Args:
        candidates: of `select_candidates`.
        tilt_RK: relative tilts of the candidates, float64; entries outside the mask are not read.
        eta_R: float64, positive; any positive number in rows that are not guided.
        tail_R: `Tail` codes.
        reward_min_R, reward_max_R: the reward's range, float64.
    """
    none = float("-inf")
    mask_RK = candidates.mask_RK
    guided_R = mask_RK.any(-1)
    log_ref_RK = candidates.log_ref_RK.masked_fill(~mask_RK, none)
    tilt_RK = tilt_RK.masked_fill(~mask_RK, 0.0)

    log_mass_R, tilted_R = torch.stack([log_ref_RK, log_ref_RK + tilt_RK]).logsumexp(-1)
    # Candidates may hold all the mass to within rounding; then the tail has none.
    log_tail_mass_R = torch.log1p(-log_mass_R.exp().clamp(max=1.0))
    tail_tilt_R = torch.where(tail_R == Tail.KEEP, tilted_R - log_mass_R, (reward_min_R - reward_max_R) / eta_R)
    tail_tilt_R = tail_tilt_R.masked_fill(tail_R == Tail.DROP, none)

    log_norm_R = torch.logaddexp(tilted_R, log_tail_mass_R + tail_tilt_R)  # ln E_ref[e^A], relative
    log_ratio_RK = tilt_RK - log_norm_R[:, None]
    tail_log_ratio_R = tail_tilt_R - log_norm_R
    kl_R = _expectation(log_ref_RK, log_ratio_RK).sum(-1) + _expectation(log_tail_mass_R, tail_log_ratio_R)
    value_R = eta_R * log_norm_R + reward_max_R

    return GuidedStep(
        log_ratio_RK=torch.where(mask_RK, log_ratio_RK, 0.0),
        tail_log_ratio_R=torch.where(guided_R, tail_log_ratio_R, 0.0),
        kl_R=torch.where(guided_R, kl_R.clamp(min=0.0), 0.0),
        value_R=value_R.masked_fill(~guided_R, float("nan")),
    )


def _expectation(log_ref: Tensor, log_ratio: Tensor) -> Tensor:
    """`pi · ln(pi / ref)`, and 0 where `pi` is 0."""
    prob = (log_ref + log_ratio).exp()
    return torch.where(prob > 0, prob * log_ratio, 0.0)


def guide_logits_(logits_RV: Tensor, temperature_R: Tensor, candidates: Candidates, step: GuidedStep) -> Tensor:
    """Makes the tempered softmax of the logits `pi`: `l += T · ln(pi / ref)`, so vLLM's later division by `T` is exact.

    `-inf` stays. In place, because the vocabulary is large: `[R, V]`, float32; returned, too.
    """
    temperature_R = effective_temperature(temperature_R).double()
    shift_RK = (temperature_R[:, None] * step.log_ratio_RK).to(logits_RV.dtype)
    tail_shift_R = (temperature_R * step.tail_log_ratio_R).to(logits_RV.dtype)
    moved_RK = logits_RV.gather(1, candidates.ids_RK) + torch.where(candidates.mask_RK, shift_RK, tail_shift_R[:, None])
    return logits_RV.add_(tail_shift_R[:, None]).scatter_(1, candidates.ids_RK, moved_RK)


def token_logprobs(candidates: Candidates, step: GuidedStep, tokens_R: Tensor) -> tuple[Tensor, Tensor]:
    """`ln ref` and `ln pi` of one token per row (before top-p and top-k), float64 `[R]` each."""
    log_ref_R = candidates.log_ref_RV.gather(1, tokens_R[:, None])[:, 0].double()
    hit_RK = (candidates.ids_RK == tokens_R[:, None]) & candidates.mask_RK
    in_candidates_R = hit_RK.any(-1)
    log_ratio_R = torch.where(in_candidates_R, (step.log_ratio_RK * hit_RK).sum(-1), step.tail_log_ratio_R)
    return log_ref_R, log_ref_R + log_ratio_R
