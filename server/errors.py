"""The one place where errors become HTTP: OpenAI's `{"error": {message, type, param, code}}`.

Errors that only HTTP knows, beside those of `qsharp_core.errors`:

    QSharpError
    └── HTTPError             with a status of its own
        ├── UnauthorizedError     401: no admin key was sent
        ├── ForbiddenError        403: a wrong one, or the server has none
        ├── NotFoundError         404: the path names a critic that is not loaded
        ├── ConflictError         409: not in the present state
        └── UnavailableError      503: the engine does not answer

In a stream that has begun vLLM writes the error event; it takes a `CriticFailure` for a 500, as this does.
"""

from http import HTTPStatus

from fastapi import Request
from fastapi.responses import JSONResponse

from qsharp_core.errors import CriticError, GuidanceError, NoCriticError, QSharpError


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
    if isinstance(error, GuidanceError | CriticError):
        return HTTPStatus.BAD_REQUEST
    return HTTPStatus.INTERNAL_SERVER_ERROR


def response_of(error: QSharpError) -> JSONResponse:
    """The answer to a request that failed with this error."""
    status = status_of(error)
    body = {
        "message": str(error),
        "type": TYPES.get(status, "InternalServerError"),
        "param": getattr(error, "param", None),
        "code": status.value,
    }
    headers = {"WWW-Authenticate": "Bearer"} if status == HTTPStatus.UNAUTHORIZED else None
    return JSONResponse({"error": body}, status_code=status, headers=headers)


async def handle(_: Request, error: Exception) -> JSONResponse:
    """FastAPI's exception handler for `QSharpError`."""
    assert isinstance(error, QSharpError)
    return response_of(error)
