"""The trainer's way to a server: HTTP, with retries, and with nothing sampled twice.

What passes by itself is tried again, with exponential backoff and jitter, until `patience` is over: 429, 502, 503, 504,
and connections that fail, so a server may be restarted under a running command. A 500 is tried a few times: it may be
a request's own (a critic that fails on it), or an engine about to go down.

When a connection breaks after a request was sent, nobody knows whether its rollout was stored. `sample` then asks the
store, by the item's key in the metadata, before it sends the request again.
"""

import argparse
import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from qsharp_core.errors import QSharpError
from qsharp_core.wire.metadata import ITEM

DEFAULT_URL = "http://localhost:8000"
PASSING = (429, 502, 503, 504)
FAILURES_TRIED = 4  # attempts at a request that is answered with a 500
LONGEST_WAIT = 20.0  # seconds between two attempts
PAGE = 200  # rollouts asked for at a time: one is some kilobytes


class ServerError(QSharpError):
    """The server cannot be reached, or does not answer as expected."""


class RefusedError(ServerError):
    """It answered with an error; `status`, `param` and `details` are the answer's."""

    def __init__(self, message: str, status: int, param: str | None, details: Mapping[str, Any]) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.param = param
        self.details = details


class PassingError(ServerError):
    """Worth another attempt. `unsure`: the request may have been served; `wait`: at least so many seconds."""

    def __init__(self, message: str, *, unsure: bool = False, wait: float = 0.0, counted: bool = False) -> None:
        super().__init__(message)
        self.unsure = unsure
        self.wait = wait
        self.counted = counted  # a 500: given up after FAILURES_TRIED


class Sampled:
    """A stored completion.

    Attributes:
        rollout: its id.
        tokens: how many were sampled for it; None if it was found in the store.
        choice: of the response; None if it was found in the store.
    """

    __slots__ = ("choice", "rollout", "tokens")

    def __init__(self, rollout: str, tokens: int | None = None, choice: dict[str, Any] | None = None) -> None:
        self.rollout = rollout
        self.tokens = tokens
        self.choice = choice


class ServerClient:
    """A running server. To be used as an async context manager.

    Args:
        url: of the server, with or without `/v1`.
        key: what is sent as bearer token.
        connections: most requests at once.
        timeout: seconds until a request that is not answered is given up, and tried again.
        patience: seconds that a request is tried for.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        connections: int = 16,
        timeout: float = 900.0,
        patience: float = 600.0,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.key = key
        self.patience = patience
        self.retries = 0
        try:
            parts = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise ServerError(f"{url!r} is not a URL: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.host:
            raise ServerError(f"{url!r} must be a URL, as {DEFAULT_URL}")
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout, connect=10.0, pool=None),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        )

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.__aexit__(kind, error, trace)

    async def get(self, path: str, params: Mapping[str, str | int] | None = None) -> dict[str, Any]:
        """The answer's JSON.

        Raises:
            ServerError
        """
        return await self._tried(lambda _: self._send("GET", path, params=dict(params or {})))

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer's JSON, of a request that does no harm when it is served twice.

        Raises:
            ServerError
        """
        return await self._tried(lambda _: self._send("POST", path, json=body))

    async def delete(self, path: str) -> None:
        """Has something removed; what is gone already is no error.

        Raises:
            ServerError
        """
        try:
            await self._tried(lambda _: self._send("DELETE", path))
        except RefusedError as error:
            if error.status != 404:
                raise

    async def sample(self, path: str, body: Mapping[str, Any]) -> Sampled:
        """One stored completion (`store: true`, one choice); `body["metadata"]["qsharp_item"]` is its key.

        Raises:
            ServerError
        """
        item = body["metadata"][ITEM]

        async def attempt(unsure: bool) -> Sampled:
            if unsure and (found := await self._find(item)) is not None:
                return Sampled(found)
            answer = await self._send("POST", path, json=body)
            try:
                (choice,) = answer["choices"]
                return Sampled(choice["rollout_id"], answer["usage"]["completion_tokens"], choice)
            except (KeyError, ValueError, TypeError) as error:
                raise ServerError(
                    f"{self.url} answers without a rollout's id: it must be a qsharp server of this version"
                ) from error

        return await self._tried(attempt)

    async def find(self, item: str) -> str | None:
        """The id of the rollout that was stored for an item; None if there is none.

        Raises:
            ServerError
        """
        return await self._tried(lambda _: self._find(item))

    async def pages(self, filters: Mapping[str, str | int], size: int = PAGE) -> AsyncIterator[list[dict[str, Any]]]:
        """All rollouts that the filters leave, in the order of commits.

        Raises:
            ServerError
        """
        query = {**filters, "limit": size}
        while True:
            page = await self.get("/v1/rollouts", query)
            if page["data"]:
                yield page["data"]
            if not page["has_more"]:
                return
            query["after"] = page["last_id"]

    async def model(self) -> str:
        """The name of the model that is served.

        Raises:
            ServerError
        """
        name: str = (await self.get("/v1/models"))["data"][0]["id"]
        return name

    async def critic(self, name: str | None) -> dict[str, Any] | None:
        """The critic that a request with `guidance.critic = name` gets now, as `/v1/critics` shows it; None: no critic.

        Raises:
            ServerError: no critic of that name is loaded.
        """
        loaded: list[dict[str, Any]] = (await self.get("/v1/critics"))["data"]
        if name is None:
            return next((critic for critic in loaded if critic["default"]), None)
        for critic in loaded:
            if critic["id"] == name or (critic["name"] == name and critic["active"]):
                return critic
        raise ServerError(f"critic {name!r} is not loaded; loaded are {', '.join(c['id'] for c in loaded) or 'none'}")

    async def _find(self, item: str) -> str | None:
        page = await self._send("GET", "/v1/rollouts", params={f"metadata.{ITEM}": item, "limit": 1})
        found: str | None = page["first_id"]
        return found

    async def _send(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        try:
            response = await self._http.request(method, path, **content)
        except (httpx.DecodingError, httpx.TooManyRedirects) as error:
            raise ServerError(f"{self.url} cannot be used: {error}") from error
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise PassingError(f"{self.url} cannot be reached: {_named(error)}") from error
        except httpx.TransportError as error:
            raise PassingError(f"{self.url} did not answer: {_named(error)}", unsure=True) from error
        check(self.url, response)
        try:
            answer: dict[str, Any] = response.json()
        except ValueError as error:
            raise ServerError(f"{self.url} answers {method} {path} with something else than JSON") from error
        return answer

    async def _tried(self, attempt: "Callable[[bool], Awaitable[Result]]") -> "Result":
        """Runs attempts, telling each whether one before it may have been served."""
        unsure = False
        trying = AsyncRetrying(
            retry=retry_if_exception_type(PassingError), wait=_wait, stop=self._given_up, before_sleep=self._count,
            reraise=True,
        )  # fmt: skip
        async for one in trying:
            with one:
                try:
                    return await attempt(unsure)
                except PassingError as error:
                    unsure = unsure or error.unsure
                    raise
        raise AssertionError("tenacity ends by returning or raising")

    def _given_up(self, state: RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, PassingError) and error.counted and state.attempt_number >= FAILURES_TRIED:
            return True
        return (state.seconds_since_start or 0.0) >= self.patience

    def _count(self, _: RetryCallState) -> None:
        self.retries += 1


Result = TypeVar("Result")
Item = TypeVar("Item")

_backoff = wait_random_exponential(multiplier=0.5, max=LONGEST_WAIT)


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked = error.wait if isinstance(error, PassingError) else 0.0
    return asked + _backoff(state)


async def each(items: Iterable[Item], do: Callable[[Item], Awaitable[None]], at_once: int) -> None:
    """Does something with every item, at most `at_once` of them at a time, in about their order.

    Raises:
        The first error; the others are cancelled then.
    """
    todo = iter(items)

    async def worker() -> None:
        for item in todo:
            await do(item)

    tasks = [asyncio.ensure_future(worker()) for _ in range(at_once)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def add_arguments(parser: argparse.ArgumentParser, concurrency: int | None = 16) -> None:
    """Options of every command that talks to a server."""
    group = parser.add_argument_group("server")
    group.add_argument("--url", default=DEFAULT_URL, help="of the server (default: %(default)s)")
    group.add_argument(
        "--api-key", default=os.environ.get("VLLM_API_KEY"), help="if it wants one (default: VLLM_API_KEY)"
    )
    group.add_argument("--patience", type=float, default=600.0, help="seconds a request is tried for (%(default)s)")
    if concurrency is not None:
        group.add_argument("--concurrency", type=positive, default=concurrency, help="requests at once (%(default)s)")


def positive(text: str) -> int:
    """A whole number from 1, from a command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def add_filter_arguments(parser: argparse.ArgumentParser) -> None:
    """Which rollouts: of every command that reads them."""
    group = parser.add_argument_group("rollouts")
    group.add_argument("--metadata", action="append", type=key_value, default=[], metavar="KEY=VALUE", help="they have")
    group.add_argument("--critic", help="guided by this one: NAME or NAME@VERSION")
    group.add_argument("--guided", choices=["true", "false"], help="throughout, by any critic")


def filters_of(args: argparse.Namespace) -> dict[str, str]:
    """The query of `GET /v1/rollouts`, from the command line."""
    query = {name: getattr(args, name) for name in ("critic", "guided") if getattr(args, name) is not None}
    return query | {f"metadata.{key}": value for key, value in args.metadata}


def key_value(text: str) -> tuple[str, str]:
    """`KEY=VALUE`, from a command line."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE; got {text!r}")
    return key, value


def check(url: str, response: httpx.Response) -> None:
    """Passes an answer that is none of an error's; its body must have been read if it is.

    Raises:
        PassingError, RefusedError
    """
    if response.status_code in PASSING:
        raise PassingError(
            f"{url} answers {response.status_code}: {_error_of(response)['message']}",
            # A proxy's answers: what stands behind it may have served the request.
            unsure=response.status_code in (502, 504),
            wait=_retry_after(response),
        )
    if response.status_code == 500:
        raise PassingError(f"500: {_error_of(response)['message']}", unsure=True, counted=True)
    if response.is_error:
        fields = _error_of(response)
        raise RefusedError(fields.pop("message"), response.status_code, fields.pop("param", None), fields)


def _named(error: Exception) -> str:
    return f"{type(error).__name__} {error}".strip()


def _retry_after(response: httpx.Response) -> float:
    text = response.headers.get("Retry-After", "")
    return min(float(text), LONGEST_WAIT) if text.isascii() and text.isdigit() else 0.0


def _error_of(response: httpx.Response) -> dict[str, Any]:
    """OpenAI's error object; with at least a message, whatever the answer is."""
    try:
        error = response.json()["error"]
        if isinstance(error, dict) and isinstance(error.get("message"), str):
            return error
    except (ValueError, KeyError, TypeError):
        pass
    return {"message": response.text[:200]}
