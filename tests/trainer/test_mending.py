"""A loop whose training failed is mended and goes on; what other sources say of its rollouts is not its own."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qsharp_core import cli
from qsharp_core.rollouts import parquet
from qsharp_core.rollouts.records import Rollout
from server.store.filters import Filters
from server.store.rewards import GivenReward
from tests.server.test_store import unguided
from tests.support import fake_server, models
from tests.support.fake_server import FakeServer
from tests.trainer.test_loop import arguments, report_of
from trainer.commands.loop import main
from trainer.loop import stages, training
from trainer.rewards.base import Case
from trainer.rollouts import retrying
from trainer.training import job
from trainer.training.settings import TrainingError

HERE = "tests.trainer.test_mending"
REWARD = [0.5]
"""What the verifier gives: in a list, so that a test can mend it."""


async def mended(case: Case) -> float:
    """In this process, because it is async."""
    return REWARD[0] if case.completion[-2:-1] in tuple("13579") else 0.0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_reference(tmp_path_factory.mktemp("base"), sharpness=1.0)


@pytest.fixture
def fake(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    async def run_job(path: Path) -> None:
        if job.run(job.Job.model_validate_json(path.read_bytes())):
            raise TrainingError("no version")

    monkeypatch.setattr(retrying, "_backoff", lambda state: 0.01)
    monkeypatch.setattr(training, "run_job", run_job)
    torch.set_num_threads(1)
    with fake_server.running(f"sqlite:///{tmp_path / 'rollouts.db'}") as server:
        server.root = str(base)
        yield server


def exported(tmp_path: Path, number: int = 0) -> list[Rollout]:
    path = tmp_path / "run" / f"round-{number}" / "rollouts.parquet"
    return [one for batch in parquet.read(path) for one in batch]


def of_verifier(given: list[str], verifier: str) -> list[str]:
    return [verifier if given[i - 1] == "--verifier" else flag for i, flag in enumerate(given)]


def test_what_was_mended_is_exported_anew_and_trained_on(
    fake: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Bernoulli critic refuses rewards of a half. They are judged anew, a prompt is added, and the loop goes on."""
    monkeypatch.setitem(globals(), "REWARD", [0.5])
    given = of_verifier(arguments(fake, tmp_path), f"{HERE}:mended")
    given[given.index("--rounds") + 1] = "1"
    with pytest.raises(TrainingError):
        main(given)
    assert "has reward 0.5: it must be 0 or 1" in capsys.readouterr().err
    assert {one.reward for one in exported(tmp_path)} == {0.0, 0.5}
    REWARD[0] = 1.0
    mend = ["reward", "--url", fake.url, "--verifier", f"{HERE}:mended", "--again"]
    assert cli.main(mend) == 0
    with (tmp_path / "few.jsonl").open("a") as file:
        file.write(json.dumps({"id": "new", "prompt": "What is 5 + 4 + 3?\nAnswer:", "answer": "12"}) + "\n")
    monkeypatch.setattr("tests.trainer.test_loop.questions", lambda path: path / "few.jsonl")
    main(given)
    assert {one.reward for one in exported(tmp_path)} == {0.0, 1.0}
    assert sum(one.metadata["qsharp_problem"] == "new" for one in exported(tmp_path)) == 4
    (row,) = report_of(tmp_path)["rounds"]
    assert row["export"]["rows"] == len(exported(tmp_path)) == 84
    assert row["train"]["critic"] == "tiny@1"


def test_a_loop_learns_from_its_own_source_and_says_what_it_leaves_out(
    fake: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the loop judges, somebody's other verifier, with the same key, has rewarded half of its rollouts."""
    reward_all = stages.reward_all

    async def after_others(*given: object) -> object:
        ids = [one.id for one in fake.stored()][::2]
        items = [GivenReward(name, 1.0, "length") for name in ids]
        await fake.store.add_rewards(items, owner=None, given_by="default")
        return await reward_all(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(stages, "reward_all", after_others)
    given = arguments(fake, tmp_path)
    given[given.index("--rounds") + 1] = "1"
    main(given)
    (row,) = report_of(tmp_path)["rounds"]
    assert (row["reward"]["given"], row["reward"]["of_others"]) == (80, 40)
    said = " ".join(capsys.readouterr().err.split())
    assert "40 rollouts have rewards of other sources alone, from which this loop does not learn" in said
    learned = exported(tmp_path)
    assert len(learned) == 80
    assert {entry.source for one in learned for entry in one.rewards} == {"numeric"}
    for one in learned:
        answer = sum(map(int, one.metadata["qsharp_problem"].split("+")))
        assert one.reward == float(one.completion_text.endswith(f"The answer is {answer}."))


def test_rewards_are_found_by_their_source(tmp_path: Path, fake: FakeServer) -> None:
    first, second = unguided(), unguided()

    async def fill() -> None:
        await fake.store.add([first, second])
        for name, reward, source in (
            (first.id, 1.0, "mine"), (first.id, 0.0, "theirs"), (first.id, 0.0, "mine"), (first.id, 0.0, "mine"),
            (second.id, 1.0, "theirs"),
        ):  # fmt: skip
            await fake.store.add_rewards([GivenReward(name, reward, source)], owner=None, given_by="me")

    asyncio.run(fill())
    (found,) = fake.store.page(Filters(reward_source="mine"), owner=None).data
    assert [(entry.reward, entry.source) for entry in found.rewards] == [(1.0, "mine"), (0.0, "mine")]
    assert (found.id, found.reward) == (first.id, 0.0)
    (left,) = fake.store.page(Filters(reward_source="mine", has_reward=False), owner=None).data
    assert (left.id, left.reward, left.rewards) == (second.id, None, ())
    assert fake.store.count(Filters(reward_source="theirs", rewarded_by=["me"]), owner=None) == 2
    assert fake.store.count(Filters(reward_source="theirs", rewarded_by=["you"]), owner=None) == 0
    assert fake.store.count(Filters(reward_source=""), owner=None) == 0
