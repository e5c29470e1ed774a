"""Medians of measurements, with how sure they are."""

import statistics

import numpy as np
from scipy import stats


def interval(values: list[float]) -> str:
    """Their median, and where 95 % of the medians of 1,000 bootstrap samples lie."""
    low, high = stats.bootstrap((values,), np.median, n_resamples=1000, method="percentile", rng=0).confidence_interval
    return f"{statistics.median(values):.2f} ({low:.2f} to {high:.2f})"
