"""`qsharp.Client`: a client of a server for notebooks, with typed responses."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qsharp_core.locations import Location, parse_location
from qsharp_core.wire.guidance import BUDGETS
from qsharp_core.wire.reports import ChoiceGuidance, Part
from trainer.api.calling import run
from trainer.rollouts.address import default_key, default_url
from trainer.rollouts.client import JSONObject, ServerClient
from trainer.rollouts.errors import RequestError
from trainer.rollouts.retrying import Tell

DEFAULTS = {"max_tokens": 256, "temperature": 1.0}
"""Fields of requests that name neither: the model's own policy, and no 16 tokens."""


class CompletionChoice(Part):
    """One of the completions of a request; `rollout_id` is there if it was stored."""

    text: str
    finish_reason: str | None = None
    guidance: ChoiceGuidance | None = None
    rollout_id: str | None = None


class Completions(Part):
    """A response."""

    id: str
    model: str
    choices: list[CompletionChoice]

    @property
    def texts(self) -> list[str]:
        """The texts of all choices."""
        return [choice.text for choice in self.choices]


class ServedVersion(Part):
    """A critic that is loaded: `id` is `name@version`, and `active` whether its bare name means this version."""

    id: str
    name: str
    version: str
    active: bool
    default: bool


class Client:
    """A client of a running server. It opens a connection for each call, so it needs no closing.

    Args:
        url, api_key: of the server; None are `QSHARP_URL` and `QSHARP_API_KEY`.
        patience: seconds that a request is tried for; None are 600, and 10 until the server has answered once.
        tell: is told that the server cannot be reached.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        patience: float | None = None,
        tell: Tell = print,
    ) -> None:
        self.url = url or default_url()
        self.api_key = api_key or default_key()
        self._patience = patience
        self._tell = tell

    def complete(
        self,
        prompt: str | Sequence[int],
        *,
        eta: float | None = None,
        guidance: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> Completions:
        """Samples completions of a prompt.

        Args:
            prompt: text or token ids.
            eta: strength of the guidance, in units of reward; smaller is stronger, None is the model itself, and with a
                budget what the critic recommends.
            guidance: its options, such as `{"critic": "sums@2", "candidates": 8, "detail": "tokens"}`, or a budget of
                nats, `{"kl_total": 2.0}`.
            fields: further fields of the request, such as `n`, `max_tokens`, `stop`, `seed`, `store`.

        Raises:
            RequestError
        """
        question = {"prompt": prompt if isinstance(prompt, str) else list(prompt)}
        return self._sample("/v1/completions", question, eta, guidance, fields)

    def chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        *,
        eta: float | None = None,
        guidance: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> Completions:
        """Samples answers in a chat; a text is a single message of the user. The arguments are those of `complete`.

        Raises:
            RequestError
        """
        given = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        return self._sample("/v1/chat/completions", {"messages": given}, eta, guidance, fields)

    def critics(self) -> list[ServedVersion]:
        """The critics that are loaded.

        Raises:
            RequestError
        """
        listed = self._call("GET", "/v1/critics")["data"]
        return [ServedVersion.model_validate(one) for one in listed]

    def load_critic(self, folder: str | Location, *, activate: bool = True) -> ServedVersion:
        """Loads a critic into the server, which must see its folder at the same path or URL. Needs the admin's key.

        Raises:
            RequestError
        """
        place = parse_location(folder)
        path = str(place.resolve() if isinstance(place, Path) else place)
        body = {"path": path, "activate": activate}
        return ServedVersion.model_validate(self._call("POST", "/v1/critics", body))

    def score(self, prompt: str, completions: str | Sequence[str], critic: str | None = None) -> list[list[float]]:
        """The reward that a critic expects after each token of completions; a native critic cannot say that.

        Args:
            prompt: what they complete.
            completions: one or several.
            critic: `name` or `name@version`; None is the server's first.

        Raises:
            RequestError: above all, that there is no critic, or that it is a native one.
        """
        name = critic or next((one.id for one in self.critics() if one.default), None)
        if name is None:
            raise RequestError(f"{self.url} has no critic that could score")
        given = [completions] if isinstance(completions, str) else list(completions)
        answer = self._call("POST", f"/v1/critics/{name}/score", {"prompt": prompt, "completion": given})
        return [list(entry["values"]) for entry in answer["data"]]

    def _sample(
        self,
        route: str,
        question: JSONObject,
        eta: float | None,
        guidance: Mapping[str, Any] | None,
        fields: Mapping[str, Any],
    ) -> Completions:
        options = dict(guidance or {})
        # Without an eta of its own a budget takes the critic's; null would mean no guidance at all.
        strength = {} if eta is None and not options.keys().isdisjoint(BUDGETS) else {"eta": eta}
        body = {**DEFAULTS, **question, **strength, **({"guidance": options} if options else {}), **fields}
        answer = self._call("POST", route, body, named=False)
        for choice in answer["choices"]:
            if "message" in choice:
                choice["text"] = choice["message"].get("content") or ""
        return Completions.model_validate(answer)

    def _call(self, method: str, path: str, body: JSONObject | None = None, *, named: bool = True) -> JSONObject:
        """The server's answer; a body that is not `named` gets the name of the served model, unless it has one."""

        async def work() -> JSONObject:
            async with ServerClient(self.url, key=self.api_key, patience=self._patience, tell=self._tell) as server:
                if method == "GET":
                    return await server.get(path)
                assert body is not None
                return await server.post(path, body if named else {"model": await server.model(), **body})

        return run(work())
