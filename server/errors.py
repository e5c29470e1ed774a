"""Turns errors into HTTP responses, and nothing else does: OpenAI's `{"error": {message, type, param, code}}`.

Beside the errors of `qsharp_core.errors` there are some that only the HTTP interface has:

    QSharpError
    └── HTTPError             with a status of its own
        ├── UnauthorizedError     401: the request carries no admin key
        ├── ForbiddenError        403: it carries a wrong one, or the server has none
        ├── NotFoundError         404: what the path names does not exist
        │   └── UnknownModelError     nor does what a model's name says
        ├── SlowRequestError      408: the body did not arrive in time
        ├── ConflictError         409: the request does not fit the present state
        ├── TooLargeError         413: the body is larger than this route takes
        ├── TooManyRequestsError  429: this key has sent too many, or has too many on their way
        ├── HeadTooLargeError     431: the request line and headers are too large
        └── UnavailableError      503: the engine does not answer, or the server ends
            └── OverloadedError       more is on its way than the server takes

When a stream has begun, vLLM itself writes the event that reports an error, and it logs no stack trace for a
`GenerationError`. So a sample whose critic fails ends with a `SampleFailure`, which is both that and a `CriticFailure`.
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from vllm.exceptions import GenerationError

from qsharp_core.errors import (
    CriticError,
    CriticFailure,
    GuidanceError,
    NoCriticError,
    QSharpError,
    RolloutError,
    StoreError,
)
from qsharp_core.rollouts.text import cleaned


class HTTPError(QSharpError):
    """An error that only the HTTP interface has.

    Args:
        message: for the client.
        retry_after: seconds after which the client may try again; None where that is not known.
    """

    status = HTTPStatus.INTERNAL_SERVER_ERROR

    def __init__(self, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UnauthorizedError(HTTPError):
    """The request carries no credentials."""

    status = HTTPStatus.UNAUTHORIZED


class ForbiddenError(HTTPError):
    """The credentials are wrong, or this server allows this to nobody."""

    status = HTTPStatus.FORBIDDEN


class NotFoundError(HTTPError):
    """What the path names does not exist."""

    status = HTTPStatus.NOT_FOUND


class UnknownModelError(NotFoundError):
    """A virtual model whose critic is not loaded."""

    param = "model"


class SlowRequestError(HTTPError):
    """The body did not arrive in time."""

    status = HTTPStatus.REQUEST_TIMEOUT


class ConflictError(HTTPError):
    """The request does not fit the present state; the message says what would."""

    status = HTTPStatus.CONFLICT


class TooLargeError(HTTPError):
    """The body is larger than this route takes."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class TooManyRequestsError(HTTPError):
    """This key has sent too many requests, or has too many on their way."""

    status = HTTPStatus.TOO_MANY_REQUESTS


class HeadTooLargeError(HTTPError):
    """The request line and headers are too large."""

    status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE


class UnavailableError(HTTPError):
    """The engine does not answer, or the server is about to end."""

    status = HTTPStatus.SERVICE_UNAVAILABLE


class OverloadedError(UnavailableError):
    """More is on its way than the server takes."""


class EngineDiedError(QSharpError):
    """The server ended because its engine did; the exit status says so."""


class SampleFailure(CriticFailure, GenerationError):
    """A sample whose critic failed: a 500, or an event in a stream that has begun."""


# The names that vLLM uses.
TYPES = {
    HTTPStatus.BAD_REQUEST: "BadRequestError",
    HTTPStatus.UNAUTHORIZED: "AuthenticationError",
    HTTPStatus.FORBIDDEN: "PermissionDeniedError",
    HTTPStatus.NOT_FOUND: "NotFoundError",
    HTTPStatus.REQUEST_TIMEOUT: "RequestTimeoutError",
    HTTPStatus.CONFLICT: "ConflictError",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "RequestTooLargeError",
    HTTPStatus.TOO_MANY_REQUESTS: "RateLimitError",
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: "RequestTooLargeError",
    HTTPStatus.SERVICE_UNAVAILABLE: "ServiceUnavailableError",
}

UNREAD = {
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
}


def status_of(error: QSharpError) -> HTTPStatus:
    """The HTTP status that an error is answered with."""
    if isinstance(error, HTTPError):
        return error.status
    if isinstance(error, NoCriticError):
        return HTTPStatus.CONFLICT
    if isinstance(error, GuidanceError | CriticError | RolloutError):
        return HTTPStatus.BAD_REQUEST
    if isinstance(error, StoreError):
        return HTTPStatus.SERVICE_UNAVAILABLE
    return HTTPStatus.INTERNAL_SERVER_ERROR


def response_of(error: QSharpError) -> JSONResponse:
    """The HTTP response to a request that failed with this error."""
    status = status_of(error)
    headers = {}
    if status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, HTTPError) and error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if status in UNREAD:
        headers["Connection"] = "close"  # what is left of the request is not read any more
    # Messages repeat what clients sent, which may be text that cannot be encoded.
    return JSONResponse(cleaned(body_of(error)), status_code=status, headers=headers)


def body_of(error: QSharpError) -> Mapping[str, Any]:
    """The body of that response as JSON's data, which also serves as an event of a stream."""
    status = status_of(error)
    return {
        "error": {
            "message": str(error),
            "type": TYPES.get(status, "InternalServerError"),
            "param": getattr(error, "param", None),
            "code": status.value,
            **getattr(error, "details", {}),
        }
    }


async def handle(_: Request, error: Exception) -> JSONResponse:
    """Handles a `QSharpError` that a route raises, for FastAPI."""
    assert isinstance(error, QSharpError)
    return response_of(error)


async def handle_no_route(_: Request, error: Exception) -> JSONResponse:
    """Handles what Starlette's router raises where no route takes a request (404, 405), for FastAPI."""
    assert isinstance(error, HTTPException)
    body = {"message": error.detail, "type": TYPES.get(error.status_code, "BadRequestError")}  # type: ignore[call-overload]
    return JSONResponse(
        {"error": {**body, "param": None, "code": error.status_code}}, error.status_code, headers=error.headers
    )


async def handle_depth(_: Request, error: Exception) -> JSONResponse:
    """Handles a `RecursionError`, which JSON raises that is nested thousands of levels deep, for FastAPI."""
    return response_of(GuidanceError("the body is nested too deeply", "body"))
