"""Stores on SQLite and on a real PostgreSQL."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import NullPool, create_engine, text

from server.store.database import parse_url
from server.store.rollouts import RolloutStore
from tests.support.postgres import postgres


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'rollouts.db'}"
    url: str = request.getfixturevalue("postgresql")
    outside(url, "DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
    return url


@pytest.fixture
def store(url: str) -> Iterator[RolloutStore]:
    opened = RolloutStore(url)
    yield opened
    opened.close()


def outside(url: str, *statements: str) -> None:
    """Runs SQL past the store."""
    engine = create_engine(parse_url(url), poolclass=NullPool)
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))
