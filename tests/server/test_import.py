"""What an import stores, refuses, and says when the store fails in the middle of it."""

import asyncio
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fastapi import Request
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient
from starlette.types import Message

from qsharp_core.rollouts import parquet
from qsharp_core.rollouts.records import Rollout
from server.access.keys import ADMIN
from server.api import uploads
from server.errors import SlowRequestError
from server.store.filters import Filters
from server.store.rollouts import RolloutStore
from tests.server.test_store import made, unguided
from tests.support.store_server import error_of, serving

IMPORT = "/v1/rollouts/import"


@pytest.fixture
def http(store: RolloutStore) -> Iterator[TestClient]:
    with serving(store) as served:
        yield served.client(ADMIN)


def file_of(*batches: list[Rollout]) -> bytes:
    return b"".join(parquet.write(batches))


def test_a_store_that_fails_in_the_middle_says_what_was_written(
    http: TestClient, store: RolloutStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of the five batches of two are in, and the same file again brings the rest."""
    monkeypatch.setattr(parquet, "BATCH", 2)
    rollouts = [unguided(owner="ann") for _ in range(9)]
    content = file_of(rollouts)
    assert http.post(IMPORT, content=file_of(rollouts[:1])).json()["imported"] == 1
    transact, failing = store._writer._transact, [False]

    def fails(group: Any) -> Any:
        if store.count(Filters(), owner=None) >= 4 and failing[0]:
            raise OperationalError("INSERT INTO rollouts", {}, Exception("disk full"))
        return transact(group)

    monkeypatch.setattr(store._writer, "_transact", fails)
    failing[0] = True
    message = str(error_of(http.post(IMPORT, content=content), 503)["message"])
    assert "failed after 4 of the file's 9 rollouts: 3 were written and 1 were there before" in message
    assert "nothing was written" not in message
    assert "INSERT" not in message
    assert store.count(Filters(), owner=None) == 4
    failing[0] = False
    assert http.post(IMPORT, content=content).json() == {"object": "rollouts.import", "imported": 5, "skipped": 4}
    assert [one for batch in store.batches(Filters(), 9, owner=None) for one in batch] == rollouts


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": ["hello"]}, "messages"),
        ({"response": {"choice": "x"}}, "response"),
        ({"response": {"request": 5}}, "response"),
        ({"guidance": {"a": [[[[]]] * 3] * 2}, "kl": 1e308}, "kl"),
    ],
)
def test_one_row_that_would_break_lists_refuses_the_file(
    http: TestClient, store: RolloutStore, fields: dict[str, Any], param: str
) -> None:
    chat = {"route": "chat", "request_id": "chatcmpl-1"}
    good = [unguided() for _ in range(1100)]  # more than a batch
    answer = http.post(IMPORT, content=file_of(good[:1000], [*good[1000:], made(**chat, **fields)]))
    assert error_of(answer, 400)["param"] == param
    assert store.count(Filters(), owner=None) == 0
    assert http.get("/v1/chat/completions").json()["data"] == []


def test_whatever_is_imported_is_listed(http: TestClient, store: RolloutStore) -> None:
    """Odd, and yet of the right form."""
    odd: list[dict[str, Any]] = [
        {"response": {}},
        {"response": {"choice": {}, "request": {"id": 1, "choices": 5}, "created": 3, "system_fingerprint": [1]}},
        {"response": {"choice": {"index": "x", "message": None}}},
        {"messages": []},
        {"messages": [{}, {"content": 5}, {"content": [{"type": 1}], "id": None}]},
        {"metadata": {str(i): "x" * 1000 for i in range(100)}},
        {"method": "a\0", "critic": "\0", "model": "\0"},
        {"finish_reason": "\0", "prompt_text": None, "prompt_token_ids": [], "completion_token_ids": []},
    ]
    rollouts = [made(route="chat", request_id=f"chatcmpl-{i}", **fields) for i, fields in enumerate(odd)]
    assert http.post(IMPORT, content=file_of(rollouts)).json()["imported"] == len(odd)
    listed = http.get("/v1/chat/completions?limit=100").json()
    assert [entry["id"] for entry in listed["data"]] == [one.request_id for one in rollouts]
    for one in rollouts:
        assert http.get(f"/v1/chat/completions/{one.request_id}").status_code == 200
        assert http.get(f"/v1/chat/completions/{one.request_id}/messages").status_code == 200
        assert http.get(f"/v1/rollouts/{one.id}").json()["request_id"] == one.request_id
    assert pq.read_table(io.BytesIO(http.get("/v1/rollouts/export").content)).num_rows == len(odd)


def test_damaged_files_and_bombs_are_400(http: TestClient, store: RolloutStore) -> None:
    whole = file_of([unguided() for _ in range(20)])
    bomb = file_of([replace(unguided(), completion_text="x" * 400_000) for _ in range(300)])
    assert len(bomb) < 60_000
    for content in (b"", b"PAR1", whole[:-9], whole[: len(whole) // 2], b"PAR1" + b"\xff" * 100 + b"PAR1", bomb):
        error_of(http.post(IMPORT, content=content), 400)
    assert store.count(Filters(), owner=None) == 0
    assert http.post(IMPORT, content=whole).json()["imported"] == 20


def test_a_file_beyond_the_limit_is_refused(store: RolloutStore) -> None:
    content = file_of([unguided() for _ in range(20)])
    with serving(store, max_import_mib=(len(content) - 1) / 2**20) as served:
        http = served.client(ADMIN)
        assert "QSHARP_MAX_IMPORT_MIB" in str(error_of(http.post(IMPORT, content=content), 413)["message"])
        unstated = (content[i : i + 1000] for i in range(0, len(content), 1000))  # in chunks, with no length
        error_of(http.post(IMPORT, content=unstated), 413)
    with serving(store, max_import_mib=len(content) / 2**20) as served:
        assert served.client(ADMIN).post(IMPORT, content=content).json()["imported"] == 20


def test_a_file_that_pauses_is_given_up(store: RolloutStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(uploads, "IDLE_SECONDS", 0.05)

    async def paused() -> Message:
        await asyncio.sleep(5)
        raise AssertionError

    request = Request({"type": "http", "headers": []}, paused)
    with pytest.raises(SlowRequestError):
        asyncio.run(uploads.receive(request, tmp_path / "file", 1))
