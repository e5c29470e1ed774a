"""How strongly, by which method and with which candidates a request is guided: names, defaults and limits.

The same names stand in the HTTP field `guidance`, in the engine's `SamplingParams.extra_args` (with `PREFIX`), in
stored rollouts and in recipes. docs/architecture.md says what else to touch to add a tail or a method.
"""

from enum import StrEnum
from typing import Literal, get_args


class Tail(StrEnum):
    """What happens to the tokens that are no candidates (docs/method.md, "Tails")."""

    FLOOR = "floor"  # they count as if they earned the least reward: A = r_min / eta
    KEEP = "keep"  # they keep their total probability
    DROP = "drop"  # they are excluded


class Method(StrEnum):
    """Which tilt is computed from the critic's return distribution (docs/method.md, "Tilts")."""

    QSHARP = "qsharp"  # A = ln E[exp(z / eta)]
    CD = "cd"  # A = E[z] / eta (Controlled Decoding, arXiv 2310.17022)


# The same as literals, for request models and type checkers.
TailName = Literal["floor", "keep", "drop"]
MethodName = Literal["qsharp", "cd"]
Detail = Literal["none", "summary", "tokens", "candidates"]  # what a response reports of its guidance
TAILS: tuple[TailName, ...] = get_args(TailName)
METHODS: tuple[MethodName, ...] = get_args(MethodName)
DETAILS: tuple[Detail, ...] = get_args(Detail)
assert tuple(Tail) == TAILS
assert tuple(Method) == METHODS

PREFIX = "qsharp_"  # of the fields in `extra_args`, whose name space other plugins share
ETA_RANGE = (1e-6, 1e6)
BUDGETS = ("kl_total", "kl_token")
BUDGET_RANGE = (1e-6, 1e6)  # of these, in nats
DEFAULT_TAIL: TailName = "floor"
DEFAULT_METHOD: MethodName = "qsharp"
DEFAULT_CANDIDATES = 20
MAX_CANDIDATES = 256
DEFAULT_MIN_PROB = 0.01  # docs/decisions.md has the table
