"""`/v1/critics`: which critics are loaded; loading, activating, unloading and rolling back (admin); scoring."""

import asyncio
import logging
import secrets
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, Strict

from qsharp_core.errors import GuidanceError, NoCriticError, QSharpError, UnknownCriticError
from server.api.scoring import ScoreRequest, sequences
from server.critics.catalog import CriticInfo
from server.errors import ConflictError, ForbiddenError, NotFoundError, UnauthorizedError
from server.state import QSharpState, state_of

logger = logging.getLogger("vllm.qsharp")
PATH = "/v1/critics"


class LoadRequest(BaseModel):
    """Body of `POST /v1/critics`."""

    model_config = ConfigDict(extra="forbid")
    path: str = Field(min_length=1, description="the critic's folder, on the server's machine")
    name: str | None = Field(default=None, description="to be called so, whatever its card says")
    activate: Annotated[bool, Strict()] = Field(default=False, description="also make it the version its name means")


class ActivateRequest(BaseModel):
    """Body of `POST /v1/critics/{name}/activate`."""

    model_config = ConfigDict(extra="forbid")
    version: str


async def require_admin(request: Request, authorization: Annotated[str | None, Header()] = None) -> None:
    """Lets a request pass that carries the admin key.

    Raises:
        UnauthorizedError, ForbiddenError.
    """
    key = state_of(request).settings.admin_key
    if key is None:
        raise ForbiddenError(
            "critics cannot be changed on this server: start it with --admin-key KEY or QSHARP_ADMIN_KEY to allow it"
        )
    scheme, _, given = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not given:
        raise UnauthorizedError("this needs the admin key: Authorization: Bearer <admin key>")
    if not secrets.compare_digest(given.encode(), key.get_secret_value().encode()):
        raise ForbiddenError("this is not the admin key")


router = APIRouter(prefix=PATH)
admin = [Depends(require_admin)]


@router.get("")
async def list_critics(request: Request) -> dict[str, Any]:
    """All loaded versions."""
    state = state_of(request)
    await state.refresh()
    return {"object": "list", "data": [_shown(state, info) for info in state.registry.critics.values()]}


@router.post("", dependencies=admin)
async def load_critic(body: LoadRequest, request: Request) -> dict[str, Any]:
    """Loads a critic beside the running engine; the first version of a name becomes its active one."""
    state = state_of(request)
    key = await state.workers.load(str(Path(body.path).absolute()), body.name)
    await state.refresh()
    info = state.registry.critics[key]
    if body.activate:
        await _activate(state, info)
    return _shown(state, info)


@router.get("/{name}")
async def show_critic(name: str, request: Request) -> dict[str, Any]:
    """All versions of one name."""
    state = state_of(request)
    await state.refresh()
    versions = _versions(state, name)
    return {
        "object": "critic",
        "name": name,
        "active": state.registry.active.get(name, "").partition("@")[2] or None,
        "default": state.registry.default == name,
        "versions": [_shown(state, info) for info in versions],
    }


@router.post("/{name}/activate", dependencies=admin)
async def activate_critic(name: str, body: ActivateRequest, request: Request) -> dict[str, Any]:
    """Requests that name no version get this one from now on; those on their way keep theirs."""
    state = state_of(request)
    info = _version(state, name, body.version)
    await _activate(state, info)
    return _shown(state, info)


@router.post("/{name}/rollback", dependencies=admin)
async def roll_back_critic(name: str, request: Request) -> dict[str, Any]:
    """Activates the version that was active before."""
    state = state_of(request)
    _versions(state, name)
    info = state.registry.previous(name)
    if info is None:
        raise ConflictError(f"no version of {name} that was active before is still loaded: load and activate it")
    await state.workers.activate(info.key)
    await state.refresh()
    return _shown(state, info)


@router.delete("/{name}/{version}", dependencies=admin)
async def unload_critic(name: str, version: str, request: Request) -> JSONResponse:
    """No new request gets this version; it is freed when its last request ends (202 until then)."""
    state = state_of(request)
    info = _version(state, name, version)
    if state.registry.active.get(name) == info.key and len(_versions(state, name)) > 1:
        raise ConflictError(f"{info.key} is active: activate another version of {name} first")
    state.registry.leave(info)
    if info.in_flight:
        _background(_unload(state, info))
        return JSONResponse(_shown(state, info), status_code=202)
    await _unload(state, info)
    left = info.key in state.registry.critics
    return JSONResponse(_shown(state, info), status_code=202 if left else 200)


@router.post("/{name}/score")
async def score(name: str, body: ScoreRequest, request: Request) -> dict[str, Any]:
    """`E[Z]` after each completion token, by full forward passes: the critic as a reward model."""
    state = state_of(request)
    try:
        info = state.registry.resolve(name)
    except (UnknownCriticError, NoCriticError) as error:
        raise NotFoundError(str(error)) from error
    if info.is_native:
        raise GuidanceError(
            f"{info.key} reads the reference's hidden states, which are there only while the reference decodes: it "
            "cannot score a text",
            "name",
        )
    pairs = sequences(body, state.tokenizer, state.vocabulary)
    for prompt, completion in pairs:
        if len(prompt) + len(completion) > info.max_length:
            raise GuidanceError(
                f"completion: {len(prompt) + len(completion)} tokens with its prompt, and {info.key} takes "
                f"{info.max_length}",
                "completion",
            )
    lease = info.lease(request)
    try:
        # One sequence a call, so that the engine's steps go on in between.
        values = [await state.workers.score(info.key, prompt, completion) for prompt, completion in pairs]
    finally:
        lease()
    data = [
        {"index": i, "token_ids": completion, "values": scored}
        for i, ((_, completion), scored) in enumerate(zip(pairs, values, strict=True))
    ]
    return {"object": "list", "critic": info.key, "data": data}


def attach(app: FastAPI) -> None:
    """Adds the routes."""
    app.include_router(router)


async def _activate(state: QSharpState, info: CriticInfo) -> None:
    before = state.registry.active.get(info.name)
    await state.workers.activate(info.key)
    await state.refresh()
    state.registry.activated(info.name, before)


async def _unload(state: QSharpState, info: CriticInfo) -> None:
    await info.idle.wait()  # requests that were admitted with it have reached the worker, and ended
    await state.workers.unload(info.key)
    await state.refresh()


_tasks: set[asyncio.Task[None]] = set()


def _background(work: Any) -> None:
    task = asyncio.create_task(work)
    _tasks.add(task)
    task.add_done_callback(_ended)


def _ended(task: "asyncio.Task[None]") -> None:
    _tasks.discard(task)
    if not task.cancelled() and isinstance(error := task.exception(), QSharpError):
        logger.error("unloading a critic failed: %s", error)


def _versions(state: QSharpState, name: str) -> list[CriticInfo]:
    versions = state.registry.versions(name)
    if not versions:
        raise NotFoundError(f"critic {name!r} is not loaded")
    return versions


def _version(state: QSharpState, name: str, version: str) -> CriticInfo:
    info = state.registry.critics.get(f"{name}@{version}")
    if info is None:
        raise NotFoundError(f"critic {name}@{version} is not loaded")
    if info.leaving:
        raise ConflictError(f"{info.key} is being unloaded: {info.in_flight} requests still use it")
    return info


def _shown(state: QSharpState, info: CriticInfo) -> dict[str, Any]:
    active = state.registry.active.get(info.name) == info.key
    card = info.state["card"]
    return {
        "object": "critic.version",
        "id": info.key,
        "name": info.name,
        "version": info.version,
        "active": active,
        "default": active and state.registry.default == info.name,
        "leaving": info.leaving,
        "loaded": info.key in state.registry.critics,
        "users": info.state["users"],
        "in_flight": info.in_flight,
        "path": info.state["path"],
        "max_length": info.max_length,
        "kv_blocks": info.state["kv_blocks"],
        "kv_blocks_used": info.state["kv_blocks_used"],
        "metrics": card.get("metrics"),
        "card": card,
    }
