"""The fields of a search, `guidance.search` of a request."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from qsharp_core.answers import VOTES, VoteName
from qsharp_core.errors import GuidanceError
from qsharp_core.wire.search import BEST, DEFAULT_RESAMPLE_BELOW, DEFAULT_ROUND, KINDS, Best, Chosen
from server.request.values import Number, wrong

NAME = "guidance.search"


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Rejection(_Options):
    """When a search ends samples that fall behind, and how many go on."""

    every: int = Field(ge=1, description="tokens of each sample from one look at them to the next")
    keep: Annotated[Number, Field(gt=0, lt=1)] = Field(description="the share of them that goes on after each look")


class StopSearch(_Options):
    """Ends a choice whose value falls."""

    kind: Literal["stop"]
    below: Number = Field(description="a choice ends where its value is below this, in units of reward")

    @property
    def samples(self) -> int | None:
        """How many samples there are of a prompt; None: as many as choices."""
        return None


class BestOfSearch(_Options):
    """Samples completions and returns the best of them."""

    kind: Literal["best_of"]
    n: int = Field(ge=1, description="samples")
    by: Best = Field(default="value", description="which of them are the best")
    vote: VoteName = Field(default="number", description="which part of its text a sample votes for")
    reject: Rejection | None = Field(default=None, description="ends samples that fall behind; default: none")

    @property
    def samples(self) -> int | None:
        """See `StopSearch.samples`."""
        return self.n


class ParticleSearch(_Options):
    """Twisted sequential Monte Carlo."""

    kind: Literal["particles"]
    n: int = Field(ge=1, description="particles")
    every: int = Field(default=DEFAULT_ROUND, ge=1, description="tokens of a round")
    resample_below: Annotated[Number, Field(gt=0, le=1)] = Field(
        default=DEFAULT_RESAMPLE_BELOW, description="particles are resampled where their effective share is below this"
    )
    by: Chosen = Field(default="sample", description="how the choices are taken from the particles")
    vote: VoteName = Field(default="number", description="which part of its text a particle votes for")

    @property
    def samples(self) -> int | None:
        """See `StopSearch.samples`."""
        return self.n


Search: TypeAlias = StopSearch | BestOfSearch | ParticleSearch


def accepts(max_search: int) -> dict[str, str]:
    """For error messages: what each field of a search accepts, by the field's name.

    Args:
        max_search: the most samples of a search that this server allows.
    """
    by_field = {
        "kind": f"one of {', '.join(KINDS)}",
        "below": "a number, in units of reward",
        "n": f"a whole number from 1 to {max_search}",
        "by": f"one of {', '.join(BEST)}, and with particles sample",
        "vote": f"one of {', '.join(VOTES)}",
        "reject": "an object with every and keep, or null",
        "reject.every": "a whole number, at least 1",
        "reject.keep": "a number above 0 and below 1",
        "every": "a whole number, at least 1",
        "resample_below": "a number above 0 and at most 1",
    }
    return {
        NAME: f"an object whose kind is one of {', '.join(KINDS)}, or null",
        **{f"{NAME}.{field}": accepted for field, accepted in by_field.items()},
    }


def explain(error: Any, max_search: int) -> GuidanceError:
    """Our error for one of pydantic's about a search.

    Args:
        error: its `loc` ends with the search's kind, if that is known, and the path of the field within the search.
        max_search: the most samples of a search that this server allows.
    """
    accepted = accepts(max_search)
    path = [str(part) for part in error["loc"]]
    path = path[path.index("search") + 1 :]
    kind, inner = (path[0], path[1:]) if path and path[0] in KINDS else (None, path)
    param = ".".join([NAME, *inner])
    value = error.get("input")
    if error["type"].startswith("union_tag"):
        param = f"{NAME}.kind"
        value = value.get("kind") if isinstance(value, dict) else value
    if error["type"] == "extra_forbidden":
        of = f"{NAME}.{inner[0]}" if len(inner) > 1 else f"{NAME} of the kind {kind}"
        return GuidanceError(f"{param} is not known; {of} takes {', '.join(_fields(kind, inner[:-1]))}", param)
    if error["type"] == "missing":
        return GuidanceError(f"{param} is missing: it must be {accepted[param]}", param)
    return wrong(param, value, accepted[param])


def _fields(kind: str | None, inner: Sequence[str]) -> list[str]:
    models: dict[str | None, type[BaseModel]] = {
        "stop": StopSearch, "best_of": BestOfSearch, "particles": ParticleSearch,
    }  # fmt: skip
    return [*(Rejection if inner else models[kind]).model_fields]
