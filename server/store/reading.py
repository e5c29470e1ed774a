"""Reads rollouts from the database. A row that cannot be read is left out and counted, and does not fail the others."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, Select, select
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from qsharp_core.errors import StoreError
from qsharp_core.rollouts.records import Rollout
from server.store.failures import reason
from server.store.rewards import histories
from server.store.tables import from_row, rollouts

logger = logging.getLogger("vllm.qsharp")
Found = list[tuple[int, Rollout | None]]  # by `seq`, in the order of the query; None for a row that cannot be read


class Reader:
    """Reads from one database.

    Args:
        engine: of the database.
        on_unreadable: is called for every row that is left out of an answer.
    """

    def __init__(self, engine: Engine, on_unreadable: Callable[[], None]) -> None:
        self._engine = engine
        self._on_unreadable = on_unreadable

    @contextmanager
    def connected(self) -> Iterator[Connection]:
        """A connection to read with.

        Raises:
            StoreError: the database failed; the message has no SQL, because it is answered to clients.
        """
        try:
            with self._engine.connect() as connection:
                yield connection
        except SQLAlchemyError as error:
            logger.warning("the rollout store could not be read: %s", error)
            raise StoreError(f"the rollout store failed, it could not be read: {reason(error)}") from error

    def find(self, query: Select[Any]) -> Found:
        """The rollouts of a query over all columns of `rollouts`, with their rewards."""
        with self.connected() as connection:
            rows = self._rows(connection, query)
            history = histories(connection, [row.id for _, row in rows if row is not None])
        found: Found = []
        for seq, row in rows:
            rollout = None
            if row is not None:
                try:
                    rollout = from_row(row, history.get(row.id, ()))
                except (ValueError, TypeError) as error:
                    self._leave_out(seq, error)
            found.append((seq, rollout))
        return found

    def rollouts(self, query: Select[Any]) -> list[Rollout]:
        """The same, without those that cannot be read."""
        return [rollout for _, rollout in self.find(query) if rollout is not None]

    def _rows(self, connection: Connection, query: Select[Any]) -> list[tuple[int, Any]]:
        try:
            return [(row.seq, row) for row in connection.execute(query)]
        except Exception as error:
            if not _is_of_a_row(error):
                raise
        # One of them; which one is not told.
        rows: list[tuple[int, Any]] = []
        for seq in connection.scalars(query.with_only_columns(rollouts.c.seq)).all():
            row = None
            try:
                row = connection.execute(select(rollouts).where(rollouts.c.seq == seq)).one()
            except Exception as error:
                if not _is_of_a_row(error):
                    raise
                self._leave_out(seq, error)
            rows.append((seq, row))
        return rows

    def _leave_out(self, seq: int, error: Exception) -> None:
        logger.error("row %d of the rollout store cannot be read and is left out: %.300s", seq, error)
        self._on_unreadable()


def _is_of_a_row(error: Exception) -> bool:
    """Whether what a row holds is wrong: its JSON (which is parsed as the row is fetched), or text that is no UTF-8."""
    if isinstance(error, OperationalError):
        return "Could not decode" in str(error.orig)
    return isinstance(error, ValueError | TypeError | RecursionError)
