"""The trainer's way to a server: HTTP, with retries (`retrying`), and with nothing sampled twice.

When a connection breaks after a request was sent, nobody knows whether its rollout was stored. `sample` then asks the
store, by the item's key in the metadata, before it sends the request again.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from tenacity import AsyncRetrying

from qsharp_core.suggestions import did_you_mean
from qsharp_core.wire.metadata import ITEM
from trainer.rollouts.errors import RefusedError, RequestError, TransientError, check, describe
from trainer.rollouts.retrying import Patience, Tell

DEFAULT_URL = "http://localhost:8000"
PAGE = 200
"""Rollouts asked for at a time: one is some kilobytes."""
JSONObject = dict[str, Any]
"""A JSON object as the server sends it."""
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class StoredCompletion:
    """A completion that the server has stored as a rollout.

    Attributes:
        rollout: the rollout's id.
        tokens: how many tokens were sampled for it; None if it was found in the store.
        choice: the response's choice; None if it was found in the store.
    """

    rollout: str
    tokens: int | None = None
    choice: JSONObject | None = None


@dataclass(frozen=True, slots=True)
class StoredCount:
    """A number of stored rollouts.

    Attributes:
        count: how many.
        last_reward: the place of the last reward that was given before they were counted. `rewarded_after` it are those
            that got their first reward later. None of a server, or for a key, that does not tell.
    """

    count: int
    last_reward: int | None


class ServerClient:
    """A client of a running server, to be used as an async context manager.

    Args:
        url: the server's base URL, with or without `/v1`.
        key: sent as the bearer token.
        connections: the most connections, and so the most requests at once.
        timeout: seconds after which an unanswered request counts as failed, and is tried again.
        patience, tell: see `retrying.Patience`.
        scope: filters that every look into the store has, beside its own.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        connections: int = 16,
        timeout: float = 900.0,
        patience: float | None = None,
        scope: Mapping[str, str] | None = None,
        tell: Tell = lambda text: None,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.key = key
        self._patience = Patience(patience, tell)
        self.scope = dict(scope or {})
        try:
            parts = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise RequestError(f"{url!r} is not a URL: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.host:
            raise RequestError(f"{url!r} must be a URL, as {DEFAULT_URL}")
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout, connect=10.0, pool=None),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        )

    @property
    def patience(self) -> float:
        """Seconds after which a request to a server that has answered before is given up."""
        return self._patience.seconds

    @property
    def retries(self) -> int:
        """How many attempts were made beyond the first ones."""
        return self._patience.retries

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.__aexit__(kind, error, trace)

    async def get(self, path: str, params: Mapping[str, str | int] | None = None) -> JSONObject:
        """Sends a GET request and returns the JSON object of its answer.

        Raises:
            RequestError
        """
        return await self._tried(lambda _: self._send("GET", path, params=dict(params or {})))

    async def post(self, path: str, body: Mapping[str, Any]) -> JSONObject:
        """Sends a POST request that does no harm when it is served twice, and returns the JSON object of its answer.

        Raises:
            RequestError
        """
        return await self._tried(lambda _: self._send("POST", path, json=body))

    async def delete(self, path: str) -> None:
        """Sends a DELETE request; a 404 is no error, because what is to be removed is gone then.

        Raises:
            RequestError
        """
        try:
            await self._tried(lambda _: self._send("DELETE", path))
        except RefusedError as error:
            if error.status != 404:
                raise

    async def sample(self, path: str, body: Mapping[str, Any]) -> StoredCompletion:
        """Samples and stores one completion: a request with `store: true`, one choice, and its item in the metadata.

        Raises:
            RequestError
        """
        item = body["metadata"][ITEM]

        async def attempt(unsure: bool) -> StoredCompletion:
            if unsure and (rollout := await self._find(item)) is not None:
                return StoredCompletion(rollout)
            answer = await self._send("POST", path, json=body)
            try:
                (choice,) = answer["choices"]
                return StoredCompletion(choice["rollout_id"], answer["usage"]["completion_tokens"], choice)
            except (KeyError, ValueError, TypeError) as error:
                raise RequestError(
                    f"{self.url} answers without a rollout's id: it must be a qsharp server of this version"
                ) from error

        return await self._tried(attempt)

    async def find(self, item: str) -> str | None:
        """The id of the rollout that was stored for an item; None if there is none.

        Raises:
            RequestError
        """
        return await self._tried(lambda _: self._find(item))

    async def pages(self, filters: Mapping[str, str | int], size: int = PAGE) -> AsyncIterator[list[JSONObject]]:
        """Yields all rollouts that the filters leave, page by page, in the order of commits.

        Raises:
            RequestError
        """
        query = {**filters, **self.scope, "limit": size}
        while True:
            page = await self.get("/v1/rollouts", query)
            if page["data"]:
                yield page["data"]
            if not page["has_more"]:
                return
            query["after"] = page["last_id"]

    async def count(self, filters: Mapping[str, str | int]) -> int:
        """Counts the rollouts that the filters leave.

        Raises:
            RequestError
        """
        return (await self.counted(filters)).count

    async def counted(self, filters: Mapping[str, str | int]) -> StoredCount:
        """Counts the rollouts that the filters leave, and says where to count on from.

        Raises:
            RequestError
        """
        answer = await self.get("/v1/rollouts/count", {**filters, **self.scope})
        return StoredCount(int(answer["count"]), answer.get("last_reward"))

    async def model(self) -> str:
        """The name of the model that is served.

        Raises:
            RequestError
        """
        name: str = (await self.get("/v1/models"))["data"][0]["id"]
        return name

    async def critic(self, name: str | None) -> JSONObject | None:
        """The critic that a request with `guidance.critic = name` gets now, as `/v1/critics` shows it.

        Args:
            name: `name` or `name@version`; None is the server's default critic.

        Returns:
            None if no name is given and the server has no critic.

        Raises:
            RequestError: no critic of that name is loaded.
        """
        loaded: list[JSONObject] = (await self.get("/v1/critics"))["data"]
        if name is None:
            return next((critic for critic in loaded if critic["default"]), None)
        for critic in loaded:
            if critic["id"] == name or (critic["name"] == name and critic["active"]):
                return critic
        keys = [one["id"] for one in loaded]
        meant = did_you_mean(name, [*keys, *(one["name"] for one in loaded)])
        raise RequestError(f"critic {name!r} is not loaded; loaded are {', '.join(keys) or 'none'}{meant}")

    async def _find(self, item: str) -> str | None:
        page = await self._send("GET", "/v1/rollouts", params={f"metadata.{ITEM}": item, **self.scope, "limit": 1})
        rollout: str | None = page["first_id"]
        return rollout

    async def _send(self, method: str, path: str, **content: Any) -> JSONObject:
        try:
            response = await self._http.request(method, path, **content)
        except (httpx.DecodingError, httpx.TooManyRedirects) as error:
            raise RequestError(f"{self.url} cannot be used: {error}") from error
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise self._patience.unreachable(self.url, error) from error
        except httpx.TransportError as error:
            raise TransientError(f"{self.url} did not answer: {describe(error)}", unsure=True) from error
        self._patience.reached = True
        check(self.url, response)
        try:
            answer: JSONObject = response.json()
        except ValueError as error:
            raise RequestError(f"{self.url} answers {method} {path} with something else than JSON") from error
        return answer

    async def _tried(self, attempt: Callable[[bool], Awaitable[Result]]) -> Result:
        """Runs an attempt until one succeeds, telling each whether one before it may have been served."""
        unsure = False
        async for one in AsyncRetrying(**self._patience.policy()):
            with one:
                try:
                    return await attempt(unsure)
                except TransientError as error:
                    unsure = unsure or error.unsure
                    raise
        raise AssertionError("tenacity ends by returning or raising")
