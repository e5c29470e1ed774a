"""What is asked of the store: every list, count and export of its routes, as its methods are called there."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.store_at_size.rows import DAY, DAYS, JUDGE, MODEL, OTHER, OWNERS, RARE_MODEL, RUNS
from server.store.filters import Filters, Order
from server.store.rollouts import RolloutStore

PAGE = 20
LISTS: dict[str, Filters] = {
    "all": Filters(),
    "critic=NAME": Filters(critic="sums"),
    "critic=NAME@VERSION": Filters(critic="sums@25"),
    "critic=unknown": Filters(critic="sumz"),
    "guided=true": Filters(guided=True),
    "has_reward=true": Filters(has_reward=True),
    "has_reward=false": Filters(has_reward=False),
    "has_valid_position=true": Filters(has_valid_position=True),
    "metadata, a quarter": Filters(metadata={"task": "sums"}),
    "metadata, one run": Filters(metadata={"qsharp_run": f"run-{RUNS // 2}"}),
    "metadata, none": Filters(metadata={"qsharp_item": "none"}),
    "model": Filters(model=MODEL),
    "model, one in a thousand": Filters(model=RARE_MODEL),
    "model, none": Filters(model="none"),
    "owner": Filters(owners=[OWNERS[-1]]),
    "rewarded_by": Filters(rewarded_by=[OTHER]),
    "rewarded_by, none": Filters(rewarded_by=["none"]),
    "reward_source": Filters(reward_source="exact"),
    "reward_source, none": Filters(reward_source="none"),
    "rewarded_by, has_reward=false": Filters(rewarded_by=[JUDGE], has_reward=False),
}
"""Filters of lists, by what they are called in reports."""


@dataclass(frozen=True)
class Times:
    """Moments that queries are about, in seconds since the epoch; `now` is when the last rollout was stored."""

    now: float

    @property
    def last_day(self) -> Filters:
        """What was made in the last day."""
        return Filters(created_after=self.now - DAY)

    @property
    def old(self) -> Filters:
        """The oldest tenth."""
        return Filters(created_before=self.now - 0.9 * DAYS * DAY)


def lists(times: Times) -> dict[str, Filters]:
    """All lists, with those by time."""
    minute = Filters(created_after=times.now - 60, created_before=times.now)
    return {
        **LISTS,
        "created_after, a day": times.last_day,
        "created_after and created_before, a minute": minute,
        "created_before, a tenth": times.old,
        "created_before, all": Filters(created_before=times.now),
    }


def pages(store: RolloutStore, filters: Filters, order: Order) -> list[tuple[str, Callable[[], object]]]:
    """The first page of a list, and one further on, after the hundredth rollout or the last."""
    some = store.page(filters, limit=100, order=order, owner=None).data
    calls: list[tuple[str, Callable[[], object]]] = [
        ("first", lambda: store.page(filters, limit=PAGE, order=order, owner=None))
    ]
    if some:
        after = some[-1].id
        calls.append(("later", lambda: store.page(filters, after, PAGE, order, owner=None)))
    return calls


def counts(store: RolloutStore, times: Times, before: int) -> dict[str, Callable[[], int]]:
    """What trainers and operators count.

    Args:
        store: of the rollouts.
        times: that it is about.
        before: the place of the reward from which a watch counts.
    """
    trainable = Filters(has_reward=True, has_valid_position=True)
    filters = {
        "can be trained on": trainable,
        "can be trained on, since a place": replace(trainable, rewarded_after=before),
        "the same, of one judge": replace(trainable, rewarded_after=before, rewarded_by=[JUDGE]),
        "old": times.old,
        "old, not trained on": replace(times.old, trained=False, trained_until=times.now),
        "of one run": Filters(metadata={"qsharp_run": f"run-{RUNS // 2}"}, has_reward=True),
        "of one owner, in a day": replace(times.last_day, owners=[OWNERS[-1]]),
    }

    def asking(one: Filters) -> Callable[[], int]:
        return lambda: store.count(one, owner=None)

    return {name: asking(one) for name, one in filters.items()}
