"""Two servers of one PostgreSQL behind the shipped balancer: what is decided there reaches both, under load no answer
fails or mixes versions, live trials tell better critics from worse ones, and a server that was killed costs its own
requests and comes back right.
"""

import asyncio
import os
from collections import Counter
from collections.abc import Iterator
from statistics import fmean
from typing import Any

import httpx
import pytest
from rich.console import Console

import qsharp
from tests.conftest import ADMIN_KEY
from tests.support import models
from tests.support.fleet import ADMIN, BODY, ONE, TWO, WITHIN, Fleet, running_fleet
from tests.support.live_traffic import traffic
from tests.support.waiting import within
from trainer.loop.activation import ServedCritic
from trainer.loop.report import TrialResult
from trainer.loop.trial import Trial, TrialSettings
from trainer.loop.versions import Version
from trainer.rollouts.client import ServerClient

CLIENTS = 8
RESPONSES = int(os.environ.get("QSHARP_FLEET_RESPONSES", "100"))  # under load, while decisions change


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running_fleet(tmp_path_factory.mktemp("fleet")) as running:
        yield running


Answers = list[list[dict[str, Any]]]  # the choices of each


async def clients(
    fleet: Fleet, answers: Answers, until: asyncio.Event, *, number: int = CLIENTS, pause: float = 0.0, losses: int = 0
) -> None:
    """So many clients of the balancer ask, and add what they get; each may lose so many requests."""

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
                        answers.append(fleet.check(answer))
                assert lost <= losses
                await asyncio.sleep(pause)

    await asyncio.gather(*(one() for _ in range(number)))


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

    async def changes() -> Answers:
        answers: Answers = []
        until = asyncio.Event()
        running = asyncio.create_task(clients(fleet, answers, until))
        rounds = 0
        while rounds < 3 or (len(answers) < RESPONSES and not running.done()):
            rounds += 1
            for route, wanted in (("/rollback", "1"), ("/activate", "2")):
                body = {"version": wanted} if route == "/activate" else {}
                await asyncio.to_thread(fleet.post, f"/shared{route}", **body)
                await asyncio.to_thread(fleet.reached, wanted)
        until.set()
        await running
        return answers

    answers = asyncio.run(changes())
    assert len(answers) >= RESPONSES
    by_version = Counter(choices[0]["guidance"]["critic"] for choices in answers)
    print(f"{len(answers)} answers, none failed, none mixed versions: {dict(by_version)}")
    assert by_version.keys() == {ONE, TWO}
    assert [member.problems() for member in fleet.members] == [{}, {}]
    # Least connections: neither server is idle.
    shares = [member.metric("qsharp_completions_total") - b for member, b in zip(fleet.members, before, strict=True)]
    assert min(shares) > 0.2 * sum(shares)
    for member in fleet.members:
        history = member.get("/shared")["decisions"]
        assert [one["version"] for one in history[-3:]] == ["2", "1", "2"]
        assert [one["rolled_back"] for one in history[-3:]] == [False, True, False]


def test_every_route_finds_what_was_just_loaded_elsewhere(fleet: Fleet) -> None:
    guided = {"eta": 0.2, "max_tokens": 3, "model": "tiny"}
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {**guided, "prompt": "Hello"},
        "/v1/chat/completions": {**guided, "messages": [{"role": "user", "content": "Hello"}]},
        "/v1/messages": {**guided, "messages": [{"role": "user", "content": "Hello"}]},
        "/v1/responses": {"eta": 0.2, "max_output_tokens": 3, "model": "tiny", "input": "Hello"},
        "/v1/critics/NAME/score": {"prompt": "Hello", "completion": " you"},
    }
    for number, (route, body) in enumerate(bodies.items()):
        name = f"fresh{number}"
        folder = models.write_critic(fleet.root / name, name=name, seed=number)
        loaded = httpx.post(f"{fleet.here.url}/v1/critics", json={"path": str(folder)}, headers=ADMIN, timeout=60)
        assert loaded.status_code == 200, loaded.text
        if "eta" in body:
            body["guidance"] = {"critic": name}
        answer = httpx.post(f"{fleet.there.url}{route.replace('NAME', name)}", json=body, headers=ADMIN, timeout=60)
        assert answer.status_code == 200, (route, answer.text)
        fleet.forget(name)


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


def test_a_live_trial_promotes_what_is_better_and_rolls_back_what_is_worse(fleet: Fleet) -> None:
    """A critic that learned from what the reference's users said, against random ones, on what users say next."""
    url, folder, eta = fleet.balancer.url, fleet.root / "critics", 0.1
    alone = asyncio.run(traffic(url, 400, seed=1, eta=None))
    models.write_critic(folder / "live" / "1", name="live", version="1", seed=5)
    data = folder / "rollouts.parquet"
    qsharp.export(data, guided=False, has_reward=True, url=url, api_key=ADMIN_KEY, tell=pytest.fail)
    base = fleet.root / "reference"
    trained = qsharp.train(data, out=folder, name="live", base=str(base), steps=400, learning_rate=3e-3, held_out=0.2)
    assert trained.folder == folder / "live" / "2"
    models.write_critic(folder / "live" / "3", name="live", version="3", seed=6)
    one, two, three = (Version.at(folder / "live" / number) for number in "123")

    async def main() -> list[TrialResult]:
        async with ServerClient(url, key=ADMIN_KEY) as client:
            served = ServedCritic(client, "live", folder)
            await served.activate(one)
            settings = TrialSettings(share=0.3, interval=1.0, most=4000)
            trial = Trial(client, served, settings, Console(quiet=True))
            users = asyncio.create_task(traffic(url, None, seed=2, eta=eta, guidance={"critic": "live"}))
            trials = asyncio.create_task(both(trial, served))
            await asyncio.wait([users, trials], return_when=asyncio.FIRST_COMPLETED)
            if users.done():
                trials.cancel()
                await users  # a request has failed
            users.cancel()
            await asyncio.gather(users, return_exceptions=True)
            return await trials

    async def both(trial: Trial, served: ServedCritic) -> list[TrialResult]:
        better = await trial.run(two, one, "it has learned")
        await served.activate(two)
        return [better, await trial.run(three, two, "it has not")]

    better, worse = asyncio.run(main())
    print(f"the reference alone: {fmean(alone):.3f}", better.why, worse.why, sep="\n")
    assert [better.outcome, worse.outcome] == ["better", "worse"]
    # A server that still loads the new version gives all to the active one.
    for result in (better, worse):
        assert 0.1 < result.n[0] / sum(result.n) < 0.3 + 4 * (0.3 * 0.7 / sum(result.n)) ** 0.5
    for member in fleet.members:
        within(WITHIN, lambda one=member: one.get("/live")["active"] == "2")  # type: ignore[misc]
        within(WITHIN, lambda one=member: "live@3" not in one.get("")["wanted"]["versions"])  # type: ignore[misc]
    fleet.forget("live")


def test_a_killed_server_costs_its_requests_and_comes_back_right(fleet: Fleet) -> None:
    fleet.post("/shared/activate", version="2")
    fleet.reached("2")

    async def kill() -> Answers:
        answers: Answers = []
        until = asyncio.Event()
        # What it has on its way, and what the kernel still takes for it until its memory is gone.
        running = asyncio.create_task(clients(fleet, answers, until, losses=2))
        await asyncio.sleep(2)
        fleet.there.kill()
        await asyncio.sleep(4)
        until.set()
        await running
        return answers

    choices = [choice for answer in asyncio.run(kill()) for choice in answer]
    with httpx.Client(base_url=fleet.balancer.url, headers=ADMIN) as client:
        stored = Counter(client.get(f"/v1/rollouts/{one['rollout_id']}").status_code for one in choices)
    assert stored == {200: len(choices)}

    # While it is away, another version is activated, and files are changed after they were published.
    fleet.balancer.wait(1)
    fleet.post("/shared/activate", version="1")
    card = models.write_critic(fleet.root / "spoilt", name="spoilt", seed=70) / "critic.json"
    fleet.post("", path=str(card.parent))
    card.write_text(card.read_text() + "\n")

    async def start() -> Answers:
        """Clients notice nothing, but that both serve again."""
        answers: Answers = []
        until = asyncio.Event()
        # More of them would slow the start down.
        running = asyncio.create_task(clients(fleet, answers, until, number=2, pause=0.5))
        await asyncio.to_thread(fleet.there.start)
        await asyncio.to_thread(fleet.balancer.wait, 2)
        await asyncio.to_thread(within, 60, lambda: fleet.there.metric("qsharp_completions_total") > 0)
        until.set()
        await running
        return answers

    answers = asyncio.run(start())
    assert {choice["guidance"]["critic"] for answer in answers for choice in answer} == {ONE}
    assert "not those that were published" in fleet.there.problems()["spoilt@1"]
    assert fleet.there.metric("qsharp_critic_problems") == 1
    assert fleet.here.metric("qsharp_critic_problems") == 0
    fleet.forget("spoilt")
    fleet.forget("shared")
    for member in fleet.members:
        within(WITHIN, lambda one=member: one.problems() == {})  # type: ignore[misc]
