"""Guides what vLLM's other routes sample: `eta` and `guidance` in their bodies, and the server's default eta.

They end in the same `generate` of the engine client as our two routes, so it is enough that the request is admitted
before its handler runs. What was done for it is reported where the route's format has room: on each choice, or beside
the other fields of the whole response, in a stream on the event that ends it.
"""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.utils import random_uuid

from qsharp_core.errors import GuidanceError, QSharpError
from server.access.gate import held
from server.api import completions
from server.api.bodies import replayed
from server.errors import response_of
from server.request import schema
from server.request.admission import admit, refuse_private
from server.request.call import CALL, UNGUIDED, GuidedCall
from server.request.schema import GuidedRequest
from server.request.slots import choices
from server.request.virtual_models import VirtualModel, answering_as

# Routes that sample, and the field that holds their prompt.
GUIDED = {
    "/v1/chat/completions/batch": "messages",
    "/v1/responses": "input",
    "/v1/messages": "messages",
    "/inference/v1/generate": "token_ids",
}
# Routes that ask the reference how likely some tokens are, and sample no text: they stay the reference's.
SCORING = ("/v1/systemone", "/generative_scoring")
STORES_ITSELF = "/v1/responses"  # has a `store` of its own
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
# The events that end a stream, and the field of theirs that holds the response; None: the event itself.
LAST_EVENTS = {"response.completed": "response", "response.incomplete": "response", "message_delta": None}


class GuideElsewhere:
    """ASGI middleware, which the gate hands bodies in one piece."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one ASGI connection."""
        path = _path(scope)
        if scope["type"] != "http" or scope["method"] != "POST" or path not in (*GUIDED, *SCORING):
            await self.app(scope, receive, send)
            return
        body, replay = await replayed(receive)
        try:
            call, model = await _admit(body, path, scope)
            if call is not None:
                held(scope).callback(call.release)
        except QSharpError as error:
            await response_of(error)(scope, receive, send)
            return
        token, unguided = CALL.set(call), UNGUIDED.set(call is None)
        try:
            with answering_as(model):
                await self.app(scope, replay, send if call is None else _Reporting(send, call).send)
        finally:
            CALL.reset(token)
            UNGUIDED.reset(unguided)


class _Reporting:
    """Puts on a response what was done for its choices."""

    def __init__(self, send: Send, call: GuidedCall) -> None:
        self._send = send
        self._call = call
        self._start: Message | None = None  # held back until a whole body and its length are known
        self._body = b""

    async def send(self, message: Message) -> None:
        """Sends a message of the response."""
        if message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"")
            if kind.startswith(b"application/json"):
                self._start = message
                return
        elif message["type"] == "http.response.body":
            if self._start is not None:
                self._body += message.get("body", b"")
                if message.get("more_body", False):
                    return
                body = self._whole(self._body)
                headers = [(n, v) for n, v in self._start["headers"] if n != b"content-length"]
                headers.append((b"content-length", str(len(body)).encode()))
                await self._send({**self._start, "headers": headers})
                message = {"type": "http.response.body", "body": body}
                self._start = None
            else:
                message = {**message, "body": self._events(message.get("body", b""))}
        await self._send(message)

    def _whole(self, body: bytes) -> bytes:
        results = self._reports()
        payload = json.loads(body)
        if not results or not isinstance(payload, dict):
            return body
        choices = payload.get("choices")
        if isinstance(choices, list):
            for choice, result in zip(choices, results, strict=False):
                choice["guidance"] = result
        else:
            payload["guidance"] = results[-1]
        return json.dumps(payload, ensure_ascii=False).encode()

    def _events(self, chunk: bytes) -> bytes:
        if not any(name.encode() in chunk for name in LAST_EVENTS):
            return chunk
        return b"\n\n".join(self._event(event) for event in chunk.split(b"\n\n"))

    def _event(self, event: bytes) -> bytes:
        head, mark, data = event.rpartition(b"data: ")
        try:
            payload = json.loads(data)
        except ValueError:
            return event
        kind = payload.get("type") if isinstance(payload, dict) else None
        results = self._reports()
        if kind not in LAST_EVENTS or not results:
            return event
        inner = LAST_EVENTS[kind]
        (payload if inner is None else payload[inner])["guidance"] = results[-1]
        return head + mark + json.dumps(payload, ensure_ascii=False).encode()

    def _reports(self) -> list[Mapping[str, Any]]:
        if self._call.detail == "none":
            return []
        return [result.dump() for _, result in sorted(self._call.results.items())]


async def _admit(body: bytes, path: str, scope: Scope) -> tuple[GuidedCall | None, VirtualModel | None]:
    """The state that the request is served with, None if it is not guided, and need not be; and the virtual model.

    Raises:
        GuidanceError: names the field that is wrong.
    """
    try:
        fields: Any = json.loads(body)
    except (ValueError, RecursionError):
        return None, None  # the route says what is wrong with it
    if not isinstance(fields, dict):
        return None, None
    for holder in (fields, fields.get("sampling_params")):
        if isinstance(holder, dict):
            for name in ("vllm_xargs", "extra_args"):
                refuse_private(holder.get(name), name)
    state = scope["app"].state.qsharp
    samples = _samples(fields, state.settings.max_search)
    model = state.models.find(fields.get("model"))
    # A load of a critic may be waited for, and holds nobody's place.
    named = _inner(fields, "guidance").get("critic") or (model.critic if model else None)
    await state.meet(named if isinstance(named, str) else None)
    held(scope).enter_context(state.slots.take(samples))
    ours = {name: fields[name] for name in ("eta", "guidance") if name in fields}
    if fields.get("store") is True and path != STORES_ITSELF:
        raise _misplaced("store")
    if path in SCORING:
        asked = next((name for name, value in ours.items() if value is not None), None)
        if asked is not None:
            raise _misplaced(asked)
        return None, model
    try:
        request = GuidedRequest.model_validate(ours)
    except ValidationError as error:
        errors = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
        explained = schema.explain(errors, state.settings.max_candidates, state.settings.max_search)
        raise explained or GuidanceError(str(error), "guidance") from error
    if not ours and model is None and state.settings.default_eta is None:
        return None, None
    user = fields.get("user")
    who = user if isinstance(user, str) and user else random_uuid()
    call = admit(request, state.settings, state.critics.catalog, model, who)
    if call is not None:
        call.prompt_field = GUIDED[path]
        call.samples = samples
        holders = (fields, fields.get("sampling_params"))
        call.limit_given = any(isinstance(h, dict) and h.get(name) is not None for h in holders for name in LIMITS)
    return call, model


def _samples(fields: Mapping[str, Any], max_search: int) -> int:
    """How many samples the request asks for, as far as that can be told before its handler looks at it.

    Args:
        max_search: the most samples of a search; one of more is refused later.
    """
    messages = fields.get("messages")
    conversations = len(messages) if isinstance(messages, list) and messages and isinstance(messages[0], list) else 1
    search = _inner(_inner(fields, "guidance"), "search").get("n")
    searched = min(search, max_search) if isinstance(search, int) else 1
    return conversations * max(choices(fields.get("n")), searched)


def _inner(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    inner = fields.get(name)
    return inner if isinstance(inner, dict) else {}


def _misplaced(param: str) -> GuidanceError:
    return GuidanceError(f"{param} is not supported here: send it to {' or '.join(completions.PATHS)}", param)


def _path(scope: Scope) -> str:
    path: str = scope.get("path", "").removeprefix(scope.get("root_path", ""))
    return path
