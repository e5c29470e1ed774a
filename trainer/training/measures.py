"""How good predictions of a reward are: pure functions on float64 arrays.

`predicted` are expected rewards, `rewards` those that were earned, and `weights` how much each counts (not all 0). All
three are `[N]`.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

ECE_BINS = 15


def brier(predicted: Floats, rewards: Floats, weights: Floats) -> float:
    """The mean squared error, which for rewards in {0, 1} is the Brier score."""
    return float(np.average((predicted - rewards) ** 2, weights=weights))


def auc(predicted: Floats, won: NDArray[np.bool_], weights: Floats) -> float | None:
    """The probability that a won position is predicted above a lost one, where ties count half.

    Args:
        won: which positions were won.

    Returns:
        None if all positions were won, or none.
    """
    if won.all() or not won.any():
        return None
    values, where = np.unique(predicted, return_inverse=True)
    win = np.bincount(where, weights * won, len(values))
    loss = np.bincount(where, weights * ~won, len(values))
    below = np.cumsum(loss) - loss
    return min(float((win * (below + loss / 2)).sum() / (win.sum() * loss.sum())), 1.0)


def ece(
    predicted: Floats, rewards: Floats, weights: Floats, bounds: tuple[float, float] = (0.0, 1.0), bins: int = ECE_BINS
) -> float:
    """The expected calibration error: the mean of |mean predicted − mean earned| over bins of equal width.

    Args:
        bounds: least and greatest reward.
        bins: their number.

    Returns:
        The error in units of reward.
    """
    low, high = bounds
    where = np.clip(((predicted - low) / (high - low) * bins).astype(int), 0, bins - 1)
    # Weight times the difference of means is the difference of weighted sums.
    gaps = np.bincount(where, weights * predicted, bins) - np.bincount(where, weights * rewards, bins)
    return float(np.abs(gaps).sum() / weights.sum())


def clustered_mean(values: Floats, clusters: NDArray[np.int64]) -> tuple[float, float | None]:
    """The mean of values, and its standard error if values of one cluster are not independent.

    Args:
        values: `[N]`.
        clusters: each value's cluster, `[N]`, counted from 0.

    Returns:
        The mean, and its standard error; None for a single cluster.
    """
    mean = float(values.mean())
    sums = np.bincount(clusters, values - mean)
    n = len(np.unique(clusters))
    if n < 2:
        return mean, None
    return mean, float(np.sqrt((sums**2).sum() * n / (n - 1)) / len(values))
