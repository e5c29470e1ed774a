"""Tells servers at once that what they are to have was changed: PostgreSQL's LISTEN and NOTIFY.

A message may be missed while a connection is lost, or where a proxy shares connections among clients, so whoever waits
is woken from time to time, too. SQLite has nothing of the kind.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator

import psycopg
from sqlalchemy import Connection, Engine, text

from server.store.database import CONNECT_SECONDS

logger = logging.getLogger("vllm.qsharp")
CHANNEL = "qsharp_critics"


def announce(connection: Connection) -> None:
    """Wakes all who wait, when this transaction is committed."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_notify(:channel, '')"), {"channel": CHANNEL})


async def changes(engine: Engine, seconds: float) -> AsyncGenerator[None]:
    """Yields at once, whenever a change is announced, and at the latest so many seconds after the last time.

    Args:
        engine: of the database.
        seconds: the longest pause, and while the database cannot be reached, the pause between two attempts.
    """
    if engine.dialect.name != "postgresql":
        while True:
            yield
            await asyncio.sleep(seconds)
    lost = False
    while True:
        try:
            async with await _connect(engine) as connection:
                await connection.execute(f"LISTEN {CHANNEL}")
                while True:
                    yield  # at first for what was changed before it listened
                    async for _ in connection.notifies(timeout=seconds, stop_after=1):
                        pass
                    lost = False
        except Exception as error:  # whatever it is, it must not end this
            if lost:
                await asyncio.sleep(seconds)
            else:
                logger.warning("the store cannot tell of changes, and is asked every %g s: %s", seconds, error)
            lost = True
            yield


async def _connect(engine: Engine) -> psycopg.AsyncConnection:
    args, settings = engine.dialect.create_connect_args(engine.url)
    settings = {"connect_timeout": CONNECT_SECONDS, **settings}
    return await psycopg.AsyncConnection.connect(*args, **settings, autocommit=True)
