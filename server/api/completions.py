"""`POST /v1/completions` and `POST /v1/chat/completions`: vLLM's own, with `eta` and `guidance`.

They parse our request models, admit the request, and leave the rest to vLLM's own route functions. The handlers that
these call sample through our proxy, and report what was done for each choice (`server.request.responses.install`).
"""

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from vllm.entrypoints.openai.chat_completion.api_router import create_chat_completion
from vllm.entrypoints.openai.completion.api_router import create_completion
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import validate_json_request
from vllm.utils import random_uuid

from server.access.gate import held
from server.access.principal import principal_of
from server.request import recording, schema
from server.request.admission import admit
from server.request.call import CALL, UNGUIDED
from server.request.schema import GuidedChatCompletionRequest, GuidedCompletionRequest, GuidedRequest
from server.request.slots import samples_of
from server.request.virtual_models import answering_as
from server.state import state_of

PATHS = ("/v1/completions", "/v1/chat/completions")


class GuidedRoute(APIRoute):
    """Reports wrong values of our fields in our words; errors about vLLM's fields stay as they are."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, with our errors."""
        handler = super().get_route_handler()

        async def explained(request: Request) -> Response:
            try:
                return await handler(request)
            except RequestValidationError as error:
                limits = state_of(request).settings
                ours = schema.explain(error.errors(), limits.max_candidates, limits.max_search)
                if ours is not None:
                    raise ours from error
                raise

        return explained


async def completions(request: GuidedCompletionRequest, raw_request: Request) -> Any:
    """Samples completions, guided as `eta` and `guidance` say."""
    return await _serve(create_completion, request, raw_request)


async def chat_completions(request: GuidedChatCompletionRequest, raw_request: Request) -> Any:
    """Samples chat completions, guided as `eta` and `guidance` say."""
    return await _serve(create_chat_completion, request, raw_request)


async def _serve(create: Callable[[Any, Request], Awaitable[Any]], request: GuidedRequest, raw_request: Request) -> Any:
    state = state_of(raw_request)
    # Names the response, and with it what is stored: not for clients to choose.
    request.request_id = random_uuid()  # type: ignore[attr-defined]
    until_its_end = held(raw_request.scope)
    model = state.models.find(request.model)  # type: ignore[attr-defined]
    samples = samples_of(request)
    who = request.user or request.request_id  # type: ignore[attr-defined]
    await state.meet((request.guidance and request.guidance.critic) or (model.critic if model else None))
    call = admit(request, state.settings, state.critics.catalog, model, who)
    if call is not None:
        call.samples = samples
        until_its_end.callback(call.release)
    until_its_end.enter_context(state.slots.take(samples))
    token, unguided = CALL.set(call), UNGUIDED.set(call is None)
    try:
        if request.store:
            assert call is not None
            body = await raw_request.json()
            sender = principal_of(raw_request)
            call.recording = await recording.begin(request, body, state.store, state.tokenizer, call.params, sender)
            call.recording.model = model.served if model is not None else None
            call.recording.search = call.search
        with answering_as(model):
            return await create(request, raw_request)
    finally:
        CALL.reset(token)
        UNGUIDED.reset(unguided)


def attach(app: FastAPI) -> None:
    """Adds the two routes to the app; vLLM then removes its own routes of the same paths."""
    endpoints: tuple[Callable[..., Any], ...] = (completions, chat_completions)
    for path, endpoint in zip(PATHS, endpoints, strict=True):
        app.router.add_api_route(
            path,
            endpoint,
            methods=["POST"],
            dependencies=[Depends(validate_json_request)],
            responses={
                200: {"content": {"text/event-stream": {}}},
                **{code: {"model": ErrorResponse} for code in (400, 404, 409, 500)},
            },
            route_class_override=GuidedRoute,
        )
