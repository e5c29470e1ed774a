"""The guided policy: candidates, tail, tilt to logits, KL. Pure functions on tensors.

    pi(y|x) ∝ ref(y|x) · exp(A(x, y))          ref = softmax(l / T)          (Theorem 2.2)

`A` is known for the candidates `C(x)`; every token outside (the tail) gets one common `A_tail`. So the tail enters
every sum as a single term, its probability times `exp(A_tail)`, and KL and value are exact over the whole vocabulary.

All tilts here are *relative*: `A - r_max / eta` (see `qsharp_core.returns`); `value` adds `r_max` back.

Shapes: R rows (one next-token decision each), V vocabulary, K most candidates of any row. Quantities per row and
candidate are float64: there are few of them, and at large `eta` the value is `eta` times a difference of 1e-6.
"""

import math
from collections.abc import Sequence
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
        log_ratio_RK: `ln pi(y|x) - ln ref(y|x)` of the likeliest tokens, float64: of the candidates, and of those among
            them that are none as of every token outside.
        tail_log_ratio_R: of every token outside; `-inf` when dropped.
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


def least_log_ref(candidates: Sequence[int], min_prob: Sequence[float], most: int) -> Tensor:
    """What `ln ref` must be at the least for a token to be a candidate, by its rank: `[R, most]`, float64.

    Args:
        candidates: how many there are at the most in each row; 0 in one that is not guided.
        min_prob: least reference probability of a candidate in each row.
        most: of `candidates`.
    """
    # A token that vLLM has masked, at -inf, is none even where any probability will do.
    least = [math.log(p) if p > 0 else torch.finfo(torch.float64).min for p in min_prob]
    rows = [[bound] * count + [math.inf] * (most - count) for bound, count in zip(least, candidates, strict=True)]
    return torch.tensor(rows, dtype=torch.float64)


def tail_tilt(tail: Tail, eta: float, reward_range: tuple[float, float]) -> float:
    """Relative tilt of the tokens outside the candidates; 0 for `KEEP`, where it follows from the step."""
    low, high = reward_range
    return {Tail.FLOOR: (low - high) / eta, Tail.KEEP: 0.0, Tail.DROP: -math.inf}[tail]


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
    picked_RK = chunked_RCS.amax(-1).topk(most, dim=-1, sorted=False).indices
    found_RN = chunked_RCS[torch.arange(rows)[:, None], picked_RK].flatten(1)
    if vocab % CHUNK:  # tokens behind the last whole chunk are as if theirs were picked as well
        found_RN = torch.cat([found_RN, values_RV[:, chunks * CHUNK :]], dim=1)
        picked_RK = torch.cat([picked_RK, picked_RK.new_full((rows, 1), chunks)], dim=1)
    top_RK, place_RK = found_RN.topk(most, dim=-1)
    return top_RK, picked_RK.gather(1, place_RK // CHUNK) * CHUNK + place_RK % CHUNK


def select_candidates(logits_RV: Tensor, temperature_R: Tensor | None, least_RK: Tensor) -> Candidates:
    """`C(x)`: the most likely tokens of `ref`, less those below `min_prob`; a single one is none.

    Args:
        logits_RV: float32, after vLLM's masks and biases, before temperature.
        temperature_R: effective ones; None where all are 1.
        least_RK: of `least_log_ref`.
    """
    if temperature_R is not None:
        logits_RV = logits_RV / temperature_R.to(logits_RV.dtype)[:, None]
    log_ref_RV = logits_RV.log_softmax(-1)
    top, ids_RK = largest(log_ref_RV, least_RK.shape[1])
    log_ref_RK = top.double()
    mask_RK = log_ref_RK >= least_RK[:, : ids_RK.shape[1]]
    # They are sorted: where there are two, the second is one.
    choice_R1 = mask_RK[:, 1:2] if ids_RK.shape[1] > 1 else mask_RK.new_zeros(1)
    return Candidates(log_ref_RV, ids_RK, log_ref_RK, mask_RK & choice_R1)


def guide(
    candidates: Candidates, tilt_RK: Tensor, eta_R: Tensor, keep_R: Tensor, tail_tilt_R: Tensor, reward_max_R: Tensor
) -> GuidedStep:
    """The guided policy of one step. Every operation counts here: on a GPU each is a kernel, and a step has 40 of them.

    Args:
        candidates: of `select_candidates`.
        tilt_RK: relative tilts of the candidates, float64; entries outside the mask are not read.
        eta_R: float64, positive; any positive number in rows that are not guided.
        keep_R: rows whose tail is `Tail.KEEP`.
        tail_tilt_R: of `tail_tilt`, float64; not read in rows of `keep_R`.
        reward_max_R: the greatest reward, float64.
    """
    mask_RK = candidates.mask_RK
    guided_R = mask_RK.any(-1)
    log_ref_RK = candidates.log_ref_RK.masked_fill(~mask_RK, -math.inf)
    tilt_RK = torch.where(mask_RK, tilt_RK, 0.0)

    log_mass_R, tilted_R = torch.stack([log_ref_RK, log_ref_RK + tilt_RK]).logsumexp(-1)
    # Candidates may hold all the mass to within rounding; then the tail has none.
    log_tail_mass_R = torch.log1p(-log_mass_R.exp().clamp(max=1.0))
    tail_tilt_R = torch.where(keep_R, tilted_R - log_mass_R, tail_tilt_R)

    log_norm_R = torch.logaddexp(tilted_R, log_tail_mass_R + tail_tilt_R)  # ln E_ref[e^A], relative
    log_ratio_RK = tilt_RK - log_norm_R[:, None]
    tail_log_ratio_R = tail_tilt_R - log_norm_R
    # pi · ln(pi / ref), and 0 where pi is 0. Only a dropped tail's ratio is infinite.
    kl_R = ((log_ref_RK + log_ratio_RK).exp() * log_ratio_RK).sum(-1)
    lowest = torch.finfo(torch.float64).min
    kl_R += (log_tail_mass_R + tail_log_ratio_R).exp() * tail_log_ratio_R.clamp(min=lowest)

    tail_log_ratio_R = torch.where(guided_R, tail_log_ratio_R, 0.0)
    return GuidedStep(
        log_ratio_RK=torch.where(mask_RK, log_ratio_RK, tail_log_ratio_R[:, None]),
        tail_log_ratio_R=tail_log_ratio_R,
        kl_R=torch.where(guided_R, kl_R.clamp(min=0.0), 0.0),
        value_R=torch.where(guided_R, torch.addcmul(reward_max_R, eta_R, log_norm_R), math.nan),
    )


def guide_logits_(logits_RV: Tensor, temperature_R: Tensor, candidates: Candidates, step: GuidedStep) -> Tensor:
    """Makes the tempered softmax of the logits `pi`: `l += T · ln(pi / ref)`, so vLLM's later division by `T` is exact.

    `-inf` stays. In place, because the vocabulary is large: `[R, V]`, float32; returned, too.

    Args:
        logits_RV: as they were given to `select_candidates`.
        temperature_R: effective ones, float64.
        candidates, step: of `select_candidates` and `guide`.
    """
    moved_RK = logits_RV.gather(1, candidates.ids_RK).add_(temperature_R[:, None] * step.log_ratio_RK)
    tail_shift_R = (temperature_R * step.tail_log_ratio_R).to(logits_RV.dtype)
    return logits_RV.add_(tail_shift_R[:, None]).scatter_(1, candidates.ids_RK, moved_RK)


def token_logprobs(candidates: Candidates, step: GuidedStep, tokens_R: Tensor) -> tuple[Tensor, Tensor]:
    """`ln ref` and `ln pi` of one token per row (before top-p and top-k), float64 `[R]` each."""
    log_ref_R = candidates.log_ref_RV.gather(1, tokens_R[:, None])[:, 0].double()
    hit_RK = candidates.ids_RK == tokens_R[:, None]
    log_ratio_R = torch.where(hit_RK, step.log_ratio_RK, 0.0).sum(-1)  # of one token at the most
    log_ratio_R = torch.where(hit_RK.any(-1), log_ratio_R, step.tail_log_ratio_R)
    return log_ref_R, log_ref_R + log_ratio_R
