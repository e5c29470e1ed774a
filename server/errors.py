"""The one place where errors become HTTP: OpenAI's `{"error": {message, type, param, code}}`.

Errors that only HTTP knows, beside those of `qsharp_core.errors`:

    QSharpError
    └── HTTPError             with a status of its own
        ├── UnauthorizedError     401: no admin key was sent
        ├── ForbiddenError        403: a wrong one, or the server has none
        ├── NotFoundError         404: the path names a critic that is not loaded
        ├── ConflictError         409: not in the present state
        └── UnavailableError      503: the engine does not answer

In a stream that has begun vLLM writes the error event, from a `GenerationError` without a stack trace in the log. So a
sample ends with a `SampleFailure`, which is that and a `CriticFailure`.
"""

from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from vllm.exceptions import GenerationError

from qsharp_core.errors import CriticError, CriticFailure, GuidanceError, NoCriticError, QSharpError, RolloutError


class HTTPError(QSharpError):
    """An error of the HTTP interface alone."""

    status = HTTPStatus.INTERNAL_SERVER_ERROR


class UnauthorizedError(HTTPError):
    """No credentials."""

    status = HTTPStatus.UNAUTHORIZED


class ForbiddenError(HTTPError):
    """Not with these credentials, or not on this server."""

    status = HTTPStatus.FORBIDDEN


class NotFoundError(HTTPError):
    """What the path names does not exist."""

    status = HTTPStatus.NOT_FOUND


class ConflictError(HTTPError):
    """What is asked does not fit the present state; the message says what would."""

    status = HTTPStatus.CONFLICT


class UnavailableError(HTTPError):
    """The engine does not answer."""

    status = HTTPStatus.SERVICE_UNAVAILABLE


class SampleFailure(CriticFailure, GenerationError):
    """A sample whose critic failed: 500, also as an event of a stream."""


# As vLLM names them.
TYPES = {
    HTTPStatus.BAD_REQUEST: "BadRequestError",
    HTTPStatus.UNAUTHORIZED: "AuthenticationError",
    HTTPStatus.FORBIDDEN: "PermissionDeniedError",
    HTTPStatus.NOT_FOUND: "NotFoundError",
    HTTPStatus.CONFLICT: "ConflictError",
    HTTPStatus.SERVICE_UNAVAILABLE: "ServiceUnavailableError",
}


def status_of(error: QSharpError) -> HTTPStatus:
    """The status an error is answered with."""
    if isinstance(error, HTTPError):
        return error.status
    if isinstance(error, NoCriticError):
        return HTTPStatus.CONFLICT
    if isinstance(error, GuidanceError | CriticError | RolloutError):
        return HTTPStatus.BAD_REQUEST
    return HTTPStatus.INTERNAL_SERVER_ERROR


def response_of(error: QSharpError) -> JSONResponse:
    """The answer to a request that failed with this error."""
    status = status_of(error)
    headers = {"WWW-Authenticate": "Bearer"} if status == HTTPStatus.UNAUTHORIZED else None
    return JSONResponse(body_of(error), status_code=status, headers=headers)


def body_of(error: QSharpError) -> dict[str, Any]:
    """The same answer as JSON's data, also for an event of a stream."""
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
    """FastAPI's exception handler for `QSharpError`."""
    assert isinstance(error, QSharpError)
    return response_of(error)
