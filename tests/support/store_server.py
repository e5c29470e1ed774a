"""The store's routes alone, in this process: real routes on a real store, without an engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI
from pydantic import SecretStr
from starlette.testclient import TestClient

from qsharp_core.errors import QSharpError
from server import errors
from server.access.principal import Principal
from server.api import rewards, rollouts, stored_chat
from server.store.rollouts import RolloutStore
from tests.support.fake_server import Named

ADMIN = "admin-key"
KEYS = {"ann-key": Principal("ann"), "bob-key": Principal("bob"), ADMIN: Principal("root", admin=True)}


@contextmanager
def serving(store: RolloutStore) -> Iterator[FastAPI]:
    """The app, for `client`; an error that is none of ours is raised in the test."""
    app = FastAPI()
    settings = SimpleNamespace(admin_key=SecretStr(ADMIN))
    app.state.qsharp = SimpleNamespace(store=store, catalog=SimpleNamespace(critics={}), settings=settings)
    app.add_exception_handler(QSharpError, errors.handle)
    app.add_middleware(Named, keys=KEYS)
    for routes in (rewards, rollouts, stored_chat):
        routes.attach(app)
    yield app


def client(app: FastAPI, key: str) -> TestClient:
    """A client that sends this key."""
    return TestClient(app, headers={"Authorization": f"Bearer {key}"})


def error_of(answer: Any, status: int) -> dict[str, object]:
    """The error of an answer with this status."""
    assert answer.status_code == status, answer.text
    error: dict[str, object] = answer.json()["error"]
    assert error["code"] == status
    return error
