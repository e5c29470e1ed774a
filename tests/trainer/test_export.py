"""`qsharp export`: what a server answers with, and when it is given up."""

import asyncio
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from qsharp_core import cli
from tests.support import fake_server
from tests.support.fake_server import FakeServer
from trainer.rollouts import retrying
from trainer.rollouts.client import ServerClient
from trainer.rollouts.errors import RefusedError, TransientError
from trainer.rollouts.export import export


class Failing(ThreadingHTTPServer):
    """A server that answers every request with the next of its statuses, and in the end with the last one."""

    def __init__(self, statuses: list[int]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.statuses = statuses
        self.asked = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    """An answer of `Failing`."""

    server: Failing

    def do_GET(self) -> None:
        status = self.server.statuses[min(self.server.asked, len(self.server.statuses) - 1)]
        self.server.asked += 1
        body = b'{"error": {"message": "out of order"}}'
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def failing(request: pytest.FixtureRequest) -> Iterator[Failing]:
    with Failing(request.param) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "_backoff", lambda state: 0.01)


@pytest.mark.parametrize(
    ("failing", "attempts"), [([500], 4), ([503, 429, 503, 500], 7)], indirect=["failing"], ids=["always", "later"]
)
def test_a_500_that_comes_every_time_is_given_up(failing: Failing, attempts: int, tmp_path: Path) -> None:
    """After four of them: it would come for all of the ten minutes that other errors are tried for."""
    began = time.monotonic()
    with pytest.raises(TransientError, match="500: out of order"):
        export(failing.url, tmp_path / "out.parquet", {}, patience=600.0)
    assert failing.asked == attempts
    assert time.monotonic() - began < 30
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", [[503] * 5 + [400]], indirect=True)
def test_what_passes_by_itself_is_tried_again_and_what_is_refused_is_not(failing: Failing, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="400: out of order"):
        export(failing.url, tmp_path / "out.parquet", {})
    assert failing.asked == 6


@pytest.mark.parametrize("failing", [[503]], indirect=True)
def test_patience_ends(failing: Failing, tmp_path: Path) -> None:
    with pytest.raises(TransientError, match="503"):
        export(failing.url, tmp_path / "out.parquet", {}, patience=0.0)
    assert failing.asked == 1


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeServer]:
    with fake_server.running(f"sqlite:///{tmp_path / 'rollouts.db'}") as server:
        yield server


async def count(fake: FakeServer, **filters: str) -> int:
    async with ServerClient(fake.url) as server:
        return await server.count(filters)


def test_rollouts_are_counted_by_the_store(fake: FakeServer, tmp_path: Path) -> None:
    """As many as an export would write, and with the same filters."""
    collect = ["collect", "--task", "sums", "--limit", "5", "--url", fake.url, "--state"]
    assert cli.main([*collect, str(tmp_path / "unguided.jsonl"), "--n", "2"]) == 0
    assert cli.main([*collect, str(tmp_path / "guided.jsonl"), "--n", "1", "--eta", "0.1"]) == 0
    assert asyncio.run(count(fake)) == 15
    assert asyncio.run(count(fake, guided="true")) == 5
    assert asyncio.run(count(fake, has_valid_position="true")) == 10
    assert asyncio.run(count(fake, has_valid_position="false")) == 5
    assert asyncio.run(count(fake, has_reward="true")) == 0
    assert export(fake.url, tmp_path / "out.parquet", {"has_valid_position": "true"}) == 10
    with pytest.raises(RefusedError, match="limit is not known"):
        asyncio.run(count(fake, limit="3"))
