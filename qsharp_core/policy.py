"""The guided policy: candidates, tail, tilted logits, KL, value. Pure functions on tensors.

    pi(y|x) ∝ ref(y|x) · exp(A(x, y))          ref = softmax(l / T)          (Theorem 2.2)

`A` is known for the candidates `C(x)`. All other tokens, the tail, get one common `A_tail`. The tail therefore enters
every sum as a single term, its probability times `exp(A_tail)`, and KL and value are exact over the whole vocabulary.
docs/method.md derives the formulas ("Tilts", "Tails", "KL", "Value").

All tilts here are *relative*: `A - r_max / eta` (see `qsharp_core.returns`). `guide` adds `r_max` back to the value.

Shapes: R rows (one next-token decision each), V vocabulary, K most candidates of any row. Quantities per row and
candidate are float64: they are few, and at large `eta` the value is `eta` times a difference of 1e-6.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qsharp_core.returns import ReturnDistribution, relative_expected_tilt
from qsharp_core.wire.guidance import Tail

CHUNK = 128  # number of tokens in each chunk whose maximum `largest` takes


@dataclass(frozen=True)
class Candidates:
    """The tokens whose tilts the critic is asked for, in a row of K places.

    Attributes:
        log_ref_RV: `ln ref(y|x)` of the whole vocabulary, float32; `-inf` where vLLM has masked a token.
        ids_RK: token ids, most likely first, int64.
        log_ref_RK: `ln ref(y|x)` of these tokens, float64.
        mask_RK: which of these tokens are candidates, bool; rows that are not guided have none.
    """

    log_ref_RV: Tensor
    ids_RK: Tensor
    log_ref_RK: Tensor
    mask_RK: Tensor


@dataclass(frozen=True)
class GuidedStep:
    """The guided policy of one step, relative to the reference.

    Attributes:
        log_ratio_RK: `ln pi(y|x) - ln ref(y|x)` of the K likeliest tokens, float64. Those that are no candidates have
            the tail's.
        tail_log_ratio_R: `ln pi(y|x) - ln ref(y|x)` of every token of the tail, float64; `-inf` if the tail is dropped.
        kl_R: `KL(pi || ref)` in nats, float64.
        value_R: `V(x) = eta · ln E_ref[exp A]` in units of reward, float64; NaN in rows that are not guided.
    """

    log_ratio_RK: Tensor
    tail_log_ratio_R: Tensor
    kl_R: Tensor
    value_R: Tensor


def effective_temperature(temperature_R: Tensor) -> Tensor:
    """`T`, and 1 in greedy rows (`T = 0`): their policy is that of `T = 1`, of which the argmax is taken."""
    return torch.where(temperature_R == 0, torch.ones_like(temperature_R), temperature_R)


def least_log_ref(candidates: Sequence[int], min_prob: Sequence[float], most: int) -> Tensor:
    """The least `ln ref` with which the token of each rank is a candidate: `[R, most]`, float64.

    Args:
        candidates: the most candidates of each row; 0 in rows that are not guided.
        min_prob: the least reference probability of a candidate in each row.
        most: number of ranks, at least the greatest of `candidates`.
    """
    # A token that vLLM has masked has -inf, and is no candidate even where `min_prob` is 0.
    least = [math.log(p) if p > 0 else torch.finfo(torch.float64).min for p in min_prob]
    rows = [[bound] * count + [math.inf] * (most - count) for bound, count in zip(least, candidates, strict=True)]
    return torch.tensor(rows, dtype=torch.float64)


def relative_tilts(
    distribution: ReturnDistribution, outputs_RKN: Tensor, eta_R: Tensor, cd_R: Tensor | None = None
) -> Tensor:
    """Relative tilts of candidates, `[R, K]`, in the dtype of the outputs.

    Args:
        distribution: what the N outputs of each candidate mean.
        outputs_RKN: the critic's outputs.
        eta_R: of each row.
        cd_R: rows whose tilt is that of `Method.CD`, bool; None where no row's is.
    """
    tilt_RK = distribution.relative_tilt(outputs_RKN, eta_R[:, None])
    if cd_R is None:
        return tilt_RK
    expected_RK = relative_expected_tilt(distribution, outputs_RKN, eta_R[:, None])
    return torch.where(cd_R[:, None], expected_RK, tilt_RK)


def tail_tilt(tail: Tail, eta: float, reward_range: tuple[float, float]) -> float:
    """The relative tilt of the tail.

    Args:
        tail: what happens to the tail. With `KEEP` the tilt follows from the step, and 0 is returned.
        eta: of the request.
        reward_range: least and greatest reward.
    """
    low, high = reward_range
    return {Tail.FLOOR: (low - high) / eta, Tail.KEEP: 0.0, Tail.DROP: -math.inf}[tail]


def largest(values_RV: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The `most` largest values of each row and their places, as `torch.topk` returns them.

    On CPUs torch looks at a large vocabulary one element at a time. Here a vectorised pass takes the maximum of each
    chunk: the `most` largest values lie in the `most` chunks with the largest maxima. Of equal values any may be taken,
    as by `topk`.
    """
    rows, vocab = values_RV.shape
    chunks = vocab // CHUNK
    if values_RV.device.type != "cpu" or chunks < 4 * most:
        return torch.topk(values_RV, min(most, vocab), dim=-1)
    chunked_RCS = values_RV[:, : chunks * CHUNK].view(rows, chunks, CHUNK)
    picked_RK = chunked_RCS.amax(-1).topk(most, dim=-1, sorted=False).indices
    value_RN = chunked_RCS[torch.arange(rows)[:, None], picked_RK].flatten(1)
    if vocab % CHUNK:  # the tokens behind the last whole chunk are always looked at
        value_RN = torch.cat([value_RN, values_RV[:, chunks * CHUNK :]], dim=1)
        picked_RK = torch.cat([picked_RK, picked_RK.new_full((rows, 1), chunks)], dim=1)
    top_RK, place_RK = value_RN.topk(most, dim=-1)
    return top_RK, picked_RK.gather(1, place_RK // CHUNK) * CHUNK + place_RK % CHUNK


def select_candidates(logits_RV: Tensor, temperature_R: Tensor | None, least_RK: Tensor) -> Candidates:
    """Selects `C(x)`: the most likely tokens of `ref` that are at least as likely as `min_prob`.

    A row with a single such token has no candidates: there is no choice to guide.

    Args:
        logits_RV: float32, after vLLM's masks and biases, before temperature.
        temperature_R: effective temperatures; None where all are 1.
        least_RK: see `least_log_ref`.
    """
    if temperature_R is not None:
        logits_RV = logits_RV / temperature_R.to(logits_RV.dtype)[:, None]
    log_ref_RV = logits_RV.log_softmax(-1)
    top, ids_RK = largest(log_ref_RV, least_RK.shape[1])
    log_ref_RK = top.double()
    mask_RK = log_ref_RK >= least_RK[:, : ids_RK.shape[1]]
    # Tokens are sorted: if there are two candidates or more, the second token is one.
    has_choice_R1 = mask_RK[:, 1:2] if ids_RK.shape[1] > 1 else mask_RK.new_zeros(1)
    return Candidates(log_ref_RV, ids_RK, log_ref_RK, mask_RK & has_choice_R1)


def guide(
    candidates: Candidates, tilt_RK: Tensor, eta_R: Tensor, keep_R: Tensor, tail_tilt_R: Tensor, reward_max_R: Tensor
) -> GuidedStep:
    """The guided policy of one step.

    Every operation counts here: on a GPU each is a kernel, and a step has 40 of them.

    Args:
        candidates: see `select_candidates`.
        tilt_RK: relative tilts of the candidates, float64; entries outside the mask are not read.
        eta_R: float64, positive; any positive number in rows that are not guided.
        keep_R: rows whose tail is `Tail.KEEP`, bool.
        tail_tilt_R: see `tail_tilt`, float64; not read in rows of `keep_R`.
        reward_max_R: the greatest reward of each row's critic, float64.
    """
    mask_RK = candidates.mask_RK
    guided_R = mask_RK.any(-1)
    log_ref_RK = candidates.log_ref_RK.masked_fill(~mask_RK, -math.inf)
    tilt_RK = torch.where(mask_RK, tilt_RK, 0.0)

    log_mass_R, tilted_R = torch.stack([log_ref_RK, log_ref_RK + tilt_RK]).logsumexp(-1)
    # To within rounding, candidates may have all the probability; the tail then has none.
    log_tail_mass_R = torch.log1p(-log_mass_R.exp().clamp(max=1.0))
    tail_tilt_R = torch.where(keep_R, tilted_R - log_mass_R, tail_tilt_R)

    log_norm_R = torch.logaddexp(tilted_R, log_tail_mass_R + tail_tilt_R)  # ln E_ref[e^A], relative
    log_ratio_RK = tilt_RK - log_norm_R[:, None]
    tail_log_ratio_R = tail_tilt_R - log_norm_R
    # pi · ln(pi / ref), and 0 where pi is 0. Only the ratio of a dropped tail is infinite.
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
    """Changes logits in place, and returns them, so that their softmax at temperature `T` is `pi`.

    `l += T · ln(pi / ref)`, so that vLLM's later division by `T` is exact. Logits of `-inf` stay.

    Args:
        logits_RV: the logits that `select_candidates` was given, float32.
        temperature_R: effective temperatures, float64.
        candidates: see `select_candidates`.
        step: see `guide`.
    """
    moved_RK = logits_RV.gather(1, candidates.ids_RK).add_(temperature_R[:, None] * step.log_ratio_RK)
    tail_shift_R = (temperature_R * step.tail_log_ratio_R).to(logits_RV.dtype)
    return logits_RV.add_(tail_shift_R[:, None]).scatter_(1, candidates.ids_RK, moved_RK)


def token_logprobs(candidates: Candidates, step: GuidedStep, tokens_R: Tensor) -> tuple[Tensor, Tensor]:
    """`ln ref` and `ln pi` of one token per row, before top-p and top-k: float64, `[R]` each.

    Args:
        candidates: see `select_candidates`.
        step: see `guide`.
        tokens_R: token ids, int64.
    """
    log_ref_R = candidates.log_ref_RV.gather(1, tokens_R[:, None])[:, 0].double()
    hit_RK = candidates.ids_RK == tokens_R[:, None]
    log_ratio_R = torch.where(hit_RK, step.log_ratio_RK, 0.0).sum(-1)  # at most one place is hit
    log_ratio_R = torch.where(hit_RK.any(-1), log_ratio_R, step.tail_log_ratio_R)
    return log_ref_R, log_ref_R + log_ratio_R
