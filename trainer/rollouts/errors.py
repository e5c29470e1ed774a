"""What a request to a server can end with, other than the answer that was asked for.

RequestError           the server cannot be reached, or does not answer as expected
├── RefusedError       the server answered with an error that sending the request again will not change
└── TransientError     another attempt may succeed
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import httpx

from qsharp_core.errors import QSharpError

LONGEST_WAIT = 20.0
"""Seconds: the most that is waited between two attempts."""
NO_SERVER = "NoServerError"
"""The error's type if no server is behind the balancer of docker/haproxy."""
TRANSIENT = (
    HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT,
)  # fmt: skip


class RequestError(QSharpError):
    """The server cannot be reached, or does not answer as expected."""


class RefusedError(RequestError):
    """The server answered with an error; `status`, `param` and `details` are the answer's."""

    def __init__(self, message: str, status: int, param: str | None, details: Mapping[str, Any]) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.param = param
        self.details = details


class TransientError(RequestError):
    """The request failed, and another attempt may succeed.

    Attributes:
        unsure: whether the server may have served the request all the same.
        wait: seconds to wait at least before the next attempt.
        busy: whether the server is there, and takes no more for now.
        internal: whether the server answered 500. Such a request is given up after a few attempts: the error may be
            the request's own, and would then come every time.
    """

    def __init__(
        self, message: str, *, unsure: bool = False, wait: float = 0.0, busy: bool = False, internal: bool = False
    ) -> None:
        super().__init__(message)
        self.unsure = unsure
        self.wait = wait
        self.busy = busy
        self.internal = internal


def check(url: str, response: httpx.Response) -> None:
    """Returns if the response is a success, and raises if it is an error; an error's body must have been read.

    Raises:
        TransientError, RefusedError
    """
    if response.status_code in TRANSIENT:
        raise TransientError(
            f"{url} answers {response.status_code}: {_error_of(response)['message']}",
            # A proxy sends these two, and the server behind it may have served the request.
            unsure=response.status_code in (HTTPStatus.BAD_GATEWAY, HTTPStatus.GATEWAY_TIMEOUT),
            wait=_retry_after(response),
            busy=_is_busy(response),
        )
    if response.status_code == HTTPStatus.INTERNAL_SERVER_ERROR:
        raise TransientError(f"500: {_error_of(response)['message']}", unsure=True, internal=True)
    if response.is_error:
        fields = _error_of(response)
        raise RefusedError(fields.pop("message"), response.status_code, fields.pop("param", None), fields)


def describe(error: Exception) -> str:
    """An exception's class and message, in one line."""
    return f"{type(error).__name__} {error}".strip()


def _is_busy(response: httpx.Response) -> bool:
    """Whether a server takes no more for now; not so one that goes down, or a balancer that has none."""
    refused = response.status_code in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
    return refused and "Retry-After" in response.headers and _error_of(response).get("type") != NO_SERVER


def _retry_after(response: httpx.Response) -> float:
    text = response.headers.get("Retry-After", "")
    return min(float(text), LONGEST_WAIT) if text.isascii() and text.isdigit() else 0.0


def _error_of(response: httpx.Response) -> dict[str, Any]:
    """OpenAI's error object; whatever the response is, the result has a `message`."""
    try:
        error = response.json()["error"]
        if isinstance(error, dict) and isinstance(error.get("message"), str):
            return error
    except (ValueError, KeyError, TypeError):
        pass
    return {"message": response.text[:200]}
