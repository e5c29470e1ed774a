"""`/v1/rollouts`: what was stored, rewards for it, and Parquet in and out."""

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Strict, ValidationError

from qsharp_core.rollouts import parquet
from qsharp_core.rollouts.records import Rollout
from qsharp_core.rollouts.store import GivenReward, RewardResult, RolloutStore
from server import metrics
from server.errors import HTTPError, NotFoundError
from server.rollouts_query import FilterQuery, PageQuery, parse
from server.schema import Number, wrong
from server.state import state_of

PATH = "/v1/rollouts"
MOST_REWARDS = 10_000
ACCEPTS = {
    "reward": "a finite number",
    "source": "a string, or null",
    "id": "a rollout's id",
    "items": f"a list of 1 to {MOST_REWARDS} objects with id, reward and, if you like, source",
}


class RewardRequest(BaseModel):
    """Body of `POST /v1/rollouts/{id}/reward`; `source` says who judged."""

    model_config = ConfigDict(extra="forbid")
    reward: Number
    source: Annotated[str, Strict()] | None = None


class RewardItem(RewardRequest):
    """An entry of `POST /v1/rollouts/rewards`."""

    id: Annotated[str, Strict()]


class BadRequestError(HTTPError):
    """400 with more than a message; `details` stand beside it."""

    status = HTTPStatus.BAD_REQUEST

    def __init__(self, message: str, param: str, **details: Any) -> None:
        super().__init__(message)
        self.param = param
        self.details = details


router = APIRouter(prefix=PATH)


@router.get("")
async def list_rollouts(request: Request) -> Response:
    """In the order they were stored. Query: filters of `FilterQuery`, `after`, `limit`, `order`."""
    return await asyncio.to_thread(_page, state_of(request).store, parse(request, PageQuery))


@router.get("/count")
async def count(request: Request) -> dict[str, Any]:
    """How many rollouts the query's filters leave."""
    store, filters = state_of(request).store, parse(request, FilterQuery).filters()
    return {"object": "rollouts.count", "count": await asyncio.to_thread(store.count, filters)}


@router.get("/export")
async def export(request: Request) -> StreamingResponse:
    """A Parquet file of all rollouts that the query's filters leave."""
    store = state_of(request).store
    filters = parse(request, FilterQuery).filters()
    return StreamingResponse(
        parquet.write(store.batches(filters, parquet.BATCH)),  # plain iterators are run in threads
        media_type=parquet.MEDIA_TYPE,
        headers={"Content-Disposition": 'attachment; filename="rollouts.parquet"'},
    )


@router.post("/import")
async def import_rollouts(request: Request) -> dict[str, Any]:
    """Takes a Parquet file of that kind as the body; rollouts whose id is there stay as they are."""
    store = state_of(request).store
    with tempfile.TemporaryDirectory(prefix="qsharp-") as folder:
        path = Path(folder) / "rollouts.parquet"
        with path.open("wb") as file:
            async for chunk in request.stream():
                await asyncio.to_thread(file.write, chunk)
        await asyncio.to_thread(_read_through, path)
        imported = skipped = 0
        batches = parquet.read(path)
        while (batch := await asyncio.to_thread(next, batches, None)) is not None:
            result = await store.import_all(batch)
            imported += result.imported
            skipped += result.skipped
            metrics.ROLLOUTS_STORED.inc(result.imported)
    return {"object": "rollouts.import", "imported": imported, "skipped": skipped}


@router.post("/rewards")
async def give_rewards(request: Request) -> dict[str, Any]:
    """Rewards for many rollouts: all are given, or none and each wrong item is told."""
    store = state_of(request).store
    body = await _json(request)
    items = body.get("items")
    if not (isinstance(items, list) and 0 < len(items) <= MOST_REWARDS and body.keys() == {"items"}):
        raise wrong("items", items, ACCEPTS["items"])
    checked: list[RewardItem] = []
    problems: list[dict[str, Any]] = []
    for index, item in enumerate(items):
        try:
            checked.append(RewardItem.model_validate(item))
        except ValidationError as error:
            shown_id = item.get("id") if isinstance(item, dict) else None
            problems.append({"index": index, "id": shown_id, **_problem(error)})
    if not problems:
        results = await store.add_rewards([GivenReward(item.id, item.reward, item.source) for item in checked])
        for index, result in enumerate(results):
            if result is None:
                message = f"no rollout has the id {checked[index].id!r:.100}"
                problems.append({"index": index, "id": checked[index].id, "param": "id", "message": message})
    if problems:
        first = problems[0]
        raise BadRequestError(
            f"{len(problems)} of {len(items)} items are wrong and no reward was given; items[{first['index']}]: "
            f"{first['message']}",
            f"items[{first['index']}].{first['param']}" if first["param"] else f"items[{first['index']}]",
            items=problems[:100],
        )
    given = [result for result in results if result is not None]
    _observe(given, request)
    return {"object": "list", "data": [_given(result) for result in given]}


@router.get("/{rollout_id}")
async def show_rollout(rollout_id: str, request: Request) -> dict[str, Any]:
    """One rollout, with the history of its rewards."""
    return shown(await _found(state_of(request).store, rollout_id))


@router.post("/{rollout_id}/reward")
async def give_reward(rollout_id: str, request: Request) -> dict[str, Any]:
    """A reward; the same again changes nothing, another one replaces it, and the history keeps both."""
    store = state_of(request).store
    body = await _json(request)
    try:
        given = RewardRequest.model_validate(body)
    except ValidationError as error:
        problem = _problem(error)
        raise BadRequestError(problem["message"], problem["param"]) from error
    (result,) = await store.add_rewards([GivenReward(rollout_id, given.reward, given.source)])
    if result is None:
        raise _unknown(rollout_id)
    _observe([result], request)
    rollout = await _found(store, rollout_id)
    return {**_given(result), "rewards": [asdict(reward) for reward in rollout.rewards]}


def shown(rollout: Rollout) -> dict[str, Any]:
    """A rollout as JSON's data."""
    fields = {name: getattr(rollout, name) for name in rollout.__dataclass_fields__}
    del fields["response"]  # `/v1/chat/completions/{id}` shows it
    fields["sampling"] = {name: getattr(rollout.sampling, name) for name in rollout.sampling.__dataclass_fields__}
    fields["rewards"] = [asdict(reward) for reward in rollout.rewards]
    return {"object": "rollout", **fields}


def _page(store: RolloutStore, query: PageQuery) -> Response:
    page = store.page(query.filters(), query.after, query.limit, query.order)
    body = {
        "object": "list",
        "data": [shown(rollout) for rollout in page.data],
        "first_id": page.data[0].id if page.data else None,
        "last_id": page.data[-1].id if page.data else None,
        "has_more": page.more,
    }
    # Not by FastAPI's encoder, which looks at every token id in Python, and in the event loop.
    return Response(msgspec.json.encode(body), media_type="application/json")


def attach(app: FastAPI) -> None:
    """Adds the routes."""
    app.include_router(router)


def _given(result: RewardResult) -> dict[str, Any]:
    return {"id": result.id, "reward": result.reward, "changed": result.changed}


def _observe(results: Sequence[RewardResult], request: Request) -> None:
    critics = state_of(request).registry.critics

    def range_of(key: str) -> Sequence[float] | None:
        return critics[key].reward_range if key in critics else None

    metrics.observe_rewards(results, range_of)


async def _found(store: RolloutStore, rollout_id: str) -> Rollout:
    rollout = await asyncio.to_thread(store.get, rollout_id)
    if rollout is None:
        raise _unknown(rollout_id)
    return rollout


def _unknown(rollout_id: str) -> NotFoundError:
    return NotFoundError(f"no rollout has the id {rollout_id!r:.100}")


async def _json(request: Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except ValueError as error:
        raise BadRequestError(f"the body must be JSON: {error}", "body") from error
    if not isinstance(body, dict):
        raise BadRequestError("the body must be a JSON object", "body")
    return body


def _problem(error: ValidationError) -> dict[str, Any]:
    first = error.errors()[0]
    param = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        return {"param": param, "message": f"{param} is not known"}
    if first["type"] == "missing":
        return {"param": param, "message": f"{param} is missing: it must be {ACCEPTS[param]}"}
    return {"param": param, "message": str(wrong(param, first["input"], ACCEPTS.get(param, "an object")))}


def _read_through(path: Path) -> None:
    """So that a wrong row is told before anything is stored."""
    batches: Sequence[Rollout]
    for batches in parquet.read(path):
        del batches
