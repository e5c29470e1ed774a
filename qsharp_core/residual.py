"""The Bellman residual: whether a critic agrees with itself along a completion, from what was reported of its tokens.

docs/method.md ("Bellman residual") has the definition.

From `pi/ref = exp(A - V/eta)` follows `V(x) + eta · ln(pi/ref) = eta · A(x, y)`, which the critic predicted for the
token `y` when `y` was a candidate. One step later the critic is asked about the tokens that may follow `x' = xy`, and
its predictions give `V(x') = eta · ln E_ref[exp A(x', y')]`. Both are about the reward of the reference's rollouts from
`x'`. The distribution of that reward is the mixture of its distributions after each `y'`, so that
`exp A(x, y) = E_ref[exp A(x', y')]`. Hence

    delta = V(x') - V(x) - eta · (ln pi(y|x) - ln ref(y|x))

is 0 for a critic whose prediction at `x'` is that mixture. Computing it takes no reward, and it says nothing about
rewards: a critic that predicts the same everywhere agrees with itself.

Where only one token is likely, the critic is not asked, and the value is that of the prefix that follows. `x'` is
therefore the next prefix at which the critic is asked. The tokens drawn in between must have been almost certain, or
they carry news that the prediction at `x` could not know.
"""

from collections.abc import Iterable
from math import isnan, log
from typing import NamedTuple

from qsharp_core.wire.guidance import Tail

CERTAIN = 0.9  # the least joint probability of the tokens between two steps at which the critic was asked


class Step(NamedTuple):
    """What was reported of one token.

    Attributes:
        value: `V` of the prefix before it, in units of reward; NaN where the critic was not asked.
        ref_logprob, logprob: `ln ref` and `ln pi` of the token.
        clipped: whether a budget of KL divergence held the step back, so that `ln pi` is not what the critic predicted.
    """

    value: float
    ref_logprob: float
    logprob: float
    clipped: bool = False


def bellman_residuals(
    steps: Iterable[Step], eta: float, tail: Tail, reward_min: float, certain: float = CERTAIN
) -> list[float]:
    """`delta` between each step at which the critic was asked and the next such step, in units of reward.

    Tokens of steps that were clipped are left out, and tokens of the tail, because their `A` is not a prediction of the
    critic. We recognise the latter by that `A`:
    `eta · A` is `reward_min` with `FLOOR`, and `V(x)` with `KEEP`; a candidate has that value only by chance.

    Args:
        steps: all tokens of one completion, in order, guided by `method: qsharp`.
        eta, tail: those of the request.
        reward_min: the least reward that the critic knows.
        certain: the least joint probability of the tokens drawn between two steps at which the critic was asked; with 1
            only neighbouring steps count.
    """
    # Of float64, where `eta · ln(pi/ref)` is a difference of numbers of the order of ten, times eta.
    rounding = 1e-9 + 1e-13 * eta
    residuals: list[float] = []
    # `eta · A` of the token drawn at the last step at which the critic was asked; NaN if it cannot be compared.
    predicted = float("nan")
    between = 0.0  # ln ref of the tokens drawn since then
    for value, ref_logprob, logprob, clipped in steps:
        if isnan(value):
            between += ref_logprob
            continue
        if not isnan(predicted) and between >= log(certain):
            residuals.append(value - predicted)
        gain = eta * (logprob - ref_logprob)
        predicted, between = value + gain, 0.0
        from_tail = abs(gain) if tail == Tail.KEEP else predicted - reward_min
        if clipped or from_tail <= rounding:
            predicted = float("nan")
    return residuals
