"""The store's routes behind the gate, in this process: the real ones on a real store, without an engine."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI
from starlette.testclient import TestClient

from qsharp_core.errors import QSharpError
from server import errors
from server.access import keys
from server.access.gate import MIB, Gate, Policy
from server.access.keys import ADMIN, KeyRing
from server.access.quotas import Quotas
from server.api import rewards, rollouts, stored_chat
from server.settings import Settings
from server.store.rollouts import RolloutStore

USERS = ("ann", "bob")


class Served:
    """The app, for clients of Ann, Bob and the admin; an error that is none of ours is raised in the test.

    Attributes:
        state: what the routes share.
        keys: by holder.
    """

    def __init__(self, store: RolloutStore, folder: Path, settings: Settings) -> None:
        file = folder / "keys.json"
        self.keys = {name: keys.add(file, name) for name in USERS} | {ADMIN: "admin-key"}
        app = FastAPI()
        self.state = SimpleNamespace(
            store=store,
            critics=SimpleNamespace(catalog=SimpleNamespace(critics={}), workers=SimpleNamespace(stopping=False)),
            settings=settings,
        )
        app.state.qsharp = self.state
        app.add_exception_handler(QSharpError, errors.handle)
        app.add_exception_handler(RecursionError, errors.handle_depth)
        for routes in (rewards, rollouts, stored_chat):
            routes.attach(app)
        policy = Policy(KeyRing(admin=self.keys[ADMIN], path=file), Quotas(), int(settings.max_body_mib * MIB))
        self._app = Gate(app, app, policy)

    def client(self, name: str) -> TestClient:
        """A client that sends this holder's key."""
        return TestClient(self._app, headers={"Authorization": f"Bearer {self.keys[name]}"})


@contextmanager
def serving(store: RolloutStore, **settings: Any) -> Iterator[Served]:
    """Serves a store."""
    with tempfile.TemporaryDirectory(prefix="qsharp-") as folder:
        yield Served(store, Path(folder), Settings(**settings))


def error_of(answer: Any, status: int) -> dict[str, object]:
    """The error of an answer with this status."""
    assert answer.status_code == status, answer.text
    error: dict[str, object] = answer.json()["error"]
    assert error["code"] == status
    return error
