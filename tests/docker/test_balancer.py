"""The shipped configuration of HAProxy, in front of two processes that answer HTTP."""

import os
import random
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.balancer import NOTICED, Balancer, balancing
from tests.support.processes import process_of
from tests.support.waiting import within
from trainer.serving import free_port, serve

HOSTS = ("127.0.0.2", "127.0.0.3")
SMALL = ("uvicorn", "tests.support.small_server:app")
PATH = "/v1/completions"


@dataclass
class Small:
    """One of the two servers."""

    url: str
    log: Path
    process: ExitStack = field(default_factory=ExitStack)

    def start(self) -> None:
        where = httpx.URL(self.url)
        self.process.close()
        self.process.enter_context(serve([], self.log, command=SMALL, patience=30, host=where.host, port=where.port))

    def kill(self) -> None:
        os.kill(process_of(self.url), signal.SIGKILL)
        within(NOTICED, self.is_gone)

    def is_gone(self) -> bool:
        """Whether its port refuses connections: a process that was killed may take some while it ends."""
        where = httpx.URL(self.url)
        try:
            socket.create_connection((where.host, where.port)).close()
        except ConnectionRefusedError:
            return True
        return False

    def count(self, what: str) -> int:
        return int(httpx.get(f"{self.url}/control/counts").json().get(what, 0))

    def runs(self, number: int) -> None:
        """Waits until so many requests run on it."""
        within(NOTICED, lambda: self.count("running") == number)

    def says(self, path: str, status: int) -> None:
        httpx.put(f"{self.url}/control/statuses", json={path: status}).raise_for_status()

    def sample(self, tokens: int) -> None:
        httpx.post(f"{self.url}/control/tokens", params={"number": tokens}).raise_for_status()


@dataclass
class Fleet:
    """Two servers, what is in front of them, and clients."""

    one: Small
    two: Small
    balancer: Balancer
    pool: ThreadPoolExecutor
    client: httpx.Client

    def ask(self, number: int, session: str | None = None, **body: Any) -> list["Future[httpx.Response]"]:
        """Sends so many requests, which run until their server is told to sample a token for each."""
        headers = {} if session is None else {"X-Session-ID": session}

        def post() -> httpx.Response:
            return self.client.post(PATH, json={"max_tokens": 1, **body}, headers=headers)

        return [self.pool.submit(post) for _ in range(number)]

    def begin(self, session: str) -> tuple[Small, Small]:
        """The server that a session has from now on, and the other one."""
        first = self.ask(1, session=session)
        server, other = self.ordered()
        server.sample(1)
        assert statuses(first) == [200]
        server.runs(0)
        return server, other

    def ordered(self) -> tuple[Small, Small]:
        """The server that has requests, and the other one."""
        within(NOTICED, lambda: self.one.count("running") + self.two.count("running") > 0)
        return (self.one, self.two) if self.one.count("running") else (self.two, self.one)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    port, folder = free_port(HOSTS[0]), tmp_path_factory.mktemp("fleet")
    one, two = (Small(f"http://{host}:{port}", folder / host) for host in HOSTS)
    with (
        balancing([*HOSTS], port, folder / "haproxy.log") as balancer,
        one.process,
        two.process,
        ThreadPoolExecutor(64) as pool,
        httpx.Client(base_url=balancer.url, timeout=30) as client,
    ):
        one.start()
        two.start()
        yield Fleet(one, two, balancer, pool, client)


@pytest.fixture
def fleet(started: Fleet) -> Fleet:
    """Both are ready, and nothing runs."""
    started.balancer.wait(2)
    assert [server.count("running") for server in (started.one, started.two)] == [0, 0]
    return started


def statuses(answers: list["Future[httpx.Response]"]) -> list[int]:
    return [answer.result().status_code for answer in answers]


def lost_answer(request: "Future[httpx.Response]") -> bool:
    """Whether its client was told that the server went away: by a 502, or, over a connection that had served other
    requests, by its end."""
    try:
        answer = request.result()
    except httpx.RemoteProtocolError:
        return True
    return answer.status_code == 502 and answer.json()["error"]["code"] == 502


def test_a_stream_arrives_token_by_token(fleet: Fleet) -> None:
    """The server samples a token when the client has the one before."""
    number, found = random.randint(5, 20), []
    body = {"max_tokens": number, "stream": True}
    with httpx.stream("POST", f"{fleet.balancer.url}{PATH}", json=body, timeout=10) as answer:
        server, _ = fleet.ordered()
        server.sample(1)
        for line in filter(None, answer.iter_lines()):
            found.append(int(line.removeprefix("data: ")))
            if len(found) < number:
                server.sample(1)
    assert found == [*range(number)]


def test_a_session_stays_and_others_go_where_there_is_least(fleet: Fleet) -> None:
    here, there = random.randint(3, 8), random.randint(1, 3)
    server, other = fleet.begin("mine")
    staying = fleet.ask(here, session="mine")
    server.runs(here)
    others = fleet.ask(there)
    other.runs(there)
    even = fleet.ask(here - there) if here > there else []  # until both have as much
    other.runs(max(here, there))
    server.sample(here)
    other.sample(len(others + even))
    assert set(statuses(staying + others + even)) == {200}


@pytest.mark.parametrize("path", ["/health", "/liveness"])
def test_a_server_that_ends_or_hangs_gets_no_new_request(fleet: Fleet, path: str) -> None:
    server, other = fleet.begin(path)
    running = fleet.ask(3, session=path)
    server.runs(3)
    server.says(path, 503)
    fleet.balancer.wait(1)
    taken, number = server.count("taken"), random.randint(4, 12)
    later = fleet.ask(number - 1) + fleet.ask(1, session=path)
    other.runs(number)
    assert server.count("taken") == taken
    other.sample(number)
    server.sample(3)  # what it had ends as ever
    assert set(statuses(running + later)) == {200}

    server.says(path, 200)
    fleet.balancer.wait(2)
    again = fleet.ask(2)
    for one in (server, other):
        one.runs(1)
        one.sample(1)
    assert set(statuses(again)) == {200}


def test_the_death_of_a_server_costs_the_requests_that_it_has(fleet: Fleet) -> None:
    lost, number = random.randint(1, 5), random.randint(5, 20)
    server, other = fleet.begin("dies")
    dying = fleet.ask(lost, session="dies")
    server.runs(lost)
    taken = other.count("taken")
    server.kill()
    next_ones = fleet.ask(number)  # at once: the balancer knows nothing yet
    other.runs(number)
    for answer in dying:
        assert lost_answer(answer)
    assert other.count("taken") == taken + number  # what was sent once was not sent again
    other.sample(number)
    assert set(statuses(next_ones)) == {200}

    fleet.balancer.wait(1)
    other.kill()
    (nobody,) = fleet.ask(1)
    assert (nobody.result().status_code, nobody.result().headers["Retry-After"]) == (503, "1")
    assert nobody.result().json()["error"]["message"] == "no server is ready to take this request"
    fleet.balancer.wait(0)
    assert httpx.get(f"{fleet.balancer.watch}/ready").status_code == 503
    for one in (server, other):
        one.start()
    fleet.balancer.wait(2)
    assert httpx.get(f"{fleet.balancer.watch}/ready").status_code == 200


def test_a_request_that_kills_its_server_is_sent_once(fleet: Fleet) -> None:
    taken = {server.url: server.count("taken") for server in (fleet.one, fleet.two)}
    (answer,) = fleet.ask(1, die=True)
    assert lost_answer(answer)
    fleet.balancer.wait(1)
    gone, alive = sorted((fleet.one, fleet.two), key=Small.is_gone, reverse=True)
    assert alive.count("taken") == taken[alive.url]
    gone.start()


@pytest.mark.parametrize("stored", [False, True])
def test_what_a_server_refuses_another_takes(fleet: Fleet, stored: bool) -> None:
    """Not if it is to be stored: a server whose store fails says 503, too."""
    session = f"full {stored}"
    server, other = fleet.begin(session)
    server.says(PATH, 503)
    refused, number = server.count("refused"), random.randint(2, 6)
    answers = fleet.ask(number, session=session, **({"store": True} if stored else {}))
    if not stored:
        other.runs(number)
        other.sample(number)
    assert set(statuses(answers)) == {503 if stored else 200}
    assert server.count("refused") == refused + number
    other.says(PATH, 503)
    (nobody,) = fleet.ask(1)
    assert (nobody.result().status_code, nobody.result().json()["error"]["message"]) == (503, "full")
    for one in (server, other):
        one.says(PATH, 200)


def test_whoever_goes_away_ends_the_request(fleet: Fleet) -> None:
    left = {server.url: server.count("left") for server in (fleet.one, fleet.two)}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{fleet.balancer.url}{PATH}", json={"max_tokens": 1}, timeout=0.5)
    within(NOTICED, lambda: sum(s.count("left") - left[s.url] for s in (fleet.one, fleet.two)) == 1)
    for server in (fleet.one, fleet.two):
        server.runs(0)


def test_servers_come_and_go_with_the_addresses_of_their_name(fleet: Fleet) -> None:
    gone = random.choice(HOSTS)
    fleet.balancer.names.addresses = [host for host in HOSTS if host != gone]
    fleet.balancer.wait(1)
    running = fleet.ask(4)
    server, other = fleet.ordered()
    server.runs(4)
    assert other.count("running") == 0
    assert httpx.URL(server.url).host != gone
    fleet.balancer.names.addresses = [*HOSTS]
    fleet.balancer.wait(2)
    more = fleet.ask(3)  # the one that came has the least
    other.runs(3)
    server.sample(4)
    other.sample(3)
    assert set(statuses(running + more)) == {200}


def test_metrics_are_of_each_server(fleet: Fleet) -> None:
    answer = httpx.get(f"{fleet.balancer.url}/metrics")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, 404)
