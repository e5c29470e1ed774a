"""A trial on live traffic: what earns more is promoted, what earns less is rolled back, and admins have their way."""

import asyncio
import math
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from qsharp_core.rollouts.records import Rollout, new_id
from server.critics import catalog
from tests.support import models
from tests.support.fake_server import FakeServer, Loaded, running
from trainer.commands.loop import main
from trainer.loop.activation import ServedCritic
from trainer.loop.report import TrialResult
from trainer.loop.trial import Trial, TrialSettings
from trainer.loop.versions import LoopError, Version
from trainer.rollouts.client import ServerClient

CHOICES = 2  # of each request


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeServer]:
    with running(str(tmp_path / "rollouts.db")) as fake:
        fake.critics = {"tiny@1": Loaded("tiny", "1", str(tmp_path / "tiny" / "1"), active=True)}
        fake.decisions = [{"name": "tiny", "version": "1", "share": 1, "created": time.time()}]
        for version in "12":
            models.write_critic(tmp_path / "tiny" / version, name="tiny", version=version)
        yield fake


class Traffic:
    """Requests that the server guides by the version that it drew, and their rewards."""

    def __init__(self, fake: FakeServer, chances: tuple[float, float], seed: int = 0) -> None:
        self.fake = fake
        self.chances = chances  # of a right answer by versions 1 and 2
        self.dice = random.Random(seed)
        self.requests = 0

    async def after(self, fake: FakeServer, count: int) -> int:
        """Waits until so many have come since a trial began; returns how many came before."""
        while len(fake.decisions) < 2:
            await asyncio.sleep(0.01)
        begun = self.requests
        while self.requests < begun + count:
            await asyncio.sleep(0.01)
        return begun

    async def some(self, count: int) -> None:
        share = self.fake.decisions[-1]["share"] if self.fake.decisions[-1]["version"] == "2" else 0
        made = []
        for _ in range(count):
            self.requests += 1
            request = f"request {self.requests}"
            version = "2" if catalog.TrialShare("tiny@2", share).takes(request) else "1"
            one = Rollout(
                id=new_id(), request_id=request, choice=0, route="completion", created=time.time(), model="fake",
                prompt_token_ids=[1], completion_token_ids=[2, 3], prompt_text=None, completion_text="x", eta=0.1,
                method="qsharp", critic=f"tiny@{version}",
            )  # fmt: skip
            for choice in range(CHOICES):
                right = self.dice.random() < self.chances[version == "2"]
                made.append(replace(one, id=new_id(), choice=choice, reward=float(right)))
        await self.fake.store.add(made)


async def tried(
    fake: FakeServer, folder: Path, traffic: Traffic, settings: TrialSettings, batch: int = 100
) -> TrialResult:
    """A trial beside which so many requests come between two looks."""
    async with ServerClient(fake.url) as client:
        served = ServedCritic(client, "tiny", folder)
        trial = Trial(client, served, settings, Console(quiet=True))

        async def come() -> None:
            while True:
                await traffic.some(batch)
                await asyncio.sleep(0.01)

        coming = asyncio.create_task(come())
        try:
            return await trial.run(Version.at(folder / "tiny" / "2"), Version.at(folder / "tiny" / "1"), "it is new")
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)


FAST = TrialSettings(share=0.4, interval=0.02, most=4000)


def test_what_earns_more_is_found_and_left_to_be_activated(fake: FakeServer, tmp_path: Path) -> None:
    asyncio.run(Traffic(fake, (1.0, 0.0)).some(100))  # what came before the trial does not count
    result = asyncio.run(tried(fake, tmp_path, Traffic(fake, (0.4, 0.7)), FAST))
    assert result.outcome == "better"
    assert result.low is not None
    assert 0 < result.low < 0.3 < (result.high or 0)
    assert list(result.means) == [pytest.approx(0.7, abs=0.12), pytest.approx(0.4, abs=0.12)]
    share = result.n[0] / sum(result.n)
    assert abs(share - 0.4) < 4 * math.sqrt(0.24 / sum(result.n))
    assert "n = " in result.why
    assert [one["share"] for one in fake.decisions] == [1, 0.4]
    assert "tiny@2" in fake.critics


def test_what_earns_less_is_rolled_back_and_unloaded(fake: FakeServer, tmp_path: Path) -> None:
    result = asyncio.run(tried(fake, tmp_path, Traffic(fake, (0.7, 0.4)), FAST))
    assert result.outcome == "worse"
    assert [one["share"] for one in fake.decisions] == [1, 0.4, 0]
    assert set(fake.critics) == {"tiny@1"}


def test_equals_end_undecided_and_nothing_changes(fake: FakeServer, tmp_path: Path) -> None:
    settings = replace(FAST, most=600, alpha=1e-6)
    result = asyncio.run(tried(fake, tmp_path, Traffic(fake, (0.5, 0.5)), settings))
    assert result.outcome == "undecided"
    assert sum(result.n) >= 600
    assert set(fake.critics) == {"tiny@1"}


def test_a_trial_that_was_stopped_goes_on(fake: FakeServer, tmp_path: Path) -> None:
    traffic = Traffic(fake, (0.4, 0.7))

    async def stopped() -> int:
        running = asyncio.create_task(tried(fake, tmp_path, traffic, replace(FAST, alpha=1e-300)))
        begun = await traffic.after(fake, 300)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return traffic.requests - begun

    before = asyncio.run(stopped())
    result = asyncio.run(tried(fake, tmp_path, traffic, FAST))
    assert result.outcome == "better"
    assert sum(result.n) >= before - 100  # those of the first run count, too; a batch may have been cut off
    assert [one["share"] for one in fake.decisions] == [1, 0.4]


@pytest.mark.parametrize(("version", "share"), [("2", 0), ("2", 1), ("1", 1)])
def test_what_an_admin_decides_meanwhile_stands(fake: FakeServer, tmp_path: Path, version: str, share: float) -> None:
    traffic = Traffic(fake, (0.4, 0.7))

    async def main() -> TrialResult:
        running = asyncio.create_task(tried(fake, tmp_path, traffic, replace(FAST, alpha=1e-300)))
        await traffic.after(fake, 300)
        async with ServerClient(fake.url) as admin:
            await admin.post("/v1/critics/tiny/activate", {"version": version, "share": share})
        return await running

    assert asyncio.run(main()).outcome == "ended"
    assert fake.decisions[-1]["version"] == version
    assert "tiny@2" in fake.critics


def test_rewards_count_by_the_share_of_their_time(fake: FakeServer, tmp_path: Path) -> None:
    """An admin lets more requests have it; a plain difference of means would then be wrong where traffic changes."""
    traffic = Traffic(fake, (0.4, 0.7))

    async def main() -> TrialResult:
        running = asyncio.create_task(tried(fake, tmp_path, traffic, FAST, batch=20))
        await traffic.after(fake, 100)
        async with ServerClient(fake.url) as admin:
            await admin.post("/v1/critics/tiny/activate", {"version": "2", "share": 0.8})
        return await running

    result = asyncio.run(main())
    assert result.outcome == "better"
    assert result.n[0] > result.n[1]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--watch", "--trial", "1"], "--trial must be between 0 and 1"),
        (["--watch", "--trial", "0.1", "--trial-error", "0"], "--trial-error must be between 0 and 1"),
        (["--rounds", "1", "--trial", "0.1"], "use it with --watch"),
    ],
)
def test_wrong_flags(fake: FakeServer, tmp_path: Path, flags: list[str], told: str) -> None:
    with pytest.raises(LoopError, match=told):
        main([*flags, "--url", fake.url, "--admin-key", "x", "--out", str(tmp_path), "--run", str(tmp_path / "run")])
