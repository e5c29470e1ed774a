"""`/v1/critics`: lists, loads, activates, rolls back and unloads critics (the admin alone); scores texts."""

import asyncio
from http import HTTPStatus

from fastapi import APIRouter, FastAPI, Request, Response

from qsharp_core.errors import GuidanceError, NoCriticError, UnknownCriticError
from qsharp_core.wire.critics import (
    ActivateRequest,
    CompletionScore,
    CriticList,
    CriticName,
    CriticScores,
    CriticVersion,
    CriticVersions,
    LoadRequest,
    ScoreRequest,
)
from server.api.scoring import sequences
from server.critics.catalog import CriticInfo
from server.errors import ConflictError, NotFoundError
from server.state import QSharpState, state_of

PATH = "/v1/critics"


router = APIRouter(prefix=PATH)


@router.get("")
async def list_critics(request: Request) -> CriticList:
    """Lists all loaded versions."""
    state = state_of(request)
    await state.critics.refresh()
    return CriticList(data=[state.critics.catalog.describe(info) for info in state.critics.catalog.critics.values()])


@router.post("")
async def load_critic(body: LoadRequest, request: Request) -> CriticVersion:
    """Loads a critic beside the running engine; the first version of a name becomes its active one."""
    state = state_of(request)
    folder = await asyncio.to_thread(state.critics.roots.admit, body.path)
    info = await state.critics.load(folder, body.name)
    if body.activate:
        async with state.critics.changing:
            await state.critics.activate(_version(state, info.name, info.version))
    return state.critics.catalog.describe(info)


@router.get("/{name}")
async def show_critic(name: CriticName, request: Request) -> CriticVersions:
    """Shows all versions of one name."""
    state = state_of(request)
    await state.critics.refresh()
    catalog = state.critics.catalog
    return CriticVersions(
        name=name,
        active=catalog.active.get(name, "").partition("@")[2] or None,
        default=catalog.default == name,
        versions=[catalog.describe(info) for info in _versions(state, name)],
    )


@router.post("/{name}/activate")
async def activate_critic(name: CriticName, body: ActivateRequest, request: Request) -> CriticVersion:
    """Makes this version the active one; requests that were admitted earlier keep the version they began with."""
    state = state_of(request)
    async with state.critics.changing:
        info = _version(state, name, body.version)
        await state.critics.activate(info)
        if body.default:
            state.critics.catalog.default = name
        return state.critics.catalog.describe(info)


@router.post("/{name}/rollback")
async def roll_back_critic(name: CriticName, request: Request) -> CriticVersion:
    """Activates the version that was active before the present one."""
    state = state_of(request)
    async with state.critics.changing:
        _versions(state, name)
        info = state.critics.catalog.previous(name)
        if info is None:
            raise ConflictError(f"no version of {name} that was active before is still loaded: load and activate it")
        await state.critics.workers.activate(info.key)
        await state.critics.refresh()
        return state.critics.catalog.describe(info)


@router.delete("/{name}/{version}")
async def unload_critic(name: CriticName, version: CriticName, request: Request, response: Response) -> CriticVersion:
    """Unloads a version: no new request gets it, and it is freed when its last request ends (202 until then)."""
    state = state_of(request)
    async with state.critics.changing:
        info = _version(state, name, version)
        others = [one for one in _versions(state, name) if one is not info and not one.leaving]
        if others and state.critics.catalog.active.get(name) == info.key:
            raise ConflictError(f"{info.key} is active: activate another version of {name} first")
        state.critics.catalog.leave(info)  # from now on nobody can activate it
    if info.in_flight:
        state.critics.start_unloading(info)
        response.status_code = HTTPStatus.ACCEPTED
    else:
        await state.critics.unload(info)
        if info.key in state.critics.catalog.critics:
            response.status_code = HTTPStatus.ACCEPTED
    return state.critics.catalog.describe(info)


@router.post("/{name}/score")
async def score(name: str, body: ScoreRequest, request: Request) -> CriticScores:
    """Uses the critic as a reward model: `E[Z]` after each completion token, by full forward passes."""
    state = state_of(request)
    try:
        info = state.critics.catalog.resolve(name)
    except (UnknownCriticError, NoCriticError) as error:
        raise NotFoundError(str(error)) from error
    if info.status.native:
        raise GuidanceError(
            f"{info.key} reads the reference's hidden states, which are there only while the reference decodes: it "
            "cannot score a text",
            "name",
        )
    pairs = await asyncio.to_thread(sequences, body, state.tokenizer, state.vocabulary, info.max_length)
    if info.status.card["head"] == "Q" and any(completion and not prompt for prompt, completion in pairs):
        raise GuidanceError(f"prompt must not be empty: {info.key} scores what follows a token", "prompt")
    for prompt, completion in pairs:
        if len(prompt) + len(completion) > info.max_length:
            raise GuidanceError(
                f"completion: {len(prompt) + len(completion)} tokens with its prompt, and {info.key} takes "
                f"{info.max_length}",
                "completion",
            )
    release = info.lease(request)
    try:
        # One sequence in each call, so that the engine's steps go on in between.
        values = [await state.critics.workers.score(info.key, prompt, completion) for prompt, completion in pairs]
    finally:
        release()
    return CriticScores(
        critic=info.key,
        data=[
            CompletionScore(index=i, token_ids=completion, values=scores)
            for i, ((_, completion), scores) in enumerate(zip(pairs, values, strict=True))
        ],
    )


def attach(app: FastAPI) -> None:
    """Adds these routes to the app."""
    app.include_router(router)


def _versions(state: QSharpState, name: str) -> list[CriticInfo]:
    versions = state.critics.catalog.versions(name)
    if not versions:
        raise NotFoundError(f"critic {name!r} is not loaded")
    return versions


def _version(state: QSharpState, name: str, version: str) -> CriticInfo:
    info = state.critics.catalog.critics.get(f"{name}@{version}")
    if info is None:
        raise NotFoundError(f"critic {name}@{version} is not loaded")
    if info.leaving:
        raise ConflictError(f"{info.key} is being unloaded: {info.in_flight} requests still use it")
    return info
