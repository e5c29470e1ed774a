"""Query strings of the store's lists: filters, a cursor, a limit; what is not known is refused, never ignored."""

import re
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qsharp_core.errors import GuidanceError
from qsharp_core.rollouts.store import Filters, Order
from server.schema import wrong

MOST = 1000  # rollouts in one answer
METADATA = re.compile(r"metadata(?:\.(?P<dotted>.+)|\[(?P<bracketed>.+)\])", re.DOTALL)


class FilterQuery(BaseModel):
    """Which rollouts; `metadata.KEY=VALUE`, or `metadata[KEY]=VALUE`, once for each entry that they must have."""

    model_config = ConfigDict(extra="forbid")
    critic: str | None = Field(default=None, description="name, or name@version")
    guided: bool | None = Field(default=None, description="true or false")
    has_reward: bool | None = Field(default=None, description="true or false")
    has_valid_position: bool | None = Field(default=None, description="true or false")
    model: str | None = Field(default=None, description="a model's name")
    metadata: dict[str, str] = {}

    def filters(self) -> Filters:
        """For the store."""
        return Filters(
            critic=self.critic,
            guided=self.guided,
            has_reward=self.has_reward,
            has_valid_position=self.has_valid_position,
            model=self.model,
            metadata=self.metadata,
        )


class PageQuery(FilterQuery):
    """A page of them."""

    after: str | None = Field(default=None, description="id of the last one of the page before")
    limit: int = Field(default=20, ge=1, le=MOST, description=f"a whole number from 1 to {MOST}")
    order: Order = Field(default="asc", description="asc or desc")


class ChatPageQuery(BaseModel):
    """A page of stored chat completions, or of their messages."""

    model_config = ConfigDict(extra="forbid")
    after: str | None = Field(default=None, description="id of the last one of the page before")
    limit: int = Field(default=20, ge=1, le=100, description="a whole number from 1 to 100")
    order: Order = Field(default="asc", description="asc or desc")
    model: str | None = Field(default=None, description="a model's name")
    metadata: dict[str, str] = {}


AnyQuery = TypeVar("AnyQuery", bound=BaseModel)


def parse(request: Request, kind: type[AnyQuery]) -> AnyQuery:
    """The request's query.

    Raises:
        GuidanceError: names the parameter.
    """
    given: dict[str, Any] = {"metadata": {}}
    for name, value in request.query_params.multi_items():
        match = METADATA.fullmatch(name)
        if match is not None:
            given["metadata"][match["dotted"] or match["bracketed"]] = value
        elif name in given and name != "metadata":
            raise GuidanceError(f"{name} must be given once", name)
        else:
            given[name] = value
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if name not in kind.model_fields:
            known = ", ".join(f"{n}.KEY" if n == "metadata" else n for n in kind.model_fields)
            raise GuidanceError(f"{name} is not known; this takes {known}", name) from error
        raise wrong(name, first["input"], kind.model_fields[name].description or "") from error
