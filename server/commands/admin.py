"""What commands have in common that an admin gives a running server: a client, and the flags that say which server."""

import argparse
from collections.abc import Mapping
from types import TracebackType
from typing import Self, TypeVar

import httpx
from pydantic import BaseModel

from qsharp_core.errors import QSharpError
from qsharp_core.secret_files import secret

DEFAULT_URL = "http://localhost:8000"
# A critic's weights are read while the caller waits; the server gives up before this.
TIMEOUT = 660.0
Answer = TypeVar("Answer", bound=BaseModel)


class AdminError(QSharpError):
    """The server refused, or cannot be reached."""


class AdminClient:
    """A client of a running server's admin routes.

    Args:
        url: of the server, with or without `/v1`.
        key: sent as bearer token.
    """

    def __init__(self, url: str, key: str | None) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url.rstrip("/").removesuffix("/v1"), headers=headers, timeout=TIMEOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def call(
        self,
        answer: type[Answer],
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: BaseModel | None = None,
    ) -> Answer:
        """The server's answer to one request.

        Args:
            answer: the model that it is parsed as.
            method: of HTTP.
            path: of the route.
            query: follows the path.
            body: sent as JSON.

        Raises:
            AdminError: the server cannot be reached, or it refused; then with its message.
        """
        response = self._send(method, path, query, None if body is None else body.model_dump())
        if response.is_error:
            raise AdminError(_message_of(response))
        return answer.model_validate_json(response.content)

    def text(self, token: int) -> str | None:
        """The text of a token; None where the server does not tell.

        Raises:
            AdminError: the server cannot be reached.
        """
        response = self._send("POST", "/detokenize", None, {"tokens": [token]})
        return None if response.is_error else str(response.json()["prompt"])

    def _send(self, method: str, path: str, query: Mapping[str, str] | None, body: object) -> httpx.Response:
        try:
            return self._http.request(method, path, params=query, json=body)
        except httpx.HTTPError as error:
            raise AdminError(f"{self._http.base_url} cannot be reached: {error}") from error


def add_server_arguments(parser: argparse.ArgumentParser, again: bool = False) -> None:
    """Adds the flags that say which server.

    Args:
        parser: of a command, or of a sub-command.
        again: these flags may stand before the sub-command, too, and then hold unless they are repeated.
    """
    key = secret("QSHARP_ADMIN_KEY") or secret("QSHARP_API_KEY")
    parser.add_argument(
        "--url",
        default=argparse.SUPPRESS if again else secret("QSHARP_URL") or DEFAULT_URL,
        help="of the server (default: QSHARP_URL, or a server on this machine)",
    )
    parser.add_argument(
        "--admin-key",
        "--api-key",
        default=argparse.SUPPRESS if again else key,
        help="needed to change something (default: QSHARP_ADMIN_KEY, or QSHARP_API_KEY)",
    )


def _message_of(response: httpx.Response) -> str:
    try:
        error = response.json()["error"]
        message = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        message = response.text[:200]
    return f"{response.status_code}: {message}"
