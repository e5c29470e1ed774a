"""The store as the server uses it: writes are awaited until they are committed, reads are plain and block.

    store = RolloutStore("sqlite:///rollouts.db")
    await store.add([rollout])                      # durable when it returns
    page = store.page(Filters(has_reward=True))     # in a thread, where an event loop must not wait

Lists are in the order of commits, so a cursor never misses what was committed behind it.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from sqlalchemy import Connection, Select, bindparam, delete, exists, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from qsharp_core.errors import RolloutError
from qsharp_core.rollouts.database import connect
from qsharp_core.rollouts.records import Reward, Rollout
from qsharp_core.rollouts.schema import clean, from_row, rewards, rollouts, to_row
from qsharp_core.rollouts.writer import Writer

QUEUE = 1024  # writes on their way; whoever comes then waits for room
_IN = 1000  # ids in one IN (…)

Order = Literal["asc", "desc"]


class GivenReward(NamedTuple):
    """A reward for a rollout."""

    id: str
    reward: float
    source: str | None = None


class Prediction(NamedTuple):
    """What was said of a guided rollout when it was sampled; its critic is `name@version`."""

    critic: str
    method: str
    eta: float
    value: float | None
    kl: float


class RewardResult(NamedTuple):
    """A rollout's present reward, whether it is a new one, and what was predicted if the rollout is a guided one."""

    id: str
    reward: float
    changed: bool
    prediction: Prediction | None = None


class Imported(NamedTuple):
    """How many rollouts were new, and how many were there."""

    imported: int
    skipped: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """Which rollouts; None and empty do not filter.

    Attributes:
        critic: `name@version`, or `name` for all its versions.
        guided: whether a critic guided it throughout.
        metadata: entries that it has, all of them.
        has_reward: whether it has one.
        has_valid_position: whether a reward labels a position of it, so that it can be trained on.
    """

    critic: str | None = None
    guided: bool | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    has_reward: bool | None = None
    has_valid_position: bool | None = None
    model: str | None = None

    def apply(self, query: Select[Any], dialect: str) -> Select[Any]:
        """The query with its conditions."""
        table = rollouts.c
        if self.critic is not None:
            wanted = clean(self.critic)
            query = query.where(
                table.critic == wanted if "@" in wanted else table.critic.startswith(f"{wanted}@", autoescape=True)
            )
        if self.guided is not None:
            query = query.where(table.eta.is_not(None) if self.guided else table.eta.is_(None))
        if self.has_reward is not None:
            query = query.where(table.reward.is_not(None) if self.has_reward else table.reward.is_(None))
        if self.has_valid_position is not None:
            first = table.first_valid_position
            # A token id takes four bytes (`schema.pack`).
            valid = first.is_not(None) & (4 * first < func.length(table.completion_token_ids))
            query = query.where(valid if self.has_valid_position else ~valid)
        if self.model is not None:
            query = query.where(table.model == clean(self.model))
        for name, value in self.metadata.items():
            # Not by a JSON path: SQLite's cannot quote every key.
            each = func.json_each_text if dialect == "postgresql" else func.json_each
            entry = each(table.metadata).table_valued("key", "value")
            query = query.where(exists().where(entry.c.key == clean(name), entry.c.value == clean(value)))
        return query


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list; `more` tells whether something follows."""

    data: list[Rollout]
    more: bool


class RolloutStore:
    """Opens, and migrates, the database at once.

    Args:
        url: see `database.ACCEPTED`.

    Raises:
        ConfigError: it cannot be opened.
    """

    def __init__(self, url: str) -> None:
        self._engine = connect(url)
        self._dialect = self._engine.dialect.name
        self._insert = (postgresql if self._dialect == "postgresql" else sqlite).insert(rollouts)
        self._writer = Writer(self._engine)
        self._room = asyncio.Semaphore(QUEUE)

    @property
    def lag(self) -> float:
        """Seconds that the oldest write on its way has waited; 0 if there is none."""
        return self._writer.lag()

    def close(self) -> None:
        """Ends after everything queued is written."""
        self._writer.close()
        self._engine.dispose()

    # -- writes: committed when they return; StoreError otherwise

    async def add(self, made: Sequence[Rollout]) -> None:
        """Stores new rollouts, all or none."""
        await self._written(self._add, [to_row(rollout) for rollout in made])

    async def add_rewards(self, given: Sequence[GivenReward]) -> list[RewardResult | None]:
        """Gives rewards, in order; None for a rollout that does not exist, and then none of them is given.

        The reward that a rollout already has changes nothing. Another one replaces it, and the history keeps both.
        """
        now = time.time()
        results: list[RewardResult | None] = await self._written(self._add_rewards, [(*item, now) for item in given])
        return results

    async def set_metadata(self, request_id: str, metadata: Mapping[str, str]) -> bool:
        """Replaces the metadata of a stored chat completion, all its choices; False if there is none of that id."""
        return bool(await self._written(self._set_metadata, (request_id, dict(metadata))))

    async def delete(self, request_id: str) -> bool:
        """Deletes a stored chat completion, all its choices with their rewards; False if there is none of that id."""
        return bool(await self._written(self._delete, request_id))

    async def import_all(self, batch: Sequence[Rollout]) -> Imported:
        """Stores rollouts with their rewards and history, all or none; those whose id is there stay as they are."""
        result: Imported = await self._written(self._import, [(to_row(r), r.rewards) for r in batch])
        return result

    async def _written(self, run: Callable[[Connection, list[Any]], list[Any]], payload: Any) -> Any:
        async with self._room:
            future: Future[Any] = self._writer.submit(run, payload)
            return await asyncio.wrap_future(future)

    # -- what the writer runs, for several of a kind at once

    def _add(self, connection: Connection, payloads: list[list[dict[str, Any]]]) -> list[None]:
        # Ids are random: one that is there was written by this very operation, whose commit seemed to fail.
        connection.execute(self._insert.on_conflict_do_nothing(), [row for rows in payloads for row in rows])
        return [None] * len(payloads)

    def _add_rewards(self, connection: Connection, payloads: list[list[Any]]) -> list[list[RewardResult | None]]:
        ids = sorted({item[0] for given in payloads for item in given})
        predicted = [rollouts.c[name] for name in Prediction._fields]
        query = select(rollouts.c.id, rollouts.c.reward, *predicted).order_by(rollouts.c.id).with_for_update()
        current: dict[str, float | None] = {}
        predictions: dict[str, Prediction] = {}
        for part in _parts(ids):
            for rollout_id, reward, *fields in connection.execute(query.where(rollouts.c.id.in_(part))):
                current[rollout_id] = reward
                if (prediction := Prediction(*fields)).eta is not None:
                    predictions[rollout_id] = prediction
        history, answers, changed = [], [], set()
        for given in payloads:
            if any(item[0] not in current for item in given):
                answers.append([RewardResult(i, r, False) if i in current else None for i, r, _, _ in given])
                continue
            answer: list[RewardResult | None] = []
            for rollout_id, reward, source, now in given:
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
        self, connection: Connection, payloads: list[list[tuple[dict[str, Any], Sequence[Reward]]]]
    ) -> list[Imported]:
        return [self._import_one(connection, batch) for batch in payloads]

    def _import_one(self, connection: Connection, batch: list[tuple[dict[str, Any], Sequence[Reward]]]) -> Imported:
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
        """A rollout with its history; None if there is none."""
        return next(iter(self._fetch(select(rollouts).where(rollouts.c.id == clean(rollout_id)))), None)

    def response(self, request_id: str) -> list[Rollout]:
        """The stored choices of a chat completion, by index; of several responses with that id the latest."""
        return self._fetch(select(rollouts).where(*_same_response(request_id)).order_by(rollouts.c.choice))

    def page(self, filters: Filters, after: str | None = None, limit: int = 20, order: Order = "asc") -> Page:
        """Rollouts in the order of commits, from behind the id `after`.

        Raises:
            RolloutError: no rollout has the id `after`.
        """
        query = filters.apply(select(rollouts), self._dialect)
        if after is not None:
            seq = select(rollouts.c.seq).where(rollouts.c.id == clean(after))
            query = query.where(_behind(self._scalar(seq, after), order))
        return self._page(query, limit, order)

    def count(self, filters: Filters) -> int:
        """How many rollouts the filters leave."""
        query = filters.apply(select(func.count()).select_from(rollouts), self._dialect)
        with self._engine.connect() as connection:
            return connection.scalar(query) or 0

    def list_responses(self, filters: Filters, after: str | None, limit: int, order: Order) -> tuple[list[str], bool]:
        """Ids of stored chat completions, as `page`, and whether more follow.

        Raises:
            RolloutError: `after` is none of them.
        """
        table, other = rollouts.c, rollouts.alias()
        # A response stands where its first committed choice does; one whose id came again is not shown.
        first = (other.c.created == table.created) & (other.c.seq < table.seq)
        passed_over = exists().where(
            other.c.request_id == table.request_id, other.c.route == "chat", first | (other.c.created > table.created)
        )
        query = filters.apply(select(table.request_id), self._dialect).where(table.route == "chat", ~passed_over)
        if after is not None:
            seq = select(func.min(table.seq)).where(*_same_response(after))
            query = query.where(_behind(self._scalar(seq, after), order))
        with self._engine.connect() as connection:
            ids = list(connection.scalars(query.order_by(_ordered(order)).limit(limit + 1)))
        return ids[:limit], len(ids) > limit

    def batches(self, filters: Filters, size: int) -> Iterator[list[Rollout]]:
        """All rollouts that are there now, in batches of at most `size`."""
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
        found = self._fetch(query.order_by(_ordered(order)).limit(limit + 1))
        return Page(found[:limit], len(found) > limit)

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
            found: int | None = connection.scalar(query)
        if found is None:
            raise RolloutError(f"after must be the id of one that is stored; got {after!r:.100}", "after")
        return found


def _same_response(request_id: str) -> tuple[Any, ...]:
    """Conditions for the choices of one chat completion; clients may repeat a request's id, the latest counts."""
    table, other = rollouts.c, rollouts.alias()
    wanted = clean(request_id)
    latest = select(func.max(other.c.created)).where(other.c.request_id == wanted, other.c.route == "chat")
    return (table.request_id == wanted, table.route == "chat", table.created == latest.scalar_subquery())


def _behind(seq: int, order: Order) -> Any:
    return rollouts.c.seq > seq if order == "asc" else rollouts.c.seq < seq


def _ordered(order: Order) -> Any:
    return rollouts.c.seq.asc() if order == "asc" else rollouts.c.seq.desc()


def _parts(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    return (ids[i : i + _IN] for i in range(0, len(ids), _IN))
