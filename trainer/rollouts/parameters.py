"""The fields of a request that say how a completion is sampled, and how it is guided."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trainer.tasks.base import SamplingDefaults


@dataclass(frozen=True, kw_only=True)
class SamplingParameters:
    """How tokens are drawn; with a critic, from the policy that `eta` tilts towards reward."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()

    def fields(self) -> dict[str, Any]:
        """The request's fields; all of them are given, so that no default of the server changes the policy."""
        return {**asdict(self), "stop": list(self.stop) or None}


def sampling_of(
    defaults: SamplingDefaults,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    max_tokens: int | None = None,
    stop: Sequence[str] | None = None,
) -> SamplingParameters:
    """The sampling that is wanted; a task's defaults decide what is None."""
    return SamplingParameters(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_tokens=max_tokens or defaults.max_tokens,
        stop=defaults.stop if stop is None else tuple(stop),
    )


@dataclass(frozen=True, kw_only=True)
class GuidanceParameters:
    """How completions are guided; `critic` is an exact version, and None leaves an option to the server."""

    eta: float
    critic: str
    method: str = "qsharp"
    candidates: int | None = None
    min_prob: float | None = None
    tail: str | None = None

    def fields(self) -> dict[str, Any]:
        """The request's fields `eta` and `guidance`."""
        options = {name: value for name, value in asdict(self).items() if name != "eta" and value is not None}
        return {"eta": self.eta, "guidance": options}
