"""Query strings of the store's lists: filters, a cursor, a limit. An unknown parameter is refused, never ignored."""

import re
from collections.abc import Sequence
from typing import Annotated, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qsharp_core.errors import GuidanceError
from server.request.schema import METADATA_ACCEPTS, Metadata
from server.request.values import wrong
from server.store.filters import Filters, Order

MOST = 1000  # rollouts in one answer
LONGEST = 1024  # characters of a value
NAMES = f"a name, or several with commas between them, of at most {LONGEST} characters"
METADATA = re.compile(r"metadata(?:\.(?P<dotted>.+)|\[(?P<bracketed>.+)\])", re.DOTALL)


Short = Annotated[str, Field(max_length=LONGEST)]


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
    metadata: Metadata = Field(default={}, description=METADATA_ACCEPTS)

    def filters(self) -> Filters:
        """The same filters as the store takes them."""
        return Filters(
            critic=self.critic,
            guided=self.guided,
            has_reward=self.has_reward,
            has_valid_position=self.has_valid_position,
            model=self.model,
            owners=_names(self.owner),
            rewarded_by=_names(self.rewarded_by),
            reward_source=self.reward_source,
            metadata=self.metadata,
        )


class PageQuery(FilterQuery):
    """A page of a list of rollouts."""

    after: Short | None = Field(default=None, description="id of the last one of the page before")
    limit: int = Field(default=20, ge=1, le=MOST, description=f"a whole number from 1 to {MOST}")
    order: Order = Field(default="asc", description="asc or desc")


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
        raise wrong(name, first["input"], kind.model_fields[name].description or "") from error


def _names(listed: str | None) -> Sequence[str]:
    return [name for name in (listed or "").split(",") if name]
