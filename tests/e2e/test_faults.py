"""Too many requests, SIGTERM, and SIGKILL of each process: what clients see, and what is left."""

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.conftest import Server, flags
from tests.support.processes import process_of
from trainer.serving import serve

LIMIT = 12
BODY = {"model": "tiny", "prompt": "abc", "ignore_eos": True, "temperature": 1.0}


@contextmanager
def started(server: Server, folder: Path, *more: str) -> Iterator[str]:
    """A server of its own, on the session's model."""
    critics = {"fast": server.critics["fast"]}
    with serve([*flags(server.reference, critics, rows=4, blocks=40), *more], folder / "log") as url:
        yield url


@dataclass
class Tree:
    """A server's processes."""

    api: psutil.Process
    engine: list[psutil.Process]

    @classmethod
    def of(cls, url: str) -> "Tree":
        api = psutil.Process(process_of(url))
        below = [p for p in api.children(recursive=True) if "resource_tracker" not in " ".join(p.cmdline())]
        assert below
        return cls(api, below)


async def burst(url: str, count: int, n: int, stream: bool, tokens: int = 24) -> list[httpx.Response]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
        body = {**BODY, "n": n, "stream": stream, "max_tokens": tokens, "eta": 0.1}
        return list(await asyncio.gather(*(http.post("/v1/completions", json=body) for _ in range(count))))


@pytest.fixture(scope="module")
def limited(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that takes few samples at once. The last test that has it ends it."""
    more = ["--max-queued", str(LIMIT), "--shutdown-timeout", "60"]
    with started(server, tmp_path_factory.mktemp("limited"), *more) as url:
        yield url


def test_overload_refuses_whole_requests_at_once_and_says_when_to_come_again(limited: str) -> None:
    for n, stream in ((1, False), (4, True), (5, True)):
        answers = asyncio.run(burst(limited, 60, n, stream))
        kinds = {answer.status_code for answer in answers}
        assert kinds == {200, 503}, kinds
        for answer in answers:
            if answer.status_code == 503:
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.json()["error"]["code"] == 503
            elif stream:  # a stream that has begun is never cut short
                assert answer.text.count('"finish_reason":"length"') == n
                assert '"error"' not in answer.text
            else:
                assert len(answer.json()["choices"]) == n
    whole = httpx.post(f"{limited}/v1/completions", json={**BODY, "n": 2 * LIMIT, "max_tokens": 2}, timeout=120)
    assert len(whole.json()["choices"]) == 2 * LIMIT  # alone it may run
    assert asyncio.run(burst(limited, 1, 1, False))[0].status_code == 200  # everything was given back


@pytest.mark.parametrize("search", [{"kind": "best_of", "n": 8}, {"kind": "particles", "n": 8, "every": 4}])
def test_a_search_counts_with_all_that_it_samples(limited: str, search: dict[str, Any]) -> None:
    """Two of eight samples each are more than the twelve that there are, although each returns one choice."""

    async def main() -> list[httpx.Response]:
        body = {**BODY, "max_tokens": 60, "eta": 0.1, "guidance": {"search": search}}
        async with httpx.AsyncClient(base_url=limited, timeout=120) as http:
            return list(await asyncio.gather(*(http.post("/v1/completions", json=body) for _ in range(2))))

    answers = asyncio.run(main())
    assert sorted(answer.status_code for answer in answers) == [200, 503]
    assert [len(answer.json()["choices"]) for answer in answers if answer.status_code == 200] == [1]
    assert asyncio.run(burst(limited, 1, LIMIT, False))[0].status_code == 200  # everything was given back


def test_told_to_end_it_takes_nothing_more_and_ends_what_it_has(limited: str) -> None:
    process = psutil.Process(process_of(limited))

    async def main() -> tuple[httpx.Response, list[int]]:
        async with httpx.AsyncClient(base_url=limited, timeout=120) as http:
            long = asyncio.create_task(
                http.post("/v1/completions", json={**BODY, "n": LIMIT, "max_tokens": 120, "eta": 0.1}, timeout=120)
            )
            await asyncio.sleep(0.5)
            assert not long.done()
            process.send_signal(signal.SIGTERM)
            while (health := (await http.get("/health")).status_code) == 200 and not long.done():
                await asyncio.sleep(0.02)
            late = [
                (await http.post("/v1/completions", json={**BODY, "max_tokens": 1})).status_code,
                health,
                (await http.get("/version")).status_code,
            ]
            assert not long.done()
            return await long, late

    answer, late = asyncio.run(main())
    assert late == [503, 503, 200]
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 120 * LIMIT
    assert process.wait(60) in (0, None)


def gone(processes: list[psutil.Process], seconds: float) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def test_a_killed_api_process_leaves_nothing_behind(server: Server, tmp_path: Path) -> None:
    with started(server, tmp_path) as url:
        tree = Tree.of(url)
        tree.api.kill()
        assert gone(tree.engine, 5.0)


@pytest.mark.parametrize("which", [0, -1], ids=["engine", "worker"])
def test_a_killed_engine_is_told_to_clients_and_ends_the_server(server: Server, tmp_path: Path, which: int) -> None:
    with started(server, tmp_path) as url:
        tree = Tree.of(url)

        async def main() -> list[Any]:
            async with httpx.AsyncClient(base_url=url, timeout=60) as http:
                body = {**BODY, "n": 8, "max_tokens": 400, "eta": 0.1}  # takes seconds
                clients = [asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(3)]
                await asyncio.sleep(0.5)
                tree.engine[which].kill()
                answers = await asyncio.gather(*clients, return_exceptions=True)
                with pytest.raises((AssertionError, httpx.TransportError)):
                    assert (await http.get("/liveness")).status_code == 200
                return list(answers)

        answers = asyncio.run(main())
        for answer in answers:
            assert isinstance(answer, httpx.TransportError) or answer.status_code >= 500
        assert tree.api.wait(30) not in (0, None)
        assert gone(tree.engine, 5.0)
