"""Opens the store's database by its URL, and migrates it to the present schema.

SQLite runs in WAL mode with `synchronous=FULL`: a committed rollout survives a loss of power, and readers do not block
the writer. PostgreSQL behaves so by default.
"""

import sqlite3
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from qsharp_core.errors import ConfigError
from qsharp_core.rollouts.text import to_json

ACCEPTED = "a file's path, sqlite:///PATH or postgresql://USER@HOST/DATABASE"
WRITES = "qsharp_writes"  # execution option of connections that will write
CONNECT_SECONDS = 10  # that PostgreSQL has to answer
_LOCK = 0x5153_4841_5250  # key of PostgreSQL's lock while migrations run: several programs may start together


def parse_url(url: str) -> URL:
    """SQLAlchemy's URL for the store's, with the drivers that we use.

    Raises:
        ConfigError: the URL cannot be used. The message says what is accepted, and does not repeat the URL, which may
            hold a password.
    """
    try:
        parsed = make_url(url if "://" in url else f"sqlite:///{url}")
    except (ArgumentError, ValueError) as error:
        raise ConfigError(f"the rollout store's URL cannot be read: give {ACCEPTED}") from error
    backend = parsed.get_backend_name()
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise ConfigError(f"the rollout store cannot use {backend}: give {ACCEPTED}")
    if not parsed.database or parsed.database == ":memory:":
        raise ConfigError("the rollout store must be a file, to survive the server: give sqlite:///PATH")
    folder = Path(parsed.database).absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"the rollout store's folder {folder} does not exist")
    return parsed.set(drivername="sqlite+pysqlite")


def connect(url: str) -> Engine:
    """SQLAlchemy's engine for the database, which has the present schema then.

    Raises:
        ConfigError: the database cannot be reached, or was made by a newer version of this program.
    """
    parsed = parse_url(url)
    sqlite = parsed.get_backend_name() == "sqlite"
    engine = create_engine(
        parsed,
        json_serializer=to_json,
        pool_pre_ping=True,
        pool_size=8,
        max_overflow=8,
        connect_args={} if sqlite else {"connect_timeout": CONNECT_SECONDS},
    )
    if sqlite:
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    try:
        migrate(engine)
    except (ConfigError, SQLAlchemyError, sqlite3.Error) as error:
        engine.dispose()
        if isinstance(error, ConfigError):
            raise
        reason = str(error.orig if isinstance(error, DBAPIError) else error).strip()
        safe_url = parsed.render_as_string(hide_password=True)
        raise ConfigError(f"the rollout store {safe_url} cannot be opened: {reason}") from error
    return engine


def migrate(engine: Engine) -> None:
    """Runs the migrations that the database lacks, all of them or none.

    Raises:
        ConfigError: the database was made by a newer version of this program.
    """
    config = _config()
    with engine.connect().execution_options(**{WRITES: True}) as connection, connection.begin():
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            head = ScriptDirectory.from_config(config).get_current_head()
            raise ConfigError(
                f"the rollout store was made by a newer version of this program ({error}; this one knows up to {head})"
            ) from error


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "server.store:migrations")
    config.set_main_option("path_separator", "os")
    return config


def _set_up_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # pysqlite's own BEGINs come late; `_begin_sqlite` sends ours
    cursor = connection.cursor()
    for pragma in ("busy_timeout=30000", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that first reads and then writes could not wait for another writer.
    writes = connection.get_execution_options().get(WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
