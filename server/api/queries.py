"""Query strings of the store's lists: filters, a cursor, a limit. An unknown parameter is refused, never ignored."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qsharp_core.errors import GuidanceError
from qsharp_core.rollouts.records import LATEST
from server.request.schema import METADATA_ACCEPTS, Metadata
from server.request.values import wrong
from server.store.filters import Filters, Order

MOST = 1000  # rollouts in one answer
DELETED = 500  # rollouts that one request deletes, unless it says otherwise
LONGEST = 1024  # characters of a value
NAMES = f"a name, or several with commas between them, of at most {LONGEST} characters"
METADATA = re.compile(r"metadata(?:\.(?P<dotted>.+)|\[(?P<bracketed>.+)\])", re.DOTALL)


Short = Annotated[str, Field(max_length=LONGEST)]
Time = Annotated[float, Field(ge=0, le=LATEST, allow_inf_nan=False)]
TIME = "seconds since the epoch"
PLACE = "the last_reward of a count"


class FilterQuery(BaseModel):
    """Which rollouts; `metadata.KEY=VALUE` or `metadata[KEY]=VALUE` may be repeated, and all must hold."""

    model_config = ConfigDict(extra="forbid")
    critic: Short | None = Field(default=None, description=f"name or name@version, of at most {LONGEST} characters")
    guided: bool | None = Field(default=None, description="true or false")
    has_reward: bool | None = Field(default=None, description="true or false")
    has_valid_position: bool | None = Field(default=None, description="true or false")
    model: Short | None = Field(default=None, description=f"a model's name, of at most {LONGEST} characters")
    owner: Short | None = Field(default=None, description=NAMES)
    rewarded_by: Short | None = Field(default=None, description=NAMES)
    reward_source: Short | None = Field(default=None, description=f"what judged, of at most {LONGEST} characters")
    created_after: Time | None = Field(default=None, description=TIME)
    created_before: Time | None = Field(default=None, description=TIME)
    rewarded_after: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(default=None, description=PLACE)
    trained: bool | None = Field(default=None, description="true or false")
    metadata: Metadata = Field(default={}, description=METADATA_ACCEPTS)

    def filters(self, trained_until: float = 0.0) -> Filters:
        """The same filters as the store takes them.

        Args:
            trained_until: when the last version was made that the store does not know, in seconds since the epoch.

        Raises:
            GuidanceError: a list of names has none.
        """
        return Filters(
            critic=self.critic,
            guided=self.guided,
            has_reward=self.has_reward,
            has_valid_position=self.has_valid_position,
            model=self.model,
            owners=_names("owner", self.owner),
            rewarded_by=_names("rewarded_by", self.rewarded_by),
            reward_source=self.reward_source,
            created_after=self.created_after,
            created_before=self.created_before,
            rewarded_after=self.rewarded_after,
            trained=self.trained,
            trained_until=trained_until,
            metadata=self.metadata,
        )


class PageQuery(FilterQuery):
    """A page of a list of rollouts."""

    after: Short | None = Field(default=None, description="id of the last one of the page before")
    limit: int = Field(default=20, ge=1, le=MOST, description=f"a whole number from 1 to {MOST}")
    order: Order = Field(default="asc", description="asc or desc")


class DeleteQuery(FilterQuery):
    """Rollouts to delete, the oldest first."""

    created_before: Time = Field(description=TIME)
    even_trained: bool = Field(default=False, description="true or false")
    limit: int = Field(default=DELETED, ge=1, le=MOST, description=f"a whole number from 1 to {MOST}")

    def filters(self, trained_until: float = 0.0) -> Filters:
        """As of any query; unless it says otherwise, without what may have trained a version."""
        chosen = super().filters(trained_until)
        return chosen if self.even_trained or chosen.trained is not None else replace(chosen, trained=False)


class ChatPageQuery(BaseModel):
    """A page of stored chat completions, or of their messages."""

    model_config = ConfigDict(extra="forbid")
    after: Short | None = Field(default=None, description="id of the last one of the page before")
    limit: int = Field(default=20, ge=1, le=100, description="a whole number from 1 to 100")
    order: Order = Field(default="asc", description="asc or desc")
    model: Short | None = Field(default=None, description=f"a model's name, of at most {LONGEST} characters")
    metadata: Metadata = Field(default={}, description=METADATA_ACCEPTS)


AnyQuery = TypeVar("AnyQuery", bound=BaseModel)


def parse(request: Request, kind: type[AnyQuery]) -> AnyQuery:
    """The request's query, checked.

    Raises:
        GuidanceError: names the parameter that is unknown, repeated or wrong.
    """
    metadata: dict[str, str] = {}
    values: dict[str, str | dict[str, str]] = {"metadata": metadata}
    for name, value in request.query_params.multi_items():
        match = METADATA.fullmatch(name)
        if match is not None:
            metadata[match["dotted"] or match["bracketed"]] = value
        elif name in values and name != "metadata":
            raise GuidanceError(f"{name:.100} must be given once", name)
        else:
            values[name] = value
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if name not in kind.model_fields:
            known = ", ".join(f"{n}.KEY" if n == "metadata" else n for n in kind.model_fields)
            raise GuidanceError(f"{name:.100} is not known; this takes {known}", name) from error
        description = kind.model_fields[name].description or ""
        if first["type"] == "missing":
            raise GuidanceError(f"{name} must be given: {description}", name) from error
        raise wrong(name, first["input"], description) from error


def _names(param: str, listed: str | None) -> Sequence[str]:
    names = [name for name in (listed or "").split(",") if name]
    if listed is not None and not names:
        raise wrong(param, listed, NAMES)  # no names would be everybody's
    return names
