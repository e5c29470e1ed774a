"""The store as the server uses it: coroutines write and return when the write is committed; plain functions read.

    store = RolloutStore("sqlite:///rollouts.db")
    await store.add([rollout])                      # durable when it returns
    page = store.page(Filters(has_reward=True))     # blocks: call it in a thread from an event loop

Lists are in the order of commits, so a reader that follows the cursor misses nothing that is committed later.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import Connection, Select, bindparam, delete, exists, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from qsharp_core.errors import RolloutError
from qsharp_core.rollouts.records import Reward, Rollout
from qsharp_core.rollouts.text import clean
from server.store.database import connect
from server.store.filters import Filters, Order
from server.store.tables import Parameters, from_row, rewards, rollouts, to_row
from server.store.writer import Writer

QUEUE = 1024  # writes that are queued or running; further ones wait for room
_IN = 1000  # ids in one IN (…)


class GivenReward(NamedTuple):
    """A reward that is given to the rollout `id`; `source` says who judged."""

    id: str
    reward: float
    source: str | None = None


class Prediction(NamedTuple):
    """What was reported of a guided rollout when it was sampled.

    Attributes:
        critic: `name@version`.
        value: `V` at the first step at which the critic was asked, in units of reward; None if it never was.
        kl: KL divergence from the reference in nats, summed over its tokens.
    """

    critic: str
    method: str
    eta: float
    value: float | None
    kl: float


class RewardResult(NamedTuple):
    """What became of a reward that was given.

    Attributes:
        reward: the rollout's present reward.
        changed: whether it is another one than before.
        prediction: of a guided rollout; None for others.
    """

    id: str
    reward: float
    changed: bool
    prediction: Prediction | None = None


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

    Raises:
        ConfigError: the database cannot be opened.
    """

    def __init__(self, url: str) -> None:
        self._engine = connect(url)
        self._dialect = self._engine.dialect.name
        self._insert = (postgresql if self._dialect == "postgresql" else sqlite).insert(rollouts)
        self._writer = Writer(self._engine)
        self._room = asyncio.Semaphore(QUEUE)

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

    async def add_rewards(self, items: Sequence[GivenReward]) -> list[RewardResult | None]:
        """Gives rewards, in order.

        The reward that a rollout already has changes nothing. Another one replaces it, and the history keeps both.

        Returns:
            A result for each reward. If a rollout does not exist its result is None, and no reward was given at all.
        """
        now = time.time()
        results: list[RewardResult | None] = await self._written(self._add_rewards, [(*item, now) for item in items])
        return results

    async def set_metadata(self, request_id: str, metadata: Mapping[str, str]) -> bool:
        """Replaces the metadata of all choices of a stored chat completion; False if none has that id."""
        return bool(await self._written(self._set_metadata, (request_id, dict(metadata))))

    async def delete(self, request_id: str) -> bool:
        """Deletes all choices of a stored chat completion, with their rewards; False if none has that id."""
        return bool(await self._written(self._delete, request_id))

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

    def _add_rewards(self, connection: Connection, payloads: list[list[Any]]) -> list[list[RewardResult | None]]:
        ids = sorted({item[0] for items in payloads for item in items})
        prediction_columns = [rollouts.c[name] for name in Prediction._fields]
        query = select(rollouts.c.id, rollouts.c.reward, *prediction_columns).order_by(rollouts.c.id).with_for_update()
        current: dict[str, float | None] = {}
        predictions: dict[str, Prediction] = {}
        for part in _parts(ids):
            for rollout_id, reward, *fields in connection.execute(query.where(rollouts.c.id.in_(part))):
                current[rollout_id] = reward
                if (prediction := Prediction(*fields)).eta is not None:
                    predictions[rollout_id] = prediction
        history, answers, changed = [], [], set()
        for items in payloads:
            if any(item[0] not in current for item in items):
                answers.append([RewardResult(i, r, False) if i in current else None for i, r, _, _ in items])
                continue
            answer: list[RewardResult | None] = []
            for rollout_id, reward, source, now in items:
                new = current[rollout_id] != reward
                if new:
                    current[rollout_id] = reward
                    changed.add(rollout_id)
                    source = None if source is None else clean(source)
                    history.append({"rollout_id": rollout_id, "reward": reward, "source": source, "created": now})
                answer.append(RewardResult(rollout_id, reward, new, predictions.get(rollout_id)))
            answers.append(answer)
        if history:
            connection.execute(insert(rewards), history)
            connection.execute(
                update(rollouts).where(rollouts.c.id == bindparam("of")).values(reward=bindparam("new")),
                [{"of": rollout_id, "new": current[rollout_id]} for rollout_id in sorted(changed)],
            )
        return answers

    def _set_metadata(self, connection: Connection, payloads: list[tuple[str, dict[str, str]]]) -> list[bool]:
        done = []
        for request_id, metadata in payloads:
            result = connection.execute(update(rollouts).where(*_same_response(request_id)).values(metadata=metadata))
            done.append(result.rowcount > 0)
        return done

    def _delete(self, connection: Connection, payloads: list[str]) -> list[bool]:
        return [
            connection.execute(delete(rollouts).where(*_same_response(request_id))).rowcount > 0
            for request_id in payloads
        ]

    def _import(
        self, connection: Connection, payloads: list[list[tuple[Parameters, Sequence[Reward]]]]
    ) -> list[Imported]:
        return [self._import_one(connection, batch) for batch in payloads]

    def _import_one(self, connection: Connection, batch: list[tuple[Parameters, Sequence[Reward]]]) -> Imported:
        new = {row["id"]: (row, history) for row, history in reversed(batch)}  # of a repeated id the first counts
        for part in _parts(list(new)):
            for (known,) in connection.execute(select(rollouts.c.id).where(rollouts.c.id.in_(part))):
                del new[known]
        if new:
            connection.execute(self._insert, [row for row, _ in reversed(new.values())])
        entries = [
            {"rollout_id": rollout_id, "reward": r.reward, "source": r.source, "created": r.created}
            for rollout_id, (_, history) in new.items()
            for r in history
        ]
        if entries:
            connection.execute(insert(rewards), entries)
        return Imported(len(new), len(batch) - len(new))

    # -- reads: they block

    def get(self, rollout_id: str) -> Rollout | None:
        """The rollout with this id, with all its rewards; None if there is none."""
        return next(iter(self._fetch(select(rollouts).where(rollouts.c.id == clean(rollout_id)))), None)

    def response(self, request_id: str) -> list[Rollout]:
        """The stored choices of a chat completion, by index; if several responses have that id, of the latest."""
        return self._fetch(select(rollouts).where(*_same_response(request_id)).order_by(rollouts.c.choice))

    def page(self, filters: Filters, after: str | None = None, limit: int = 20, order: Order = "asc") -> Page:
        """At most `limit` rollouts in the order of commits (`"desc"`: reversed), beginning after the rollout `after`.

        Raises:
            RolloutError: no rollout has the id `after`.
        """
        query = filters.apply(select(rollouts), self._dialect)
        if after is not None:
            seq = select(rollouts.c.seq).where(rollouts.c.id == clean(after))
            query = query.where(_after(self._scalar(seq, after), order))
        return self._page(query, limit, order)

    def list_responses(self, filters: Filters, after: str | None, limit: int, order: Order) -> tuple[list[str], bool]:
        """At most `limit` ids of stored chat completions, beginning after the id `after`, and whether more follow.

        They are in the order of commits (`"desc"`: reversed).

        Raises:
            RolloutError: no stored chat completion has the id `after`.
        """
        table, other = rollouts.c, rollouts.alias()
        # A response has the place of its first committed choice; one whose id was used again later is not listed.
        first = (other.c.created == table.created) & (other.c.seq < table.seq)
        passed_over = exists().where(
            other.c.request_id == table.request_id, other.c.route == "chat", first | (other.c.created > table.created)
        )
        query = filters.apply(select(table.request_id), self._dialect).where(table.route == "chat", ~passed_over)
        if after is not None:
            seq = select(func.min(table.seq)).where(*_same_response(after))
            query = query.where(_after(self._scalar(seq, after), order))
        with self._engine.connect() as connection:
            ids = list(connection.scalars(query.order_by(_ordered(order)).limit(limit + 1)))
        return ids[:limit], len(ids) > limit

    def batches(self, filters: Filters, size: int) -> Iterator[list[Rollout]]:
        """All rollouts that are stored now and match the filters, in batches of at most `size`."""
        with self._engine.connect() as connection:
            last = connection.scalar(select(func.max(rollouts.c.seq))) or 0
        seq = 0
        while True:
            query = filters.apply(select(rollouts), self._dialect).where(rollouts.c.seq > seq, rollouts.c.seq <= last)
            with self._engine.connect() as connection:
                rows = connection.execute(query.order_by(rollouts.c.seq).limit(size)).all()
                if not rows:
                    return
                history = self._history(connection, [row.id for row in rows])
            seq = rows[-1].seq
            yield [from_row(row, history.get(row.id, ())) for row in rows]

    def _page(self, query: Select[Any], limit: int, order: Order) -> Page:
        page = self._fetch(query.order_by(_ordered(order)).limit(limit + 1))
        return Page(page[:limit], len(page) > limit)

    def _fetch(self, query: Select[Any]) -> list[Rollout]:
        with self._engine.connect() as connection:
            rows = connection.execute(query).all()
            history = self._history(connection, [row.id for row in rows])
        return [from_row(row, history.get(row.id, ())) for row in rows]

    def _history(self, connection: Connection, ids: list[str]) -> dict[str, list[Reward]]:
        history: dict[str, list[Reward]] = {}
        query = select(rewards).order_by(rewards.c.seq)
        for part in _parts(ids):
            for row in connection.execute(query.where(rewards.c.rollout_id.in_(part))):
                history.setdefault(row.rollout_id, []).append(Reward(row.reward, row.source, row.created))
        return history

    def _scalar(self, query: Select[Any], after: str) -> int:
        with self._engine.connect() as connection:
            seq: int | None = connection.scalar(query)
        if seq is None:
            raise RolloutError(f"after must be the id of one that is stored; got {after!r:.100}", "after")
        return seq


def _same_response(request_id: str) -> tuple[Any, ...]:
    """Conditions for the choices of one chat completion. Clients may repeat a request's id; then the latest counts."""
    table, other = rollouts.c, rollouts.alias()
    wanted = clean(request_id)
    latest = select(func.max(other.c.created)).where(other.c.request_id == wanted, other.c.route == "chat")
    return (table.request_id == wanted, table.route == "chat", table.created == latest.scalar_subquery())


def _after(seq: int, order: Order) -> Any:
    return rollouts.c.seq > seq if order == "asc" else rollouts.c.seq < seq


def _ordered(order: Order) -> Any:
    return rollouts.c.seq.asc() if order == "asc" else rollouts.c.seq.desc()


def _parts(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    return (ids[i : i + _IN] for i in range(0, len(ids), _IN))
