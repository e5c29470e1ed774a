"""Stored chat completions as OpenAI's API has them: lists and shows them, updates their metadata, deletes them."""

import asyncio
from typing import Literal

from fastapi import APIRouter, FastAPI, Request
from pydantic import BaseModel, ConfigDict

from qsharp_core.errors import RolloutError
from qsharp_core.rollouts.records import Rollout
from server.access.principal import principal_of
from server.api.bodies import Json, checked, documented, json_object
from server.api.queries import ChatPageQuery, parse
from server.errors import NotFoundError
from server.request.schema import METADATA_ACCEPTS, Metadata
from server.state import state_of
from server.store.filters import Filters

PATH = "/v1/chat/completions"
# Every id begins so; vLLM has routes of its own below this path, which an open parameter would take over.
ONE = "/chatcmpl-{rest}"


class UpdateRequest(BaseModel):
    """Body of `POST /v1/chat/completions/{id}`: the metadata that replaces the present one."""

    model_config = ConfigDict(extra="forbid")
    metadata: Metadata | None


class Listed(BaseModel):
    """A page of a list, as OpenAI has it."""

    object: Literal["list"] = "list"
    data: list[Json]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    """The answer to a deletion."""

    object: Literal["chat.completion.deleted"] = "chat.completion.deleted"
    id: str
    deleted: Literal[True] = True


router = APIRouter(prefix=PATH)


@router.get("")
async def list_completions(request: Request) -> Listed:
    """Lists stored chat completions.

    The query's filters are `model` and `metadata[KEY]`; `after`, `limit` and `order` choose the page.
    """
    store, owner = state_of(request).store, principal_of(request).sees
    query = parse(request, ChatPageQuery)
    filters = Filters(model=query.model, metadata=query.metadata)
    responses, more = await asyncio.to_thread(
        store.responses, filters, query.after, query.limit, query.order, owner=owner
    )
    return _listed([completion(choices) for choices in responses], more)


@router.get(ONE)
async def show_completion(rest: str, request: Request) -> Json:
    """Shows a stored chat completion, as it was answered."""
    return completion(await _get(request, rest))


@router.post(ONE, openapi_extra=documented(UpdateRequest.model_json_schema()))
async def update_completion(rest: str, request: Request) -> Json:
    """Replaces the metadata of a stored chat completion."""
    store, owner = state_of(request).store, principal_of(request).sees
    body = checked(await json_object(request), UpdateRequest, {"metadata": METADATA_ACCEPTS})
    if not await store.set_metadata(_id(rest), body.metadata or {}, owner=owner):
        raise _unknown(rest)
    return completion(await _get(request, rest))


@router.delete(ONE)
async def delete_completion(rest: str, request: Request) -> Deleted:
    """Deletes a stored chat completion: all its rollouts, with their rewards."""
    if not await state_of(request).store.delete(_id(rest), owner=principal_of(request).sees):
        raise _unknown(rest)
    return Deleted(id=_id(rest))


@router.get(ONE + "/messages")
async def list_messages(rest: str, request: Request) -> Listed:
    """Lists the messages that a stored chat completion answers."""
    query = parse(request, ChatPageQuery)
    choices = await _get(request, rest)
    data = []
    for index, message in enumerate(choices[0].messages or ()):
        content = message.get("content")
        parts = content if isinstance(content, list) else None
        data.append(
            {**message, "id": f"{_id(rest)}-{index}", "content": None if parts else content, "content_parts": parts}
        )
    if query.order == "desc":
        data.reverse()
    if query.after is not None:
        start = next((i + 1 for i, message in enumerate(data) if message["id"] == query.after), None)
        if start is None:
            raise RolloutError(f"after must be the id of one of these messages; got {query.after!r:.100}", "after")
        data = data[start:]
    return _listed(data[: query.limit], len(data) > query.limit)


def completion(choices: list[Rollout]) -> Json:
    """OpenAI's object of a stored chat completion; its choices are rollouts, and each has its `rollout_id`."""
    first = choices[0]
    response = first.response or {}
    prompt, sampled = len(first.prompt_token_ids), sum(len(choice.completion_token_ids) for choice in choices)
    return {
        **response.get("request", {}),
        "id": first.request_id,
        "object": "chat.completion",
        "created": response.get("created", int(first.created)),
        "model": first.model,
        "system_fingerprint": response.get("system_fingerprint"),
        "temperature": first.sampling.temperature,
        "top_p": first.sampling.top_p,
        "seed": first.sampling.seed,
        "metadata": first.metadata,
        "choices": [_choice(choice) for choice in choices],
        "usage": {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled},
    }


def attach(app: FastAPI) -> None:
    """Adds these routes to the app."""
    app.include_router(router)


def _choice(rollout: Rollout) -> Json:
    plain: Json = {
        "index": rollout.choice,
        "message": {"role": "assistant", "content": rollout.completion_text},
        "logprobs": None,
        "finish_reason": rollout.finish_reason,
    }
    return {**(rollout.response or {}).get("choice", plain), "rollout_id": rollout.id}


def _listed(data: list[Json], more: bool) -> Listed:
    return Listed(
        data=data,
        first_id=data[0]["id"] if data else None,
        last_id=data[-1]["id"] if data else None,
        has_more=more,
    )


async def _get(request: Request, rest: str) -> list[Rollout]:
    store, owner = state_of(request).store, principal_of(request).sees
    choices = await asyncio.to_thread(store.response, _id(rest), owner=owner)
    if not choices:
        raise _unknown(rest)
    return choices


def _id(rest: str) -> str:
    return f"chatcmpl-{rest}"


def _unknown(rest: str) -> NotFoundError:
    return NotFoundError(f"no stored chat completion has the id {_id(rest)!r:.100}")
