"""Two servers of one store: what is decided at one reaches the other, and one that was killed comes back right.

One is the session's, the other is started for this.
"""

import asyncio
import os
import signal
from collections import Counter
from typing import Any

import httpx

from tests.conftest import ADMIN_KEY, Server, flags
from tests.support import models
from tests.support.processes import process_of
from tests.support.waiting import within
from trainer.serving import serve

ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
WITHIN = 5.0  # seconds that a decision may take to reach all servers
BODY = {
    "model": "tiny", "prompt": [*range(20, 40)], "max_tokens": 12, "ignore_eos": True, "eta": 0.2, "store": True,
    "guidance": {"critic": "shared", "detail": "tokens"},
}  # fmt: skip


def active(url: str) -> str | None:
    answer = httpx.get(f"{url}/v1/critics/shared")
    return answer.json()["active"] if answer.status_code == 200 else None


def problems(url: str) -> dict[str, str]:
    return dict(httpx.get(f"{url}/v1/critics").json()["wanted"]["problems"])


def reached(url: str, version: str) -> None:
    within(WITHIN, lambda: active(url) == version)


def post(url: str, route: str, **body: Any) -> httpx.Response:
    answer = httpx.post(f"{url}/v1/critics{route}", json=body, headers=ADMIN, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer


def trial(url: str) -> dict[str, Any] | None:
    found = httpx.get(f"{url}/v1/critics").json()["wanted"]["trials"].get("shared")
    return None if found is None else dict(found)


async def versions(url: str, users: int) -> dict[str, str]:
    """The version that each of so many users gets."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        gate = asyncio.Semaphore(8)

        async def one(user: str) -> tuple[str, str]:
            async with gate:
                answer = await client.post("/v1/completions", json={**BODY, "max_tokens": 2, "user": user})
            return user, answer.json()["choices"][0]["guidance"]["critic"]

        return dict(await asyncio.gather(*(one(f"user {i}") for i in range(users))))


async def clients(urls: list[str], until: asyncio.Event, killed: str | None = None) -> list[dict[str, Any]]:
    """Four clients of each server; whoever asks the one that is killed ends there. Returns the choices."""
    found: list[dict[str, Any]] = []

    async def one(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            while not until.is_set():
                try:
                    answer = await client.post("/v1/completions", json=BODY)
                except httpx.TransportError:
                    assert url == killed
                    return
                assert answer.status_code == 200, answer.text
                found.extend(answer.json()["choices"])

    await asyncio.gather(*(one(url) for url in urls for _ in range(4)))
    return found


def test_two_servers_and_one_truth(http: httpx.Client, server: Server) -> None:
    folders = [models.write_critic(server.root / f"shared{v}", name="shared", version=str(v), seed=v) for v in (1, 2)]
    own = {"plain": server.critics["plain"]}
    store = ["--rollouts", f"sqlite:///{server.root / 'rollouts.db'}"]
    arguments = [*flags(server.reference, own, rows=8, blocks=24), *store]
    environment = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    here = server.url
    post(here, "", path=str(folders[0]))

    with serve(arguments, server.root / "beside-log", environment) as there:
        assert active(there) == "1"  # it is ready only when it has what the other was told
        post(there, "", path=str(folders[1]), activate=True)
        reached(here, "2")

        async def changes() -> Counter[str]:
            until = asyncio.Event()
            running = asyncio.create_task(clients([here, there], until))
            for url, route, wanted in ((here, "/rollback", "1"), (there, "/activate", "2")) * 3:
                body = {"version": wanted} if route == "/activate" else {}
                await asyncio.to_thread(post, url, f"/shared{route}", **body)
                for one in (here, there):
                    await asyncio.to_thread(reached, one, wanted)
            until.set()
            return Counter(choice["guidance"]["critic"] for choice in await running)

        assert asyncio.run(changes()).keys() == {"shared@1", "shared@2"}
        assert problems(here) == problems(there) == {}
        history = httpx.get(f"{here}/v1/critics/shared").json()["decisions"]
        assert [one["version"] for one in history[-3:]] == ["2", "1", "2"]
        assert [one["rolled_back"] for one in history[-3:]] == [False, True, False]

        post(here, "/shared/activate", version="1", share=0.3, why="a trial")
        within(WITHIN, lambda: trial(there) == {"version": "1", "share": 0.3})
        by_user = {url: asyncio.run(versions(url, 200)) for url in (here, there)}
        assert by_user[here] == by_user[there]
        tried = sum(version == "shared@1" for version in by_user[here].values())
        assert abs(tried - 60) < 4 * (200 * 0.3 * 0.7) ** 0.5
        post(there, "/shared/activate", version="1", share=0)
        within(WITHIN, lambda: trial(here) is None)

        async def kill() -> list[dict[str, Any]]:
            until = asyncio.Event()
            running = asyncio.create_task(clients([here, there], until, killed=there))
            await asyncio.sleep(2)
            os.killpg(process_of(there), signal.SIGKILL)
            await asyncio.sleep(2)
            until.set()
            return await running

        choices = asyncio.run(kill())
    # While it is away, another version is activated, and files are changed after they were published.
    post(here, "/shared/activate", version="1")
    card = models.write_critic(server.root / "spoilt", name="spoilt", seed=70) / "critic.json"
    post(here, "", path=str(card.parent))
    card.write_text(card.read_text() + "\n")
    stored = Counter(http.get(f"/v1/rollouts/{one['rollout_id']}", headers=ADMIN).status_code for one in choices)
    assert stored == {200: len(choices)}
    with serve(arguments, server.root / "beside-log", environment) as there:
        answer = httpx.post(f"{there}/v1/completions", json=BODY, timeout=60).json()
        assert answer["choices"][0]["guidance"]["critic"] == "shared@1"
        assert "not those that were published" in problems(there)["spoilt@1"]
        assert "qsharp_critic_problems 1.0" in httpx.get(f"{there}/metrics", follow_redirects=True).text
        assert "qsharp_critic_problems 0.0" in http.get("/metrics", follow_redirects=True).text
        for key in ("spoilt/1", "shared/2", "shared/1"):  # the active one goes last
            http.delete(f"/v1/critics/{key}", headers=ADMIN).raise_for_status()
        within(WITHIN, lambda: httpx.get(f"{there}/v1/critics/shared").status_code == 404)
        within(WITHIN, lambda: problems(there) == {})
