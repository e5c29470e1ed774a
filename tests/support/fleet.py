"""Two servers of one PostgreSQL behind the shipped balancer, and critics that they share."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
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

ONE, TWO = "shared@1", "shared@2"
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
PATIENCE = 300  # seconds for one answer, on a machine that has much else to do
HOSTS = ("127.0.0.2", "127.0.0.3")
WITHIN = 5.0  # seconds that a decision may take to reach all servers
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
        return httpx.get(f"{self.url}/v1/critics{route}", timeout=PATIENCE).json()

    def has(self, version: str) -> bool:
        return bool(self.get("/shared").get("active") == version)

    def trial(self) -> dict[str, Any] | None:
        found = self.get("")["wanted"]["trials"].get("shared")
        return None if found is None else dict(found)

    def problems(self) -> dict[str, str]:
        return dict(self.get("")["wanted"]["problems"])

    def metric(self, name: str) -> float:
        shown = httpx.get(f"{self.url}/metrics", follow_redirects=True, timeout=PATIENCE).text
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
        answer = httpx.post(f"{self.balancer.url}/v1/critics{route}", json=body, headers=ADMIN, timeout=PATIENCE)
        assert answer.status_code == 200, answer.text

    def reached(self, version: str) -> None:
        within(WITHIN, lambda: all(member.has(version) for member in self.members))

    def forget(self, name: str) -> None:
        """Unloads all versions of a critic everywhere, the active one last."""
        wanted = self.here.get("")["wanted"]  # a server need not have all that is wanted
        keys = [key for key in wanted["versions"] if key.partition("@")[0] == name]
        for key in sorted(keys, key=lambda key: key == f"{name}@{wanted['active'].get(name)}"):
            url = f"{self.balancer.url}/v1/critics/{key.replace('@', '/')}"
            httpx.delete(url, headers=ADMIN, timeout=PATIENCE).raise_for_status()
        for member in self.members:
            within(WITHIN, lambda one=member: "error" in one.get(f"/{name}"))  # type: ignore[misc]

    def check(self, answer: httpx.Response) -> list[dict[str, Any]]:
        """The choices of an answer, all guided by one version, with that version's values."""
        assert answer.status_code == 200, answer.text
        choices: list[dict[str, Any]] = answer.json()["choices"]
        (version,) = {choice["guidance"]["critic"] for choice in choices}
        for choice in choices:
            assert choice["guidance"]["value"] == pytest.approx(self.values[version], abs=1e-3)
        return choices


@contextmanager
def running_fleet(root: Path) -> Iterator[Fleet]:
    """Both serve; `shared@1` and `shared@2` were loaded, of which the first is active."""
    haproxy()
    port = free_port(HOSTS[0])
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
                answer = httpx.post(f"{balancer.url}/v1/completions", json=body, timeout=PATIENCE)
                made.values[version] = answer.json()["choices"][0]["guidance"]["value"]
            assert abs(made.values[ONE] - made.values[TWO]) > 0.01
            yield made
