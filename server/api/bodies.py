"""Reads the JSON bodies of the rollout store's routes, says which field of one is wrong, and hands a body on again."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.types import Message, Receive

from qsharp_core.rollouts.text import DEEPEST, clean, cleaned, is_deeper
from server.errors import HTTPError
from server.request.values import wrong

Json = dict[str, Any]  # an object of JSON
AnyBody = TypeVar("AnyBody", bound=BaseModel)


class BadRequestError(HTTPError):
    """400 with more than a message: `details` are further fields of the error."""

    status = HTTPStatus.BAD_REQUEST

    def __init__(self, message: str, param: str, **details: Any) -> None:
        super().__init__(message)
        self.param = param
        self.details = details


class FieldProblem(BaseModel):
    """What is wrong with a body or an item of it, and in which of its fields."""

    param: str
    message: str


async def json_object(request: Request) -> Json:
    """The request's body, with texts that every database takes.

    Raises:
        BadRequestError: it is not a JSON object, or too deep.
    """
    try:
        body = await request.json()
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"the body must be JSON: {error!s:.200}", "body") from error
    if not isinstance(body, dict):
        raise BadRequestError("the body must be a JSON object", "body")
    if is_deeper(body, DEEPEST):
        raise BadRequestError(f"the body must be nested at most {DEEPEST} deep", "body")
    return {clean(name): cleaned(value) for name, value in body.items()}


def checked(body: object, kind: type[AnyBody], accepts: Mapping[str, str]) -> AnyBody:
    """The body as a model.

    Args:
        body: JSON's data.
        kind: the model.
        accepts: what each field accepts, in words that follow "must be".

    Raises:
        BadRequestError: names the field that is wrong.
    """
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        problem = problem_of(error, accepts)
        raise BadRequestError(problem.message, problem.param) from error


def problem_of(error: ValidationError, accepts: Mapping[str, str]) -> FieldProblem:
    """The first thing that is wrong; see `checked`."""
    first = error.errors()[0]
    param = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        message = f"{param:.100} is not known"
    elif first["type"] == "missing":
        message = f"{param} is missing: it must be {accepts[param]}"
    else:
        message = str(wrong(param, first["input"], accepts.get(param, "an object")))
    return FieldProblem(param=param, message=message)


def documented(schema: Mapping[str, Any], media_type: str = "application/json") -> Json:
    """The part of a route's OpenAPI schema about a body that the route reads by itself."""
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}


async def replayed(receive: Receive) -> tuple[bytes, Receive]:
    """The body of a request, which the gate hands on in one piece, and what hands it on once more."""
    waiting = [await receive()]
    body: bytes = waiting[0].get("body", b"")

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return body, replay
