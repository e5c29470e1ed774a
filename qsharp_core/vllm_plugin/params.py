"""A request's guidance as it travels to the worker, in `SamplingParams.extra_args`.

Flat and prefixed, because vLLM's HTTP field `vllm_xargs` carries only numbers, strings and lists of these, and shares
its name space with other plugins (`qsharp_core.wire.guidance` has names, defaults and limits):

    qsharp_eta          number > 0: the guidance's strength (absent: not guided)
    qsharp_critic       "name" or "name@version" (absent: the default critic)
    qsharp_candidates   the most candidates of a step
    qsharp_min_prob     0 … 1, the least reference probability of a candidate
    qsharp_tail         a `TailName`
    qsharp_method       a `MethodName`
    qsharp_id           number chosen by whoever reads the telemetry: report this request's steps under it

Import-light: vLLM loads it in the front end, to refuse bad values at admission.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qsharp_core.errors import GuidanceError
from qsharp_core.wire.guidance import (
    DEFAULT_CANDIDATES,
    DEFAULT_MIN_PROB,
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
    """One request's guidance, checked. `eta` is None for a request that is only observed.

    Raises:
        GuidanceError: names the field and what it accepts.
    """

    eta: float | None = None
    critic: str | None = None
    candidates: int = DEFAULT_CANDIDATES
    min_prob: float = DEFAULT_MIN_PROB
    tail: TailName = "floor"
    method: MethodName = "qsharp"
    id: int | None = None

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

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None) -> "GuidanceParams | None":
        """What a request's `extra_args` say; None where they say nothing of guidance."""
        ours = {k.removeprefix(PREFIX): v for k, v in (extra_args or {}).items() if k.startswith(PREFIX)}
        if not ours:
            return None
        unknown = ours.keys() - cls.__dataclass_fields__.keys()
        if unknown:
            known = ", ".join(PREFIX + name for name in cls.__dataclass_fields__)
            raise GuidanceError(f"{PREFIX}{min(unknown)} is not known; known are {known}", PREFIX + min(unknown))
        if "eta" not in ours and "id" not in ours:
            raise GuidanceError(f"{PREFIX}{min(ours)} without {PREFIX}eta guides nothing", PREFIX + "eta")
        return cls(**ours)

    def to_extra_args(self) -> dict[str, Any]:
        """The inverse: only what differs from the defaults."""
        default = GuidanceParams()
        fields = ((name, getattr(self, name)) for name in self.__dataclass_fields__)
        return {PREFIX + name: value for name, value in fields if value != getattr(default, name)}


def check_sampling_params(sampling_params: Any, *, penalties_first: bool) -> GuidanceParams | None:
    """A request's guidance, after refusing what cannot be combined with it.

    Args:
        sampling_params: `vllm.SamplingParams`.
        penalties_first: whether this model runner applies penalties before logits processors (V2 does). Where it
            does not, they would distort the guided policy after it was reported.

    Raises:
        GuidanceError: names the field.
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
