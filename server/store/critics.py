"""Which critics all servers of one store are to have: versions, and which of them are active.

Servers follow what stands here (`server.critics.following`), so that one activation reaches all of them, and one that
starts comes up with what the others have. Nothing is forgotten: an activation is a row, and a version that is no longer
wanted keeps its own.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sqlalchemy import Connection, insert, select, update

from qsharp_core.errors import CriticError
from server.store.reading import Reader
from server.store.tables import critic_activations, critic_versions
from server.store.writer import Writer


class PublishedVersion(NamedTuple):
    """A version of a critic.

    Attributes:
        location: where its files are: a folder.
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
        created: when, in seconds since the epoch.
        given_by: holder of the key that it was made with.
        why: in the words of whoever made it.
    """

    name: str
    version: str
    share: float
    is_default: bool
    created: float
    given_by: str
    why: str | None


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
        reader, writer: of the database.
    """

    def __init__(self, reader: Reader, writer: Writer) -> None:
        self._reader = reader
        self._writer = writer

    def desired(self) -> Desired:
        """What servers are to have now; it blocks.

        Raises:
            StoreError: the store cannot be read.
        """
        with self._reader.connected() as connection:
            return _desired(connection)

    def history(self, name: str) -> list[Activation]:
        """What was decided about a name, oldest first; it blocks.

        Raises:
            StoreError: the store cannot be read.
        """
        query = select(critic_activations).where(critic_activations.c.name == name).order_by(critic_activations.c.seq)
        with self._reader.connected() as connection:
            return [_activation(row) for row in connection.execute(query)]

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

    async def retire(self, name: str, version: str) -> None:
        """Has servers unload a version.

        Raises:
            CriticError: it is not published, or its name means it while there are others.
            StoreError: nothing was written.
        """
        await self._done(_retire, (name, version))

    async def _done(self, run: Callable[[Connection, list[Any]], list[str | None]], payload: Any) -> None:
        # Answers and no exceptions: one of those would fail the transaction that others share.
        refusal = await asyncio.wrap_future(self._writer.submit(run, payload))
        if refusal is not None:
            raise CriticError(refusal)


# -- what the writer runs: for each payload None, or why nothing was done


def _publish(connection: Connection, payloads: list[PublishedVersion]) -> list[str | None]:
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
    return [_activate_one(connection, activation) for activation in payloads]


def _activate_one(connection: Connection, activation: Activation) -> str | None:
    stored = _stored(connection, activation.name, activation.version)
    if stored is None or not stored.wanted:
        return f"{activation.name}@{activation.version} is not published"
    connection.execute(insert(critic_activations).values(activation._asdict()))
    return None


def _retire(connection: Connection, payloads: list[tuple[str, str]]) -> list[str | None]:
    return [_retire_one(connection, name, version) for name, version in payloads]


def _retire_one(connection: Connection, name: str, version: str) -> str | None:
    now = _desired(connection)
    if f"{name}@{version}" not in now.versions:
        return f"{name}@{version} is not published"
    if now.active.get(name) == version and any(v.name == name and v.version != version for v in now.versions.values()):
        return f"{name}@{version} is active: activate another version of {name} first"
    _change(connection, name, version, wanted=False)
    return None


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


def _activation(row: Any) -> Activation:
    return Activation(*(getattr(row, name) for name in Activation._fields))


def _desired(connection: Connection) -> Desired:
    wanted = {version.key: version for version in _versions(connection)}
    active: dict[str, str] = {}
    trials: dict[str, tuple[str, float]] = {}
    default = None
    for row in connection.execute(select(critic_activations).order_by(critic_activations.c.seq)):
        if row.share == 1:
            active[row.name] = row.version
        if 0 < row.share < 1:
            trials[row.name] = (row.version, row.share)
        else:
            trials.pop(row.name, None)
        if row.is_default or default is None:
            default = row.name
    return Desired(
        wanted,
        {name: version for name, version in active.items() if f"{name}@{version}" in wanted},
        {name: trial for name, trial in trials.items() if f"{name}@{trial[0]}" in wanted},
        default,
    )
