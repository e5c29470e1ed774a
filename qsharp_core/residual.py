"""A critic against itself: the Bellman residual of a completion, from what is reported of its tokens.

From `pi/ref = exp(A - V/eta)` follows `V(x) + eta · ln(pi/ref) = eta · A(x, y)`: what the critic said of the token `y`
when it was a candidate. A step later it is asked about what may follow `x' = xy`, and its answers make
`V(x') = eta · ln E_ref[exp A(x', y')]`. Both are about the reward of the reference's rollouts from `x'`, and the law of
that reward is the mixture of its laws after each `y'`, so that `exp A(x, y) = E_ref[exp A(x', y')]`. Hence

    delta = V(x') - V(x) - eta · (ln pi(y|x) - ln ref(y|x))

is 0 for a critic whose law at `x'` is that mixture. It takes no reward to know it, and says nothing about rewards: a
critic that says the same of everything agrees with itself.

Where only one token is likely the critic is not asked, and the value there is that of what follows it: `x'` is the
prefix at which the critic is asked next. What was drawn up to there must have been certain, for else it is news.
"""

from collections.abc import Iterable
from math import isnan, log
from typing import NamedTuple

from qsharp_core.wire.guidance import Tail

CERTAIN = 0.9  # what is drawn between two steps that ask, is at least so likely, all of it together


class Step(NamedTuple):
    """What is reported of a token: `V` before it, NaN where the critic was not asked; `ln ref` and `ln pi` of it."""

    value: float
    ref_logprob: float
    logprob: float


def bellman_residuals(
    steps: Iterable[Step], eta: float, tail: Tail, reward_min: float, certain: float = CERTAIN
) -> list[float]:
    """`delta` from each step at which the critic was asked to the next one, in units of reward.

    Tokens from outside the candidates are left out: their `A` is the tail's, which the critic has not said. They are
    known by it: `eta · A` is `reward_min` with `FLOOR`, and `V(x)` with `KEEP`, where no candidate's is but by chance.

    Args:
        steps: of one completion, all of them in order, guided by `method: qsharp`.
        eta, tail: the request's.
        reward_min: the least reward that the critic knows.
        certain: how likely what is drawn between two steps that ask must be; with 1 only neighbouring steps count.
    """
    # Of float64: `eta · ln(pi/ref)` is a difference of numbers of tens, times eta.
    rounding = 1e-9 + 1e-13 * eta
    found: list[float] = []
    said = float("nan")  # of the token that the last step that asked drew, NaN if there is nothing to compare with
    between = 0.0  # ln ref of what was drawn since
    for value, ref_logprob, logprob in steps:
        if isnan(value):
            between += ref_logprob
            continue
        if not isnan(said) and between >= log(certain):
            found.append(value - said)
        gain = eta * (logprob - ref_logprob)
        said, between = value + gain, 0.0
        of_tail = abs(gain) if tail == Tail.KEEP else said - reward_min
        if of_tail <= rounding:
            said = float("nan")
    return found
