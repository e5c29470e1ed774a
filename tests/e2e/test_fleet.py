"""Two servers of one PostgreSQL behind the shipped balancer: what is decided there reaches both, under load no answer
fails or mixes versions, and one that was killed costs its own requests and comes back right.
"""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import ADMIN_KEY, flags
from tests.support import models
from tests.support.balancer import Balancer, balancing, haproxy
from tests.support.postgres import postgres
from tests.support.processes import process_of
from tests.support.waiting import within
from trainer.serving import free_port, serve

ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
HOSTS = ("127.0.0.2", "127.0.0.3")
WITHIN = 5.0  # seconds that a decision may take to reach all servers
CLIENTS = 8
ONE, TWO = "shared@1", "shared@2"
BODY = {
    "model": "tiny", "prompt": [*range(20, 40)], "max_tokens": 12, "n": 2, "ignore_eos": True, "eta": 0.2,
    "store": True, "guidance": {"critic": "shared", "detail": "tokens"},
}  # fmt: skip


@dataclass
class Member:
    """One of the servers; its worker has a core of its own, else one that starts waits minutes for one that is busy."""

    url: str
    log: Path
    arguments: list[str]
    core: int
    process: ExitStack = field(default_factory=ExitStack)

    def start(self) -> None:
        where = httpx.URL(self.url)
        environment = {
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""), "VLLM_CPU_OMP_THREADS_BIND": str(self.core)
        }  # fmt: skip
        self.process.close()
        self.process.enter_context(
            serve(self.arguments, self.log, environment, host=where.host, port=where.port, patience=600)
        )

    def kill(self) -> None:
        os.killpg(process_of(self.url), signal.SIGKILL)

    def get(self, route: str) -> Any:
        return httpx.get(f"{self.url}/v1/critics{route}").json()

    def has(self, version: str) -> bool:
        return bool(self.get("/shared").get("active") == version)

    def trial(self) -> dict[str, Any] | None:
        found = self.get("")["wanted"]["trials"].get("shared")
        return None if found is None else dict(found)

    def problems(self) -> dict[str, str]:
        return dict(self.get("")["wanted"]["problems"])

    def metric(self, name: str) -> float:
        shown = httpx.get(f"{self.url}/metrics", follow_redirects=True).text
        return sum(float(line.split()[-1]) for line in shown.splitlines() if line.startswith((f"{name} ", f"{name}{{")))


@dataclass
class Fleet:
    """Both, what is in front of them, and where critics are.

    Attributes:
        values: what each version expects of the prompt, as a request that names it is told.
    """

    here: Member
    there: Member
    balancer: Balancer
    root: Path
    values: dict[str, float] = field(default_factory=dict)

    @property
    def members(self) -> tuple[Member, Member]:
        return (self.here, self.there)

    def post(self, route: str, **body: Any) -> None:
        """An admin's decision, made wherever the balancer sends it."""
        answer = httpx.post(f"{self.balancer.url}/v1/critics{route}", json=body, headers=ADMIN, timeout=60)
        assert answer.status_code == 200, answer.text

    def reached(self, version: str) -> None:
        within(WITHIN, lambda: all(member.has(version) for member in self.members))

    def check(self, answer: httpx.Response) -> list[dict[str, Any]]:
        """The choices of an answer, all guided by one version, with that version's values."""
        assert answer.status_code == 200, answer.text
        choices: list[dict[str, Any]] = answer.json()["choices"]
        (version,) = {choice["guidance"]["critic"] for choice in choices}
        for choice in choices:
            assert choice["guidance"]["value"] == pytest.approx(self.values[version], abs=1e-3)
        return choices


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    haproxy()
    root, port = tmp_path_factory.mktemp("fleet"), free_port(HOSTS[0])
    reference = models.write_reference(root / "reference")
    own = {"plain": models.write_critic(root / "plain", name="plain", seed=1)}
    with postgres() as store, balancing([*HOSTS], port, root / "haproxy.log") as balancer:
        arguments = [*flags(reference, own, rows=8, blocks=24), "--no-auth", "--rollouts", store]
        cores = sorted(os.sched_getaffinity(0))
        here, there = (
            Member(f"http://{host}:{port}", root / f"log-of-{host}", arguments, core)
            for host, core in zip(HOSTS, (cores[0], cores[-1]), strict=True)
        )
        with here.process, there.process:
            with ThreadPoolExecutor() as pool:
                list(pool.map(Member.start, (here, there)))
            balancer.wait(2)
            made = Fleet(here, there, balancer, root)
            for number in (1, 2):
                folder = models.write_critic(root / f"shared{number}", name="shared", version=str(number), seed=number)
                made.post("", path=str(folder))
                version = f"shared@{number}"  # through the balancer at once, whichever server it is that loaded it
                body = {**BODY, "n": 1, "store": False, "guidance": {"critic": version}}
                answer = httpx.post(f"{balancer.url}/v1/completions", json=body, timeout=60)
                made.values[version] = answer.json()["choices"][0]["guidance"]["value"]
            assert abs(made.values[ONE] - made.values[TWO]) > 0.01
            yield made


async def clients(
    fleet: Fleet, until: asyncio.Event, *, number: int = CLIENTS, pause: float = 0.0, losses: int = 0
) -> list[dict[str, Any]]:
    """The choices that so many clients of the balancer get; each may lose so many requests."""
    found: list[dict[str, Any]] = []

    async def one() -> None:
        lost = 0
        async with httpx.AsyncClient(base_url=fleet.balancer.url, timeout=60) as client:
            while not until.is_set():
                try:
                    answer = await client.post("/v1/completions", json=BODY)
                except httpx.RemoteProtocolError:
                    lost += 1
                else:
                    lost += answer.status_code == 502
                    if answer.status_code != 502:
                        found.extend(fleet.check(answer))
                assert lost <= losses
                await asyncio.sleep(pause)

    await asyncio.gather(*(one() for _ in range(number)))
    return found


async def versions(url: str, users: int) -> dict[str, str]:
    """The version that each of so many users gets."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        gate = asyncio.Semaphore(8)

        async def one(user: str) -> tuple[str, str]:
            async with gate:
                answer = await client.post("/v1/completions", json={**BODY, "n": 1, "max_tokens": 2, "user": user})
            return user, answer.json()["choices"][0]["guidance"]["critic"]

        return dict(await asyncio.gather(*(one(f"user {i}") for i in range(users))))


def test_decisions_reach_both_under_load(fleet: Fleet) -> None:
    fleet.post("/shared/activate", version="2")
    fleet.reached("2")
    before = [member.metric("qsharp_completions_total") for member in fleet.members]

    async def changes() -> list[dict[str, Any]]:
        until = asyncio.Event()
        running = asyncio.create_task(clients(fleet, until))
        for route, wanted in (("/rollback", "1"), ("/activate", "2")) * 3:
            body = {"version": wanted} if route == "/activate" else {}
            await asyncio.to_thread(fleet.post, f"/shared{route}", **body)
            await asyncio.to_thread(fleet.reached, wanted)
        until.set()
        return await running

    choices = asyncio.run(changes())
    assert {choice["guidance"]["critic"] for choice in choices} == {ONE, TWO}
    assert [member.problems() for member in fleet.members] == [{}, {}]
    # Least connections: neither server is idle.
    shares = [member.metric("qsharp_completions_total") - b for member, b in zip(fleet.members, before, strict=True)]
    assert min(shares) > 0.2 * sum(shares)
    for member in fleet.members:
        history = member.get("/shared")["decisions"]
        assert [one["version"] for one in history[-3:]] == ["2", "1", "2"]
        assert [one["rolled_back"] for one in history[-3:]] == [False, True, False]


def test_a_user_has_the_same_version_of_a_trial_everywhere(fleet: Fleet) -> None:
    fleet.post("/shared/activate", version="2")
    fleet.post("/shared/activate", version="1", share=0.3, why="a trial")
    within(WITHIN, lambda: all(m.trial() == {"version": "1", "share": 0.3} for m in fleet.members))
    by_user = [asyncio.run(versions(url, 200)) for url in (fleet.here.url, fleet.there.url, fleet.balancer.url)]
    assert by_user[0] == by_user[1] == by_user[2]
    tried = sum(version == ONE for version in by_user[0].values())
    assert abs(tried - 60) < 4 * (200 * 0.3 * 0.7) ** 0.5
    fleet.post("/shared/activate", version="1", share=0)
    within(WITHIN, lambda: all(member.trial() is None for member in fleet.members))


def test_a_killed_server_costs_its_requests_and_comes_back_right(fleet: Fleet) -> None:
    fleet.post("/shared/activate", version="2")
    fleet.reached("2")

    async def kill() -> list[dict[str, Any]]:
        until = asyncio.Event()
        # What it has on its way, and what the kernel still takes for it until its memory is gone.
        running = asyncio.create_task(clients(fleet, until, losses=2))
        await asyncio.sleep(2)
        fleet.there.kill()
        await asyncio.sleep(4)
        until.set()
        return await running

    choices = asyncio.run(kill())
    with httpx.Client(base_url=fleet.balancer.url, headers=ADMIN) as client:
        stored = Counter(client.get(f"/v1/rollouts/{one['rollout_id']}").status_code for one in choices)
    assert stored == {200: len(choices)}

    # While it is away, another version is activated, and files are changed after they were published.
    fleet.balancer.wait(1)
    fleet.post("/shared/activate", version="1")
    card = models.write_critic(fleet.root / "spoilt", name="spoilt", seed=70) / "critic.json"
    fleet.post("", path=str(card.parent))
    card.write_text(card.read_text() + "\n")

    async def start() -> list[dict[str, Any]]:
        """Clients notice nothing, but that both serve again."""
        until = asyncio.Event()
        running = asyncio.create_task(clients(fleet, until, number=2, pause=0.5))  # more would slow the start down
        await asyncio.to_thread(fleet.there.start)
        await asyncio.to_thread(fleet.balancer.wait, 2)
        await asyncio.to_thread(within, 60, lambda: fleet.there.metric("qsharp_completions_total") > 0)
        until.set()
        return await running

    assert {choice["guidance"]["critic"] for choice in asyncio.run(start())} == {ONE}
    assert "not those that were published" in fleet.there.problems()["spoilt@1"]
    assert fleet.there.metric("qsharp_critic_problems") == 1
    assert fleet.here.metric("qsharp_critic_problems") == 0
    for key in ("spoilt/1", "shared/2", "shared/1"):  # the active one goes last
        httpx.delete(f"{fleet.balancer.url}/v1/critics/{key}", headers=ADMIN, timeout=60).raise_for_status()
    for member in fleet.members:
        within(WITHIN, lambda one=member: "error" in one.get("/shared"))  # type: ignore[misc]
        within(WITHIN, lambda one=member: one.problems() == {})  # type: ignore[misc]
