"""A request's guidance as it travels to the worker, in `SamplingParams.extra_args`.

The entries are flat, because vLLM's HTTP field `vllm_xargs` carries only numbers, strings and lists of these, and they
have a prefix, because other plugins share the field. Defaults and limits are in `qsharp_core.wire.guidance`:

    qsharp_eta          number from 1e-6 to 1e6: smaller is stronger (absent: the request is not guided)
    qsharp_critic       "name" or "name@version" (absent: the default critic)
    qsharp_candidates   the most candidates of a step
    qsharp_min_prob     the least reference probability of a candidate, 0 … 1
    qsharp_tail         a `TailName`
    qsharp_method       a `MethodName`
    qsharp_id           number under which this request's steps are reported; chosen by whoever reads the reports
    qsharp_report_candidates   whether these reports have each step's candidates

This module imports little: vLLM loads it in the front end, to refuse wrong values at admission.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qsharp_core.errors import GuidanceError
from qsharp_core.wire.guidance import (
    BUDGET_RANGE,
    BUDGETS,
    DEFAULT_CANDIDATES,
    DEFAULT_METHOD,
    DEFAULT_MIN_PROB,
    DEFAULT_TAIL,
    ETA_RANGE,
    MAX_CANDIDATES,
    METHODS,
    PREFIX,
    TAILS,
    MethodName,
    TailName,
)


@dataclass(frozen=True)
class GuidanceParams:
    """One request's guidance; its fields are checked.

    Attributes:
        eta: strength of guidance, in units of reward; None for a request that is only observed.
        critic: `name` or `name@version`; None is the default critic.
        candidates: at most so many of the likeliest tokens are scored at each step.
        min_prob: tokens less likely than this under the reference are no candidates.
        tail: what happens to the tokens that are no candidates; see `Tail`.
        method: which tilt is applied; see `Method`.
        id: the steps of the request are reported under it; None if they are not.
        kl_total: most nats that all tokens may spend together; None if there is no such budget. It needs an `id`. 0 is
            what is left where an earlier part of the completion has spent everything.
        kl_token: most nats that a token may spend; None if there is no such budget.
        report_candidates: whether the reports of its steps have their candidates, and what the critic said of each.

    Raises:
        GuidanceError: a field is wrong; the message names it and what it accepts.
    """

    eta: float | None = None
    critic: str | None = None
    candidates: int = DEFAULT_CANDIDATES
    min_prob: float = DEFAULT_MIN_PROB
    tail: TailName = DEFAULT_TAIL
    method: MethodName = DEFAULT_METHOD
    id: int | None = None
    kl_total: float | None = None
    kl_token: float | None = None
    report_candidates: bool = False

    def __post_init__(self) -> None:
        low, high = ETA_RANGE
        if self.eta is not None:
            _number(self.eta, "eta", low, high)
        _number(self.candidates, "candidates", 1, MAX_CANDIDATES, whole=True)
        _number(self.min_prob, "min_prob", 0, 1)
        _one_of(self.tail, "tail", TAILS)
        _one_of(self.method, "method", METHODS)
        if self.critic is not None and not isinstance(self.critic, str):
            raise GuidanceError(f"critic must be a string, got {self.critic!r}", "critic")
        if self.id is not None:
            _number(self.id, "id", 0, 2**63 - 1, whole=True)
        least = {"kl_total": 0.0, "kl_token": BUDGET_RANGE[0]}
        for name in BUDGETS:
            if (budget := getattr(self, name)) is not None:
                _number(budget, name, least[name], BUDGET_RANGE[1])
        if not isinstance(self.report_candidates, bool):
            raise GuidanceError(
                f"report_candidates must be true or false, got {self.report_candidates!r}", "report_candidates"
            )

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None) -> "GuidanceParams | None":
        """Reads the guidance from a request's `extra_args`; None if they have no entry of ours.

        Raises:
            GuidanceError: an entry is unknown or wrong.
        """
        ours = {k.removeprefix(PREFIX): v for k, v in (extra_args or {}).items() if k.startswith(PREFIX)}
        if not ours:
            return None
        unknown = ours.keys() - cls.__dataclass_fields__.keys()
        if unknown:
            known = ", ".join(PREFIX + name for name in cls.__dataclass_fields__)
            raise GuidanceError(f"{PREFIX}{min(unknown)} is not known; known are {known}", PREFIX + min(unknown))
        if "eta" not in ours and "id" not in ours:
            raise GuidanceError(f"{PREFIX}{min(ours)} without {PREFIX}eta guides nothing", PREFIX + "eta")
        if "kl_total" in ours and "id" not in ours:
            raise GuidanceError(
                f"{PREFIX}kl_total needs {PREFIX}id, by which a request that was preempted is known again",
                PREFIX + "id",
            )
        return cls(**ours)

    def to_extra_args(self) -> dict[str, Any]:
        """Entries for `extra_args`, from which `from_extra_args` reads the same; defaults are left out."""
        default = GuidanceParams()
        fields = ((name, getattr(self, name)) for name in self.__dataclass_fields__)
        return {PREFIX + name: value for name, value in fields if value != getattr(default, name)}


def check_sampling_params(sampling_params: Any, *, penalties_first: bool) -> GuidanceParams | None:
    """Reads a request's guidance, and refuses what cannot be combined with it.

    Args:
        sampling_params: `vllm.SamplingParams`.
        penalties_first: whether this model runner applies penalties before logits processors, as V2 does. Penalties
            that are applied later would change the guided policy after it was reported.

    Returns:
        The guidance; None for a request that is neither guided nor observed.

    Raises:
        GuidanceError: a field is wrong or cannot be combined with guidance; the message names it.
    """
    params = GuidanceParams.from_extra_args(sampling_params.extra_args)
    if params is None:
        return None
    if params.id is not None and sampling_params.n > 1:
        raise GuidanceError("qsharp_id names one sample: send n requests instead of n > 1", "n")
    if not penalties_first:
        neutral = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}
        for name, value in neutral.items():
            if getattr(sampling_params, name) != value:
                raise GuidanceError(
                    f"{name} cannot be combined with guidance on this model runner: it is applied after it", name
                )
    if getattr(sampling_params, "thinking_token_budget", None) is not None:
        raise GuidanceError("thinking_token_budget cannot be combined with guidance", "thinking_token_budget")
    return params


def _number(value: Any, name: str, low: float, high: float, *, whole: bool = False) -> None:
    kinds = (int,) if whole else (int, float)
    good = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    if not (good and low <= value <= high):
        kind = "a whole number" if whole else "a number"
        raise GuidanceError(f"{name} must be {kind} from {low:g} to {high:g}, got {value!r}", name)


def _one_of(value: Any, name: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise GuidanceError(f"{name} must be one of {', '.join(accepted)}, got {value!r}", name)
