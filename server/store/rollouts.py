"""The store as the server uses it: coroutines write and return when the write is committed; plain functions read.

    store = RolloutStore("sqlite:///rollouts.db")
    await store.add([rollout])                      # durable when it returns
    page = store.page(Filters(has_reward=True), owner="me")     # blocks: call it in a thread from an event loop

What reads or changes rollouts is told whose: `owner`, or everybody's if that is None. What belongs to another does not
exist for it.

Lists are in the order of commits, so a reader that follows the cursor misses nothing that is committed later.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    UnaryExpression,
    delete,
    exists,
    false,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from qsharp_core.errors import RolloutError
from qsharp_core.rollouts.records import Reward, Rollout
from qsharp_core.rollouts.text import clean
from server.store.critics import CriticRecords
from server.store.database import connect
from server.store.filters import Filters, Order
from server.store.pruning import Pruned, Pruning, oldest, prune, told
from server.store.reading import Reader
from server.store.rewards import GivenReward, Giving, RewardResult, give, parts, to_entry
from server.store.tables import Parameters, rewards, rollouts, to_row
from server.store.writer import Writer

QUEUE = 1024  # writes that are queued or running; further ones wait for room
PLACES = 10_000  # rollouts that an export looks for at once: it then has their numbers in memory


class Imported(NamedTuple):
    """How many rollouts were new, and how many were stored already."""

    imported: int
    skipped: int


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list of rollouts; `more` says whether further ones follow."""

    data: list[Rollout]
    more: bool


class RolloutStore:
    """The store in one database, which is opened and migrated at once.

    Args:
        url: of the database, in one of the forms of `database.ACCEPTED`.
        on_unreadable: is called for every row that is left out of an answer because it cannot be read.

    Attributes:
        critics: which critics servers of this store are to have.

    Raises:
        ConfigError: the database cannot be opened.
    """

    def __init__(self, url: str, on_unreadable: Callable[[], None] = lambda: None) -> None:
        self._engine = connect(url)
        self._reader = Reader(self._engine, on_unreadable)
        self._dialect = self._engine.dialect.name
        self._insert = (postgresql if self._dialect == "postgresql" else sqlite).insert(rollouts)
        self._writer = Writer(self._engine)
        self._room = asyncio.Semaphore(QUEUE)
        self.critics = CriticRecords(self._engine, self._reader, self._writer)

    @property
    def lag(self) -> float:
        """Seconds that the oldest unfinished write has waited; 0 if there is none."""
        return self._writer.lag()

    def close(self) -> None:
        """Writes what is queued, then closes the database."""
        self._writer.close()
        self._engine.dispose()

    # -- writes: committed when they return; they raise StoreError if nothing was written

    async def add(self, new: Sequence[Rollout]) -> None:
        """Stores new rollouts, all or none."""
        await self._written(self._add, [to_row(rollout) for rollout in new])

    async def add_rewards(
        self, items: Sequence[GivenReward], *, owner: str | None, given_by: str
    ) -> list[RewardResult | None]:
        """Gives rewards, in order.

        The reward that a rollout already has changes nothing, and the history notes who agrees. Another one replaces
        it, and the history keeps both.

        Returns:
            A result for each reward. If a rollout does not exist its result is None, and no reward was given at all.
        """
        items = [item._replace(id=clean(item.id)) for item in items]
        giving = Giving(items, owner, given_by, time.time())
        results: list[RewardResult | None] = await self._written(give, giving)
        return results

    async def set_metadata(self, request_id: str, metadata: Mapping[str, str], *, owner: str | None) -> bool:
        """Replaces the metadata of all choices of a stored chat completion; False if none has that id."""
        return bool(await self._written(self._set_metadata, (request_id, owner, dict(metadata))))

    async def delete(self, request_id: str, *, owner: str | None) -> bool:
        """Deletes all choices of a stored chat completion, with their rewards; False if none has that id."""
        return bool(await self._written(self._delete, (request_id, owner)))

    async def prune(self, filters: Filters, limit: int, *, owner: str | None) -> Pruned:
        """Deletes the oldest `limit` rollouts that the filters leave, with their rewards.

        Other writes wait for as many, so all are deleted by many calls. A call is told by `created_after` where the one
        before it ended, and then does not look again at what that one has passed over.
        """
        found = await asyncio.to_thread(self._oldest, filters, limit, owner)
        if not found:
            return Pruned(0, None, False)
        pruning = Pruning([seq for seq, _ in found], filters, owner)
        return Pruned(await self._written(self._prune, pruning), found[-1][1], len(found) == limit)

    async def import_all(self, batch: Sequence[Rollout]) -> Imported:
        """Stores rollouts with their rewards, all or none; one whose id is stored already stays as it is."""
        result: Imported = await self._written(self._import, [(to_row(r), r.rewards) for r in batch])
        return result

    async def _written(self, run: Callable[[Connection, list[Any]], list[Any]], payload: Any) -> Any:
        async with self._room:
            future: Future[Any] = self._writer.submit(run, payload)
            return await asyncio.wrap_future(future)

    # -- what the writer runs, for several operations of one kind at once

    def _add(self, connection: Connection, payloads: list[list[Parameters]]) -> list[None]:
        # Ids are random: one that is stored already was written by this operation itself, whose commit seemed to fail.
        connection.execute(self._insert.on_conflict_do_nothing(), [row for rows in payloads for row in rows])
        return [None] * len(payloads)

    def _set_metadata(
        self, connection: Connection, payloads: list[tuple[str, str | None, dict[str, str]]]
    ) -> list[bool]:
        done = []
        for request_id, owner, metadata in payloads:
            choices = update(rollouts).where(*_same_response(request_id, owner))
            done.append(connection.execute(choices.values(metadata=metadata)).rowcount > 0)
        return done

    def _delete(self, connection: Connection, payloads: list[tuple[str, str | None]]) -> list[bool]:
        return [
            connection.execute(delete(rollouts).where(*_same_response(request_id, owner))).rowcount > 0
            for request_id, owner in payloads
        ]

    def _prune(self, connection: Connection, payloads: list[Pruning]) -> list[int]:
        return [prune(connection, pruning, self._dialect) for pruning in payloads]

    def _import(
        self, connection: Connection, payloads: list[list[tuple[Parameters, Sequence[Reward]]]]
    ) -> list[Imported]:
        return [self._import_one(connection, batch) for batch in payloads]

    def _import_one(self, connection: Connection, batch: list[tuple[Parameters, Sequence[Reward]]]) -> Imported:
        new = {row["id"]: (row, history) for row, history in reversed(batch)}  # of a repeated id the first counts
        for part in parts(list(new)):
            for (known,) in connection.execute(select(rollouts.c.id).where(rollouts.c.id.in_(part))):
                del new[known]
        if new:
            connection.execute(self._insert, [row for row, _ in reversed(new.values())])
        entries = [to_entry(name, entry) for name, (_, history) in new.items() for entry in history]
        if entries:
            connection.execute(insert(rewards), entries)
        return Imported(len(new), len(batch) - len(new))

    # -- reads: they block; `owner` is whose rollouts may be seen, None is everybody's

    def get(self, rollout_id: str, *, owner: str | None) -> Rollout | None:
        """The rollout with this id, with all its rewards; None if there is none."""
        query = select(rollouts).where(rollouts.c.id == clean(rollout_id), *_visible(owner))
        return next(iter(self._reader.rollouts(query)), None)

    def response(self, request_id: str, *, owner: str | None) -> list[Rollout]:
        """The stored choices of a chat completion, by index."""
        return self._responses([request_id], owner).get(clean(request_id), [])

    def page(
        self, filters: Filters, after: str | None = None, limit: int = 20, order: Order = "asc", *, owner: str | None
    ) -> Page:
        """At most `limit` rollouts in the order of commits (`"desc"`: reversed), beginning after the rollout `after`.

        Raises:
            RolloutError: no rollout has the id `after`.
        """
        whole = self._chosen(select(rollouts), filters, owner).where(*self._bounds(filters))
        whole = whole.order_by(_ordered(order))
        seq = None
        if after is not None:
            place = select(rollouts.c.seq).where(rollouts.c.id == clean(after), *_visible(owner))
            seq = self._scalar(place, after)
        data: list[Rollout] = []
        while (wanted := limit + 1 - len(data)) > 0:
            found = self._reader.find((whole if seq is None else whole.where(_after(seq, order))).limit(wanted))
            data += [rollout for _, rollout in found if rollout is not None]
            if len(found) < wanted:
                break
            seq = found[-1][0]
        return Page(filters.view(data[:limit]), len(data) > limit)

    def count(self, filters: Filters, *, owner: str | None) -> int:
        """How many rollouts the filters leave."""
        if filters.trained is False:
            # Both numbers come from indexes, and their difference would not.
            both, trained = (replace(filters, trained=known) for known in (None, True))
            return self.count(both, owner=owner) - self.count(trained, owner=owner)
        query = self._chosen(select(func.count()).select_from(rollouts), filters, owner)
        with self._reader.connected() as connection:
            return connection.scalar(query) or 0

    def last_reward(self) -> int:
        """The place of the last reward in the order of rewards; 0 before the first."""
        with self._reader.connected() as connection:
            return connection.scalar(select(func.max(rewards.c.seq))) or 0

    def responses(
        self, filters: Filters, after: str | None, limit: int, order: Order, *, owner: str | None
    ) -> tuple[list[list[Rollout]], bool]:
        """At most `limit` stored chat completions, beginning after the id `after`, and whether more follow.

        They are in the order of commits (`"desc"`: reversed). Each is its choices, by index.

        Raises:
            RolloutError: no stored chat completion has the id `after`.
        """
        table, other = rollouts.c, rollouts.alias()
        # A response has the place of its first committed choice.
        earlier = exists().where(
            other.c.request_id == table.request_id, other.c.route == "chat", other.c.seq < table.seq
        )
        whole = filters.apply(select(table.seq, table.request_id), self._dialect)
        whole = whole.where(table.route == "chat", ~earlier, *_visible(owner)).order_by(_ordered(order))
        seq = None
        if after is not None:
            seq = self._scalar(select(func.min(table.seq)).where(*_same_response(after, owner)), after)
        found: list[list[Rollout]] = []
        while (wanted := limit + 1 - len(found)) > 0:
            with self._reader.connected() as connection:
                query = whole if seq is None else whole.where(_after(seq, order))
                places = connection.execute(query.limit(wanted)).all()
            choices = self._responses([place.request_id for place in places], owner)
            found += [choices[place.request_id] for place in places if place.request_id in choices]
            if len(places) < wanted:
                break
            seq = places[-1].seq
        return found[:limit], len(found) > limit

    def batches(self, filters: Filters, size: int, *, owner: str | None) -> Iterator[list[Rollout]]:
        """All rollouts that are stored now and match the filters, in batches of at most `size`.

        Those that match are looked for many at a time, and then read few at a time: filters cost the same however small
        the batches are.
        """
        with self._reader.connected() as connection:
            last = connection.scalar(select(func.max(rollouts.c.seq))) or 0
        column = rollouts.c.seq
        whole = self._chosen(select(column), filters, owner).where(*self._bounds(filters), column <= last)
        seq = 0
        while True:
            with self._reader.connected() as connection:
                places = connection.scalars(whole.where(column > seq).order_by(column).limit(PLACES)).all()
            for i in range(0, len(places), size):
                few = select(rollouts).where(column.in_(places[i : i + size])).order_by(column)
                if batch := self._reader.rollouts(few):
                    yield filters.view(batch)
            if len(places) < PLACES:
                return
            seq = places[-1]

    def _chosen(self, query: Select[Any], filters: Filters, owner: str | None) -> Select[Any]:
        """A query over `rollouts` for what the filters leave of what this owner may see."""
        if filters.trained is not None:
            with self._reader.connected() as connection:
                filters = told(filters, connection)
        return filters.apply(query, self._dialect).where(*_visible(owner))

    def _oldest(self, filters: Filters, limit: int, owner: str | None) -> list[tuple[int, float]]:
        query = self._chosen(oldest(limit), filters, owner)
        with self._reader.connected() as connection:
            return [(seq, created) for seq, created in connection.execute(query)]

    def _bounds(self, filters: Filters) -> tuple[ColumnElement[bool], ...]:
        """Where in the order of commits that is which filters by time leave; nothing if there are none.

        Without it a list of the last day, in that order, would pass over all days before, or after its end go on.
        """
        times = Filters(created_after=filters.created_after, created_before=filters.created_before)
        if times == Filters():
            return ()
        column = rollouts.c.seq
        # Were it not for the count, PostgreSQL would walk through the order of commits to the first that matches.
        ends = select(func.min(column), func.max(column), func.count()).where(*times.conditions(self._dialect))
        with self._reader.connected() as connection:
            first, last, number = connection.execute(ends).one()
        return (column >= first, column <= last) if number else (false(),)

    def _responses(self, ids: Sequence[str], owner: str | None) -> dict[str, list[Rollout]]:
        """The stored choices of chat completions, by index, by the id of the response."""
        choices: dict[str, list[Rollout]] = {}
        chat = select(rollouts).where(rollouts.c.route == "chat", *_visible(owner)).order_by(rollouts.c.choice)
        for part in parts([clean(name) for name in ids]):
            for rollout in self._reader.rollouts(chat.where(rollouts.c.request_id.in_(part))):
                choices.setdefault(rollout.request_id, []).append(rollout)
        return choices

    def _scalar(self, query: Select[Any], after: str) -> int:
        with self._reader.connected() as connection:
            seq: int | None = connection.scalar(query)
        if seq is None:
            raise RolloutError(f"after must be the id of one that is stored; got {after!r:.100}", "after")
        return seq


def _visible(owner: str | None) -> tuple[ColumnElement[bool], ...]:
    """Conditions for what belongs to this owner; none if it is None."""
    return () if owner is None else (rollouts.c.owner == clean(owner),)


def _same_response(request_id: str, owner: str | None) -> tuple[ColumnElement[bool], ...]:
    """Conditions for the choices of one chat completion."""
    return (rollouts.c.request_id == clean(request_id), rollouts.c.route == "chat", *_visible(owner))


def _after(seq: int, order: Order) -> ColumnElement[bool]:
    return rollouts.c.seq > seq if order == "asc" else rollouts.c.seq < seq


def _ordered(order: Order) -> UnaryExpression[int]:
    return rollouts.c.seq.asc() if order == "asc" else rollouts.c.seq.desc()
