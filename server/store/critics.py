"""Which critics all servers of one store are to have: versions, and which of them are active.

Servers follow what stands here (`server.critics.following`), so that one activation reaches all of them, and one that
starts comes up with what the others have. Nothing is forgotten: an activation is a row, and a version that is no longer
wanted keeps its own.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Engine, case, func, insert, select, update

from qsharp_core.errors import CriticError
from server.store.changes import announce, changes
from server.store.reading import Reader
from server.store.tables import critic_activations, critic_versions
from server.store.writer import Writer


class PublishedVersion(NamedTuple):
    """A version of a critic.

    Attributes:
        location: where its files are: a folder, or the URL of one.
        digest: of these files (`qsharp_core.critic.digest`).
        metrics: what its training measured.
        parent: the version that its training began with, as `name@version`.
        published_by: holder of the key that it was published with.
    """

    name: str
    version: str
    location: str
    digest: str
    metrics: Mapping[str, Any]
    parent: str | None
    published_by: str

    @property
    def key(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"


class Activation(NamedTuple):
    """A decision about what a bare name means.

    Attributes:
        share: of the requests that name no version: 1 for all, less for a trial beside the version that is active, and
            0 for its end.
        is_default: whether the name became the one of requests that name no critic.
        rolled_back: whether it returned to a version that was active earlier.
        created: when, in seconds since the epoch.
        given_by: holder of the key that it was made with.
        why: in the words of whoever made it.
    """

    name: str
    version: str
    share: float
    is_default: bool
    rolled_back: bool
    created: float
    given_by: str
    why: str | None

    @property
    def key(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class Desired:
    """What servers are to have.

    Attributes:
        versions: to be loaded, by `name@version`.
        active: the version that each name means.
        trials: for some names, another version and its share of the requests.
        default: the name that requests mean which name no critic; None if nothing was ever activated.
    """

    versions: Mapping[str, PublishedVersion] = field(default_factory=dict)
    active: Mapping[str, str] = field(default_factory=dict)
    trials: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    default: str | None = None


class CriticRecords:
    """The versions and activations of one database.

    Args:
        engine, reader, writer: of the database.
    """

    def __init__(self, engine: Engine, reader: Reader, writer: Writer) -> None:
        self._engine = engine
        self._reader = reader
        self._writer = writer

    def desired(self) -> Desired:
        """What servers are to have now; it blocks.

        Raises:
            StoreError: the store cannot be read.
        """
        with self._reader.connected() as connection:
            return _desired(connection)

    def changes(self, seconds: float) -> AsyncGenerator[None]:
        """Yields at once, and whenever `desired` may have changed: at the latest after so many seconds."""
        return changes(self._engine, seconds)

    def history(self, name: str) -> list[Activation]:
        """What was decided about a name, oldest first; it blocks.

        Raises:
            StoreError: the store cannot be read.
        """
        table = critic_activations.c
        columns = [table[field] for field in Activation._fields]
        query = select(*columns).where(table.name == name).order_by(table.seq)
        with self._reader.connected() as connection:
            return [Activation(*row) for row in connection.execute(query)]

    def knows(self, name: str) -> bool:
        """Whether anything was ever decided about this name; it blocks.

        Raises:
            StoreError: the store cannot be read.
        """
        with self._reader.connected() as connection:
            query = select(critic_activations.c.name).where(critic_activations.c.name == name).limit(1)
            return connection.execute(query).first() is not None

    def previous(self, name: str) -> str | None:
        """The version to which a roll-back of this name returns, None if there is none; it blocks.

        Raises:
            StoreError: the store cannot be read.
        """
        now, passed = self.desired(), _passed(self.history(name))
        present = now.active.get(name)
        return next((v for v in reversed(passed) if v != present and f"{name}@{v}" in now.versions), None)

    async def publish(self, version: PublishedVersion) -> None:
        """Has servers load a version.

        Raises:
            CriticError: it exists with other files: versions are never changed.
            StoreError: nothing was written.
        """
        await self._done(_publish, version)

    async def activate(self, activation: Activation) -> None:
        """Notes a decision, which servers follow.

        Raises:
            CriticError: the version is not published, or is retired.
            StoreError: nothing was written.
        """
        await self._done(_activate, activation)

    async def retire(self, name: str, version: str, by: str) -> None:
        """Has servers unload a version; a trial of it has ended.

        Args:
            name, version: of the critic.
            by: holder of the key that it is retired with.

        Raises:
            CriticError: it is not published, or its name means it while there are others.
            StoreError: nothing was written.
        """
        await self._done(_retire, (name, version, by))

    async def _done(self, run: Callable[[Connection, list[Any]], list[str | None]], payload: Any) -> None:
        # Answers and no exceptions: one of those would fail the transaction that others share.
        refusal = await asyncio.wrap_future(self._writer.submit(run, payload))
        if refusal is not None:
            raise CriticError(refusal)


# -- what the writer runs: for each payload None, or why nothing was done


def _publish(connection: Connection, payloads: list[PublishedVersion]) -> list[str | None]:
    announce(connection)
    return [_publish_one(connection, version) for version in payloads]


def _publish_one(connection: Connection, version: PublishedVersion) -> str | None:
    stored = _stored(connection, version.name, version.version)
    if stored is None:
        row = {**version._asdict(), "metrics": dict(version.metrics), "published": time.time(), "wanted": True}
        connection.execute(insert(critic_versions).values(row))
    elif stored.digest != version.digest:
        return f"{version.key} is published with other files ({stored.digest:.12}…, these are {version.digest:.12}…)"
    else:
        _change(connection, version.name, version.version, wanted=True, location=version.location)
    return None


def _activate(connection: Connection, payloads: list[Activation]) -> list[str | None]:
    announce(connection)
    return [_activate_one(connection, activation) for activation in payloads]


def _activate_one(connection: Connection, activation: Activation) -> str | None:
    stored = _stored(connection, activation.name, activation.version)
    if stored is None or not stored.wanted:
        return f"{activation.name}@{activation.version} is not published"
    connection.execute(insert(critic_activations).values(activation._asdict()))
    return None


def _retire(connection: Connection, payloads: list[tuple[str, str, str]]) -> list[str | None]:
    announce(connection)
    return [_retire_one(connection, *payload) for payload in payloads]


def _retire_one(connection: Connection, name: str, version: str, by: str) -> str | None:
    _stored(connection, name, version)  # locks it: nobody activates it meanwhile
    now = _desired(connection)
    if f"{name}@{version}" not in now.versions:
        return f"{name}@{version} is not published"
    if now.active.get(name) == version and any(v.name == name and v.version != version for v in now.versions.values()):
        return f"{name}@{version} is active: activate another version of {name} first"
    _change(connection, name, version, wanted=False)
    if now.trials.get(name, ("", 0))[0] == version:
        end = Activation(name, version, 0.0, False, False, time.time(), by, "it is unloaded")
        connection.execute(insert(critic_activations).values(end._asdict()))
    return None


def last_published(connection: Connection) -> float:
    """When the last version was published that servers are to have, in seconds since the epoch; 0 without one."""
    query = select(func.max(critic_versions.c.published)).where(critic_versions.c.wanted)
    return connection.scalar(query) or 0.0


def _stored(connection: Connection, name: str, version: str) -> Any:
    table = critic_versions.c
    return connection.execute(
        select(critic_versions).where(table.name == name, table.version == version).with_for_update()
    ).one_or_none()


def _change(connection: Connection, name: str, version: str, **values: Any) -> None:
    table = critic_versions.c
    connection.execute(update(critic_versions).where(table.name == name, table.version == version).values(**values))


def _versions(connection: Connection) -> list[PublishedVersion]:
    columns = [critic_versions.c[name] for name in PublishedVersion._fields]
    query = select(*columns).where(critic_versions.c.wanted).order_by(critic_versions.c.published)
    return [PublishedVersion(*row) for row in connection.execute(query)]


def _passed(history: Sequence[Activation]) -> list[str]:
    """The versions that were active one after the other, without those that were rolled back."""
    passed: list[str] = []
    for decision in history:
        if decision.rolled_back:
            while passed and passed[-1] != decision.version:
                passed.pop()
        if decision.share == 1 and passed[-1:] != [decision.version]:
            passed.append(decision.version)
    return passed


def _desired(connection: Connection) -> Desired:
    table = critic_activations.c
    columns = [table[name] for name in Activation._fields]

    def latest(*conditions: ColumnElement[bool]) -> list[Activation]:
        """Of each name the last decision that meets the conditions."""
        last = select(func.max(table.seq)).where(*conditions).group_by(table.name)
        return [Activation(*row) for row in connection.execute(select(*columns).where(table.seq.in_(last)))]

    # The last that was chosen; as long as none was, the first that was ever active.
    order = (table.is_default.desc(), case((table.is_default, -table.seq), else_=table.seq))
    default = connection.execute(select(table.name).order_by(*order).limit(1))
    default_name = default.scalar()
    active, last = latest(table.share == 1), latest()
    # Read after what was decided about them: what is published and activated meanwhile is there, and not the other way.
    wanted = {version.key: version for version in _versions(connection)}
    return Desired(
        wanted,
        {one.name: one.version for one in active if one.key in wanted},
        {one.name: (one.version, one.share) for one in last if 0 < one.share < 1 and one.key in wanted},
        default_name,
    )
