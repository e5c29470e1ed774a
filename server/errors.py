"""Turns errors into HTTP responses, and nothing else does: OpenAI's `{"error": {message, type, param, code}}`.

Beside the errors of `qsharp_core.errors` there are some that only the HTTP interface has:

    QSharpError
    └── HTTPError             with a status of its own
        ├── UnauthorizedError     401: the request carries no admin key
        ├── ForbiddenError        403: it carries a wrong one, or the server has none
        ├── NotFoundError         404: what the path names does not exist
        ├── ConflictError         409: the request does not fit the present state
        └── UnavailableError      503: the engine does not answer

When a stream has begun, vLLM itself writes the event that reports an error, and it logs no stack trace for a
`GenerationError`. So a sample whose critic fails ends with a `SampleFailure`, which is both that and a `CriticFailure`.
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from vllm.exceptions import GenerationError

from qsharp_core.errors import CriticError, CriticFailure, GuidanceError, NoCriticError, QSharpError, RolloutError
from qsharp_core.rollouts.text import cleaned


class HTTPError(QSharpError):
    """An error that only the HTTP interface has."""

    status = HTTPStatus.INTERNAL_SERVER_ERROR


class UnauthorizedError(HTTPError):
    """The request carries no credentials."""

    status = HTTPStatus.UNAUTHORIZED


class ForbiddenError(HTTPError):
    """The credentials are wrong, or this server allows this to nobody."""

    status = HTTPStatus.FORBIDDEN


class NotFoundError(HTTPError):
    """What the path names does not exist."""

    status = HTTPStatus.NOT_FOUND


class ConflictError(HTTPError):
    """The request does not fit the present state; the message says what would."""

    status = HTTPStatus.CONFLICT


class UnavailableError(HTTPError):
    """The engine does not answer."""

    status = HTTPStatus.SERVICE_UNAVAILABLE


class SampleFailure(CriticFailure, GenerationError):
    """A sample whose critic failed: a 500, or an event in a stream that has begun."""


# The names that vLLM uses.
TYPES = {
    HTTPStatus.BAD_REQUEST: "BadRequestError",
    HTTPStatus.UNAUTHORIZED: "AuthenticationError",
    HTTPStatus.FORBIDDEN: "PermissionDeniedError",
    HTTPStatus.NOT_FOUND: "NotFoundError",
    HTTPStatus.CONFLICT: "ConflictError",
    HTTPStatus.SERVICE_UNAVAILABLE: "ServiceUnavailableError",
}


def status_of(error: QSharpError) -> HTTPStatus:
    """The HTTP status that an error is answered with."""
    if isinstance(error, HTTPError):
        return error.status
    if isinstance(error, NoCriticError):
        return HTTPStatus.CONFLICT
    if isinstance(error, GuidanceError | CriticError | RolloutError):
        return HTTPStatus.BAD_REQUEST
    return HTTPStatus.INTERNAL_SERVER_ERROR


def response_of(error: QSharpError) -> JSONResponse:
    """The HTTP response to a request that failed with this error."""
    status = status_of(error)
    headers = {"WWW-Authenticate": "Bearer"} if status == HTTPStatus.UNAUTHORIZED else None
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
