"""Deletes old rollouts, few at a time: other writes wait for the one thread that does it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from sqlalchemy import Connection, Select, delete, select

from qsharp_core.rollouts.text import clean
from server.store.critics import last_published
from server.store.filters import Filters
from server.store.rewards import parts
from server.store.tables import rollouts


class Pruned(NamedTuple):
    """What became of one call.

    Attributes:
        deleted: how many rollouts.
        until: when the last one was made that was looked at, in seconds since the epoch; None if there was none.
        more: whether there may be further ones.
    """

    deleted: int
    until: float | None
    more: bool


class Pruning(NamedTuple):
    """Rollouts to delete.

    Attributes:
        places: their `seq`.
        filters, owner: what must still hold when they are deleted: one may have got a reward meanwhile.
    """

    places: Sequence[int]
    filters: Filters
    owner: str | None


def oldest(limit: int) -> Select[Any]:
    """A query for `seq` and `created` of the oldest rollouts."""
    order = (rollouts.c.created, rollouts.c.seq)
    return select(rollouts.c.seq, rollouts.c.created).order_by(*order).limit(limit)


def told(filters: Filters, connection: Connection) -> Filters:
    """The filters, told of the versions that servers are to have now, if they go by that."""
    if filters.trained is None:
        return filters
    return replace(filters, trained_until=max(filters.trained_until, last_published(connection)))


def prune(connection: Connection, pruning: Pruning, dialect: str) -> int:
    """Deletes rollouts with their rewards, in the writer's transaction; returns how many."""
    filters = told(pruning.filters, connection)
    owned = () if pruning.owner is None else (rollouts.c.owner == clean(pruning.owner),)
    deleted = 0
    for part in parts(pruning.places):
        still = filters.apply(select(rollouts.c.seq), dialect).where(rollouts.c.seq.in_(part), *owned)
        deleted += connection.execute(delete(rollouts).where(rollouts.c.seq.in_(still))).rowcount
    return deleted
