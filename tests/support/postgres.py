"""A PostgreSQL of its own for tests, which are skipped where there is none."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from benchmarks import postgres as own
from benchmarks.postgres import NoPostgresError, Postgres


@contextmanager
def postgres() -> Iterator[str]:
    """Yields the URL of an empty database; skips the test where PostgreSQL is not installed."""
    with running_postgres() as running:
        yield running.url


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """The same for tests that stop it and start it again; at the end it must run."""
    with ExitStack() as stack:
        try:
            running = stack.enter_context(own.running_postgres())
        except NoPostgresError as error:
            pytest.skip(str(error))
        yield running
