"""The fields that requests have beside OpenAI's and vLLM's own, and how a wrong value is reported."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, Strict
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from qsharp_core.errors import GuidanceError
from qsharp_core.wire.guidance import (
    BUDGET_RANGE,
    DEFAULT_CANDIDATES,
    DEFAULT_MIN_PROB,
    DETAILS,
    ETA_RANGE,
    MAX_CANDIDATES,
    METHODS,
    TAILS,
    Detail,
    MethodName,
    TailName,
)
from qsharp_core.wire.metadata import LONGEST_KEY, LONGEST_VALUE, MOST_ENTRIES
from server.request.search import fields as search_fields
from server.request.search.fields import Search
from server.request.values import Number, wrong

Budget = Annotated[Number, Field(ge=BUDGET_RANGE[0], le=BUDGET_RANGE[1])]

# OpenAI's limits.
Metadata = Annotated[
    dict[
        Annotated[str, Strict(), Field(max_length=LONGEST_KEY)],
        Annotated[str, Strict(), Field(max_length=LONGEST_VALUE)],
    ],
    Field(max_length=MOST_ENTRIES),
]
METADATA_ACCEPTS = (
    f"an object of at most {MOST_ENTRIES} strings, with names of at most {LONGEST_KEY} and values of at most "
    f"{LONGEST_VALUE} characters, or null"
)


class GuidanceOptions(BaseModel):
    """A request's `guidance`. An option that is absent or null has its default."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    critic: str | None = Field(default=None, description='"name" or "name@version"; default: the server\'s first')
    candidates: int | None = Field(
        default=None,
        ge=1,
        le=MAX_CANDIDATES,
        description=f"most likely tokens that the critic weighs at each step, default {DEFAULT_CANDIDATES}",
    )
    min_prob: Annotated[Number, Field(ge=0, le=1)] | None = Field(
        default=None, description=f"least reference probability of a candidate, default {DEFAULT_MIN_PROB:g}"
    )
    tail: TailName | None = Field(default=None, description="what happens to other tokens, default floor")
    method: MethodName | None = Field(default=None, description="which tilt, default qsharp")
    detail: Detail | None = Field(default=None, description="what the response reports, default summary")
    kl_total: Budget | None = Field(default=None, description="most nats of KL that a whole choice may spend")
    kl_token: Budget | None = Field(default=None, description="most nats of KL that each token may spend")
    search: Annotated[Search, Field(discriminator="kind")] | None = Field(
        default=None, description="how choices are searched for; default: each is a sample of its own"
    )

    @property
    def has_budget(self) -> bool:
        """Whether the request limits its KL divergence."""
        return self.kl_total is not None or self.kl_token is not None

    @property
    def samples(self) -> int | None:
        """How many samples a search takes of each prompt; None where each choice is one."""
        return None if self.search is None else self.search.samples

    def names_set(self) -> set[str]:
        """Names of the options that the request sets, except `detail`, which changes nothing but the report."""
        return {name for name in self.model_fields_set - {"detail"} if getattr(self, name) is not None}


class GuidedRequest(BaseModel):
    """The fields that both routes take beside vLLM's."""

    eta: Annotated[Number, Field(ge=ETA_RANGE[0], le=ETA_RANGE[1])] | None = Field(
        default=None,
        description="strength of the guidance, in units of reward: smaller is stronger; null: not guided; "
        "absent: the server's default",
    )
    guidance: GuidanceOptions | None = None
    store: Annotated[bool, Strict()] | None = None
    metadata: Metadata | None = None


class GuidedCompletionRequest(GuidedRequest, CompletionRequest):
    """Body of `POST /v1/completions`."""


class GuidedChatCompletionRequest(GuidedRequest, ChatCompletionRequest):
    """Body of `POST /v1/chat/completions`."""


def accepts(max_candidates: int, max_search: int) -> dict[str, str]:
    """For error messages: what each of our fields accepts, by the field's name.

    Args:
        max_candidates, max_search: the most candidates, and samples of a search, that this server allows.
    """
    low, high = ETA_RANGE
    return {
        "eta": f"a number from {low:g} to {high:g}, or null",
        "guidance": f"an object with any of {', '.join(GuidanceOptions.model_fields)}, or null",
        "guidance.critic": "a string: name or name@version",
        "guidance.candidates": f"a whole number from 1 to {max_candidates}",
        "guidance.min_prob": "a number from 0 to 1",
        "guidance.tail": f"one of {', '.join(TAILS)}",
        "guidance.method": f"one of {', '.join(METHODS)}",
        "guidance.detail": f"one of {', '.join(DETAILS)}",
        "guidance.kl_total": f"a number from {BUDGET_RANGE[0]:g} to {BUDGET_RANGE[1]:g}, in nats, or null",
        "guidance.kl_token": f"a number from {BUDGET_RANGE[0]:g} to {BUDGET_RANGE[1]:g}, in nats, or null",
        **search_fields.accepts(max_search),
        "store": "true, false or null",
        "metadata": METADATA_ACCEPTS,
    }


def explain(errors: Sequence[Any], max_candidates: int, max_search: int) -> GuidanceError | None:
    """Our error for the first of pydantic's errors that is about one of our fields; None if none is.

    Args:
        errors: of FastAPI's `RequestValidationError`.
        max_candidates, max_search: see `accepts`.
    """
    accepted = accepts(max_candidates, max_search)
    for error in errors:
        # ("body", pydantic's own markers such as "function-wrap[…]", the field, …)
        name, *inner = [part for part in map(str, error["loc"][1:]) if "[" not in part] or [""]
        if name not in GuidedRequest.model_fields:
            continue
        if name == "guidance" and inner and inner[0] == "search":
            return search_fields.explain(error, max_search)
        if name == "guidance" and inner and error["type"] == "extra_forbidden":
            known = ", ".join(GuidanceOptions.model_fields)
            return GuidanceError(f"guidance.{inner[-1]} is not known; guidance takes {known}", f"guidance.{inner[-1]}")
        option = next((part for part in inner if part in GuidanceOptions.model_fields), None)
        param = f"guidance.{option}" if name == "guidance" and option else name
        return wrong(param, error.get("input"), accepted[param])
    return None
