"""`/v1/rollouts`: lists stored rollouts, takes rewards for them, and exports and imports them as Parquet."""

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Strict, ValidationError

from qsharp_core.rollouts import parquet
from qsharp_core.rollouts.records import Reward, Rollout
from server import metrics
from server.api.queries import FilterQuery, PageQuery, parse
from server.errors import HTTPError, NotFoundError
from server.request.schema import Number, wrong
from server.state import state_of
from server.store.rollouts import GivenReward, RewardResult, RolloutStore

PATH = "/v1/rollouts"
MOST_REWARDS = 10_000
MOST_NAMED = 100  # wrong items that an answer names
ACCEPTS = {
    "reward": "a finite number",
    "source": "a string, or null",
    "id": "a rollout's id",
    "items": f"a list of 1 to {MOST_REWARDS} objects with id, reward and, if you like, source",
}


class RewardRequest(BaseModel):
    """Body of `POST /v1/rollouts/{id}/reward`; `source` names who or what judged."""

    model_config = ConfigDict(extra="forbid")
    reward: Number
    source: Annotated[str, Strict()] | None = None


class RewardItem(RewardRequest):
    """An entry of `POST /v1/rollouts/rewards`."""

    id: Annotated[str, Strict()]


class RewardGiven(BaseModel):
    """A rollout's present reward, and whether this request changed it."""

    id: str
    reward: float
    changed: bool


class RewardShown(RewardGiven):
    """The answer of `POST /v1/rollouts/{id}/reward`: the reward with its history, oldest first."""

    rewards: Sequence[Reward]


class RewardsGiven(BaseModel):
    """The answer of `POST /v1/rollouts/rewards`, in the order of the request's items."""

    object: Literal["list"] = "list"
    data: list[RewardGiven]


class ImportResult(BaseModel):
    """The answer of `POST /v1/rollouts/import`: how many rollouts were new, and how many were stored already."""

    object: Literal["rollouts.import"] = "rollouts.import"
    imported: int
    skipped: int


class FieldProblem(BaseModel):
    """What is wrong with a body that has a reward, and in which of its fields."""

    param: str
    message: str


class ItemProblem(FieldProblem):
    """What is wrong with an item of many: its place in the request, and the rollout's id as the item has it."""

    index: int
    id: Any


class BadRequestError(HTTPError):
    """400 with more than a message: `details` are further fields of the error."""

    status = HTTPStatus.BAD_REQUEST

    def __init__(self, message: str, param: str, **details: Any) -> None:
        super().__init__(message)
        self.param = param
        self.details = details


router = APIRouter(prefix=PATH)


@router.get("")
async def list_rollouts(request: Request) -> Response:
    """Lists rollouts in the order in which they were stored.

    The query's filters are `critic`, `guided`, `has_reward`, `model` and `metadata.KEY`; `after`, `limit` and `order`
    choose the page.
    """
    return await asyncio.to_thread(_page, state_of(request).store, parse(request, PageQuery))


@router.get("/export")
async def export(request: Request) -> StreamingResponse:
    """Sends a Parquet file of all rollouts that match the query's filters."""
    store = state_of(request).store
    filters = parse(request, FilterQuery).filters()
    return StreamingResponse(
        parquet.write(store.batches(filters, parquet.BATCH)),  # plain iterators are run in threads
        media_type=parquet.MEDIA_TYPE,
        headers={"Content-Disposition": 'attachment; filename="rollouts.parquet"'},
    )


@router.post("/import")
async def import_rollouts(request: Request) -> ImportResult:
    """Stores the rollouts of a Parquet file, the request's body; one whose id is stored already stays as it is."""
    store = state_of(request).store
    with tempfile.TemporaryDirectory(prefix="qsharp-") as folder:
        path = Path(folder) / "rollouts.parquet"
        with path.open("wb") as file:
            async for chunk in request.stream():
                await asyncio.to_thread(file.write, chunk)
        await asyncio.to_thread(_check_all, path)
        imported = skipped = 0
        batches = parquet.read(path)
        while (batch := await asyncio.to_thread(next, batches, None)) is not None:
            result = await store.import_all(batch)
            imported += result.imported
            skipped += result.skipped
            metrics.ROLLOUTS_STORED.inc(result.imported)
    return ImportResult(imported=imported, skipped=skipped)


@router.post("/rewards")
async def give_rewards(request: Request) -> RewardsGiven:
    """Gives rewards to many rollouts. If any item is wrong, no reward is given and each wrong item is named."""
    store = state_of(request).store
    body = await _json(request)
    items = body.get("items")
    if not (isinstance(items, list) and 0 < len(items) <= MOST_REWARDS and body.keys() == {"items"}):
        raise wrong("items", items, ACCEPTS["items"])
    checked: list[RewardItem] = []
    problems: list[ItemProblem] = []
    for index, item in enumerate(items):
        try:
            checked.append(RewardItem.model_validate(item))
        except ValidationError as error:
            problem = _problem(error)
            rollout_id = item.get("id") if isinstance(item, dict) else None
            problems.append(ItemProblem(index=index, id=rollout_id, param=problem.param, message=problem.message))
    if problems:
        raise _wrong_items(problems, len(items))
    results = await store.add_rewards([GivenReward(item.id, item.reward, item.source) for item in checked])
    given = [result for result in results if result is not None]
    if len(given) < len(results):
        unknown = [
            ItemProblem(index=index, id=item.id, param="id", message=_no_rollout(item.id))
            for index, (item, result) in enumerate(zip(checked, results, strict=True))
            if result is None
        ]
        raise _wrong_items(unknown, len(items))
    _observe(given, request)
    return RewardsGiven(data=[RewardGiven(id=r.id, reward=r.reward, changed=r.changed) for r in given])


@router.get("/{rollout_id}")
async def show_rollout(rollout_id: str, request: Request) -> dict[str, Any]:
    """Shows one rollout, with the history of its rewards."""
    return as_json(await _get(state_of(request).store, rollout_id))


@router.post("/{rollout_id}/reward")
async def give_reward(rollout_id: str, request: Request) -> RewardShown:
    """Gives a rollout a reward. The reward it already has changes nothing; another one replaces it."""
    store = state_of(request).store
    body = await _json(request)
    try:
        reward = RewardRequest.model_validate(body)
    except ValidationError as error:
        problem = _problem(error)
        raise BadRequestError(problem.message, problem.param) from error
    (result,) = await store.add_rewards([GivenReward(rollout_id, reward.reward, reward.source)])
    if result is None:
        raise NotFoundError(_no_rollout(rollout_id))
    _observe([result], request)
    rollout = await _get(store, rollout_id)
    return RewardShown(id=result.id, reward=result.reward, changed=result.changed, rewards=rollout.rewards)


def as_json(rollout: Rollout) -> dict[str, Any]:
    """A rollout as JSON's data, as these routes show it."""
    fields = {name: getattr(rollout, name) for name in rollout.__dataclass_fields__}
    del fields["response"]  # `/v1/chat/completions/{id}` shows it
    fields["sampling"] = {name: getattr(rollout.sampling, name) for name in rollout.sampling.__dataclass_fields__}
    fields["rewards"] = [asdict(reward) for reward in rollout.rewards]
    return {"object": "rollout", **fields}


def _page(store: RolloutStore, query: PageQuery) -> Response:
    page = store.page(query.filters(), query.after, query.limit, query.order)
    body = {
        "object": "list",
        "data": [as_json(rollout) for rollout in page.data],
        "first_id": page.data[0].id if page.data else None,
        "last_id": page.data[-1].id if page.data else None,
        "has_more": page.more,
    }
    # FastAPI's encoder would look at every token id in Python, and in the event loop.
    return Response(msgspec.json.encode(body), media_type="application/json")


def attach(app: FastAPI) -> None:
    """Adds these routes to the app."""
    app.include_router(router)


def _observe(results: Sequence[RewardResult], request: Request) -> None:
    critics = state_of(request).catalog.critics

    def range_of(key: str) -> Sequence[float] | None:
        return critics[key].status.reward_range if key in critics else None

    metrics.observe_rewards(results, range_of)


async def _get(store: RolloutStore, rollout_id: str) -> Rollout:
    rollout = await asyncio.to_thread(store.get, rollout_id)
    if rollout is None:
        raise NotFoundError(_no_rollout(rollout_id))
    return rollout


def _no_rollout(rollout_id: str) -> str:
    return f"no rollout has the id {rollout_id!r:.100}"


async def _json(request: Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except ValueError as error:
        raise BadRequestError(f"the body must be JSON: {error}", "body") from error
    if not isinstance(body, dict):
        raise BadRequestError("the body must be a JSON object", "body")
    return body


def _problem(error: ValidationError) -> FieldProblem:
    first = error.errors()[0]
    param = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        message = f"{param} is not known"
    elif first["type"] == "missing":
        message = f"{param} is missing: it must be {ACCEPTS[param]}"
    else:
        message = str(wrong(param, first["input"], ACCEPTS.get(param, "an object")))
    return FieldProblem(param=param, message=message)


def _wrong_items(problems: Sequence[ItemProblem], total: int) -> BadRequestError:
    first = problems[0]
    place = f"items[{first.index}]"
    return BadRequestError(
        f"{len(problems)} of {total} items are wrong and no reward was given; {place}: {first.message}",
        f"{place}.{first.param}" if first.param else place,
        items=[problem.model_dump() for problem in problems[:MOST_NAMED]],
    )


def _check_all(path: Path) -> None:
    """Reads a whole file, so that a wrong row is refused before anything is stored."""
    for _ in parquet.read(path):
        pass
