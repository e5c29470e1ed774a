"""The temperature of logits that makes a log-loss the least."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor

from benchmarks.calibration.outputs import LabelOutputs

RANGE = (1 / 50, 50.0)
BOOTSTRAPS = 200


def fit(found: LabelOutputs, counted: Tensor | None = None) -> float:
    """The temperature that outputs are to be divided by, within `RANGE`.

    Args:
        found: outputs at labels, `[L]` of them.
        counted: how often each label counts, `[L]`; None is once.
    """
    weights = found.weights if counted is None else found.weights * counted
    assert weights.sum() > 0

    def loss(log_temperature: float) -> float:
        return float((found.losses(math.exp(log_temperature)) * weights).sum() / weights.sum())

    low, high = map(math.log, RANGE)
    return math.exp(minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-4}).x)


def bootstrapped(found: LabelOutputs, seed: int = 0) -> tuple[float, float]:
    """Where 95 % of the temperatures lie that are fitted on prompts drawn with replacement."""
    dice = np.random.default_rng(seed)
    prompts = prompts_of(found)
    number = prompts.max() + 1
    fitted = []
    for _ in range(BOOTSTRAPS):
        times = np.bincount(dice.integers(number, size=number), minlength=number)
        fitted.append(fit(found, torch.from_numpy(times[prompts])))
    low, high = np.quantile(fitted, [0.025, 0.975])
    return float(low), float(high)


def cross_fitted(found: LabelOutputs, seed: int = 0) -> tuple[tuple[float, float], Tensor]:
    """The temperatures that are fitted on either half of the prompts, and each label's: the other half's, `[L, 1]`."""
    prompts = prompts_of(found)
    number = prompts.max() + 1
    if number < 2:
        raise ValueError("a single held-out prompt cannot be halved")
    order = np.random.default_rng(seed).permutation(number)
    first = torch.from_numpy(np.isin(prompts, order[: number // 2]))
    of_first, of_second = fit(found, first), fit(found, ~first)
    return (of_first, of_second), torch.where(first, of_second, of_first)[:, None]


def prompts_of(found: LabelOutputs) -> NDArray[np.int64]:
    """The number of each label's prompt, from 0 on, `[L]`."""
    _, numbers = np.unique(found.rollouts.groups, return_inverse=True)
    return numbers[found.rollout].astype(np.int64)
