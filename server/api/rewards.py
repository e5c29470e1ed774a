"""Rewards for stored rollouts: `POST /v1/rollouts/{id}/reward` and `POST /v1/rollouts/rewards`."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError

from qsharp_core.rollouts.records import LARGEST, Reward
from server import metrics
from server.access.principal import principal_of
from server.api.bodies import BadRequestError, FieldProblem, checked, documented, json_object, problem_of
from server.errors import NotFoundError
from server.request.values import Number, wrong
from server.state import state_of
from server.store.rewards import GivenReward, RewardResult

PATH = "/v1/rollouts"
MOST_REWARDS = 10_000
MOST_NAMED = 100  # wrong items that an answer names
LONGEST_SOURCE = 512  # characters
ACCEPTS = {
    "reward": f"a finite number from {-LARGEST:g} to {LARGEST:g}",
    "source": f"a string of at most {LONGEST_SOURCE} characters, or null",
    "id": "a rollout's id",
    "items": f"a list of 1 to {MOST_REWARDS} objects with id, reward and, if you like, source",
}


class RewardRequest(BaseModel):
    """Body of `POST /v1/rollouts/{id}/reward`; `source` names who or what judged."""

    model_config = ConfigDict(extra="forbid")
    reward: Annotated[Number, Field(ge=-LARGEST, le=LARGEST)]
    source: Annotated[str, Strict(), Field(max_length=LONGEST_SOURCE)] | None = None


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


class ItemProblem(FieldProblem):
    """What is wrong with an item of many: its place in the request, and the rollout's id where the item has one."""

    index: int
    id: str | None


router = APIRouter(prefix=PATH)
_ITEMS = {"type": "array", "items": RewardItem.model_json_schema(), "minItems": 1, "maxItems": MOST_REWARDS}
_BATCH = {"type": "object", "properties": {"items": _ITEMS}, "required": ["items"], "additionalProperties": False}


@router.post("/rewards", openapi_extra=documented(_BATCH))
async def give_rewards(request: Request) -> RewardsGiven:
    """Gives rewards to many rollouts. If any item is wrong, no reward is given and each wrong item is named."""
    store, giver = state_of(request).store, principal_of(request)
    body = await json_object(request)
    items = body.get("items")
    if not (isinstance(items, list) and 0 < len(items) <= MOST_REWARDS and body.keys() == {"items"}):
        raise wrong("items", items, ACCEPTS["items"])
    right: list[RewardItem] = []
    problems: list[ItemProblem] = []
    for index, item in enumerate(items):
        try:
            right.append(RewardItem.model_validate(item))
        except ValidationError as error:
            problem = problem_of(error, ACCEPTS)
            problems.append(ItemProblem(index=index, id=_id_of(item), param=problem.param, message=problem.message))
    if problems:
        raise _wrong_items(problems, len(items))
    given = [GivenReward(item.id, item.reward, item.source) for item in right]
    results = await store.add_rewards(given, owner=giver.sees, given_by=giver.name)
    taken = [result for result in results if result is not None]
    if len(taken) < len(results):
        unknown = [
            ItemProblem(index=index, id=item.id, param="id", message=no_rollout(item.id))
            for index, (item, result) in enumerate(zip(right, results, strict=True))
            if result is None
        ]
        raise _wrong_items(unknown, len(items))
    _observe(taken, request)
    return RewardsGiven(data=[RewardGiven(id=r.id, reward=r.reward, changed=r.changed) for r in taken])


@router.post("/{rollout_id}/reward", openapi_extra=documented(RewardRequest.model_json_schema()))
async def give_reward(rollout_id: str, request: Request) -> RewardShown:
    """Gives a rollout a reward. The reward it already has changes nothing; another one replaces it."""
    store, giver = state_of(request).store, principal_of(request)
    reward = checked(await json_object(request), RewardRequest, ACCEPTS)
    given = [GivenReward(rollout_id, reward.reward, reward.source)]
    (result,) = await store.add_rewards(given, owner=giver.sees, given_by=giver.name)
    if result is None:
        raise NotFoundError(no_rollout(rollout_id))
    _observe([result], request)
    return RewardShown(id=result.id, reward=result.reward, changed=result.changed, rewards=result.history)


def no_rollout(rollout_id: str) -> str:
    """What is answered where no rollout has an id, or another owner's has."""
    return f"no rollout has the id {rollout_id!r:.100}"


def attach(app: FastAPI) -> None:
    """Adds these routes to the app."""
    app.include_router(router)


def _observe(results: Sequence[RewardResult], request: Request) -> None:
    critics = state_of(request).critics.catalog.critics

    def range_of(key: str) -> Sequence[float] | None:
        return critics[key].status.reward_range if key in critics else None

    with metrics.after_the_fact():
        metrics.observe_rewards(results, range_of)


def _id_of(item: Any) -> str | None:
    name = item.get("id") if isinstance(item, dict) else None
    return name if isinstance(name, str) else None


def _wrong_items(problems: Sequence[ItemProblem], total: int) -> BadRequestError:
    first = problems[0]
    place = f"items[{first.index}]"
    return BadRequestError(
        f"{len(problems)} of {total} items are wrong and no reward was given; {place}: {first.message}",
        f"{place}.{first.param}" if first.param else place,
        items=[problem.model_dump() for problem in problems[:MOST_NAMED]],
    )
