"""`/v1/critics`: lists, loads, activates, rolls back and unloads critics (the admin alone); scores texts."""

import asyncio
from http import HTTPStatus

from fastapi import APIRouter, FastAPI, Request, Response

from qsharp_core.errors import GuidanceError, NoCriticError, UnknownCriticError
from qsharp_core.wire.critics import (
    ActivateRequest,
    CompletionScore,
    CriticDecision,
    CriticList,
    CriticName,
    CriticScores,
    CriticTrial,
    CriticVersion,
    CriticVersions,
    LoadRequest,
    ScoreRequest,
    WantedCritics,
)
from server.access.principal import principal_of
from server.api.scoring import sequences
from server.errors import NotFoundError
from server.state import QSharpState, state_of

PATH = "/v1/critics"


router = APIRouter(prefix=PATH)


@router.get("")
async def list_critics(request: Request) -> CriticList:
    """Lists all loaded versions."""
    state = state_of(request)
    await state.critics.refresh()
    catalog, follower = state.critics.catalog, state.follower
    wanted = None
    if follower is not None:
        now = follower.wanted
        trials = {name: CriticTrial(version=version, share=share) for name, (version, share) in now.trials.items()}
        wanted = WantedCritics(
            versions=list(now.versions), active=dict(now.active), trials=trials, problems=follower.problems
        )
    return CriticList(data=[catalog.describe(info) for info in catalog.critics.values()], wanted=wanted)


@router.post("")
async def load_critic(body: LoadRequest, request: Request) -> CriticVersion:
    """Loads a critic beside the running engine; the first version of a name becomes its active one."""
    state = state_of(request)
    location = await asyncio.to_thread(state.critics.roots.admit, body.path)
    info = await state.critics.load(await state.critics.on_disk(location), body.name, location)
    await state.decisions.loaded(info, principal_of(request).name, activate=body.activate)
    return state.critics.catalog.describe(info)


@router.get("/{name}")
async def show_critic(name: CriticName, request: Request) -> CriticVersions:
    """Shows all versions of one name."""
    state = state_of(request)
    await state.critics.refresh()
    await state.meet(name)
    catalog = state.critics.catalog
    return CriticVersions(
        name=name,
        active=catalog.active.get(name, "").partition("@")[2] or None,
        default=catalog.default == name,
        versions=[catalog.describe(info) for info in state.critics.versions(name)],
        decisions=await _decisions(state, name),
    )


@router.post("/{name}/activate")
async def activate_critic(name: CriticName, body: ActivateRequest, request: Request) -> CriticVersion:
    """Makes this version the active one; requests that were admitted earlier keep the version they began with."""
    state, by = state_of(request), principal_of(request).name
    info = await state.decisions.activate(name, body, by)
    return state.critics.catalog.describe(info)


@router.post("/{name}/rollback")
async def roll_back_critic(name: CriticName, request: Request) -> CriticVersion:
    """Activates the version that was active before the present one."""
    state = state_of(request)
    info = await state.decisions.roll_back(name, principal_of(request).name)
    return state.critics.catalog.describe(info)


@router.delete("/{name}/{version}")
async def unload_critic(name: CriticName, version: CriticName, request: Request, response: Response) -> CriticVersion:
    """Unloads a version: no new request gets it, and it is freed when its last request ends (202 until then)."""
    state = state_of(request)
    info = await state.decisions.unload(name, version, principal_of(request).name)
    if not info.in_flight and (task := state.critics.unloading(info)):
        await asyncio.shield(task)
    if info.key in state.critics.catalog.critics:
        response.status_code = HTTPStatus.ACCEPTED
    return state.critics.catalog.describe(info)


@router.post("/{name}/score")
async def score(name: str, body: ScoreRequest, request: Request) -> CriticScores:
    """Uses the critic as a reward model: `E[Z]` after each completion token, by full forward passes."""
    state = state_of(request)
    await state.meet(name)
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


async def _decisions(state: QSharpState, name: str) -> list[CriticDecision]:
    if state.follower is None:
        return []
    history = await asyncio.to_thread(state.store.critics.history, name)
    return [
        CriticDecision(
            version=one.version,
            share=one.share,
            default=one.is_default,
            rolled_back=one.rolled_back,
            created=one.created,
            given_by=one.given_by,
            why=one.why,
        )
        for one in history
    ]


def attach(app: FastAPI) -> None:
    """Adds these routes to the app."""
    app.include_router(router)
