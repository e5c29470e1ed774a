"""Whose rollouts and whose rewards a critic learns from: in a file, in an export, in a loop and in a watch."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from qsharp_core import cli
from qsharp_core.rollouts import parquet
from qsharp_core.rollouts.records import Reward
from server.access.principal import Principal
from server.store.filters import Filters
from server.store.rewards import GivenReward
from tests.server.test_store import unguided
from tests.support import fake_server, models
from tests.support import trainer_data as world
from tests.support.fake_server import FakeServer
from tests.trainer.test_loop import arguments, questions, report_of
from trainer.commands.loop import main
from trainer.loop import stages, training
from trainer.loop.settings import CriticRecipe
from trainer.loop.versions import LoopError
from trainer.rollouts import retrying
from trainer.training import data, job
from trainer.training.settings import TrainingError, TrainSettings
from trainer.trust import Trust

ANN, BOB, ROOT = Principal("ann"), Principal("bob"), Principal("root", admin=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_reference(tmp_path_factory.mktemp("base"), sharpness=1.0)


@pytest.fixture
def fake(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    async def run_job(path: Path) -> None:
        assert job.run(job.Job.model_validate_json(path.read_bytes())) == 0

    monkeypatch.setattr(retrying, "_backoff", lambda state: 0.01)
    monkeypatch.setattr(training, "run_job", run_job)
    torch.set_num_threads(1)
    with fake_server.running(f"sqlite:///{tmp_path / 'rollouts.db'}") as server:
        server.root = str(base)
        server.keys |= {"ann-key": ANN, "bob-key": BOB, "x": ROOT, "other-admins": Principal("other", admin=True)}
        yield server


def given(*rewards: tuple[float, str | None]) -> tuple[Reward, ...]:
    return tuple(Reward(reward, None, float(i), by) for i, (reward, by) in enumerate(rewards))


HISTORIES = {
    "a": ("ann", given((1.0, "root"), (0.0, "ann"))),
    "b": ("ann", given((1.0, "ann"))),
    "c": ("bob", given((0.0, "root"), (1.0, "root"), (0.0, None))),
    "d": ("bob", ()),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Rollouts of two owners, each with its last reward as the present one."""
    rollouts = [
        unguided(id=name, owner=owner, rewards=history, reward=history[-1].reward if history else None)
        for name, (owner, history) in HISTORIES.items()
    ]
    path = tmp_path / "data.parquet"
    path.write_bytes(b"".join(parquet.write([rollouts])))
    return path


@pytest.mark.parametrize(
    ("trust", "wanted", "counts"),
    [
        (Trust(), {"a": 0.0, "b": 1.0, "c": 0.0}, {"unrewarded": 1}),
        (Trust(owners=("ann",)), {"a": 0.0, "b": 1.0}, {"of_others": 2}),
        (Trust(rewards_by=("root",)), {"a": 1.0, "c": 1.0}, {"unrewarded": 2}),
        (Trust(rewards_by=("root", "ann")), {"a": 0.0, "b": 1.0, "c": 1.0}, {"unrewarded": 1}),
        (Trust(owners=("bob",), rewards_by=("root",)), {"c": 1.0}, {"of_others": 2, "unrewarded": 1}),
        (Trust(rewards_by=("nobody",)), {}, {"unrewarded": 4}),
    ],
)
def test_a_file_is_read_as_if_others_had_not_written_to_it(
    file: Path, trust: Trust, wanted: dict[str, float], counts: dict[str, int]
) -> None:
    found = data.read([file], trust=trust)
    assert {r.id: r.reward for r in found.rollouts} == wanted
    assert found.counts == {"read": 4, **counts}


def test_a_file_without_owners_says_so(tmp_path: Path) -> None:
    old = world.write(tmp_path / "old.parquet", [world.row("a", [5], [world.A], 1.0)])
    assert len(data.read([old]).rollouts) == 1
    for trust, column in ((Trust(owners=("ann",)), "owner"), (Trust(rewards_by=("root",)), "rewards")):
        with pytest.raises(TrainingError, match=f"has no column {column}: it is older"):
            data.read([old], trust=trust)


def test_a_later_file_does_not_hide_a_trusted_reward(tmp_path: Path) -> None:
    """The later row has a reward, but nobody who counts gave it."""
    for name, history in (("0", given((1.0, "root"))), ("1", given((0.0, "ann")))):
        rollout = unguided(id="a", rewards=history, reward=history[-1].reward)
        (tmp_path / f"{name}.parquet").write_bytes(b"".join(parquet.write([[rollout]])))
    (found,) = data.read([tmp_path], trust=Trust(rewards_by=("root",))).rollouts
    assert found.reward == 1.0


def store(fake: FakeServer) -> dict[str, str]:
    """The histories above, in the server's store; ids by name."""
    rollouts = {name: unguided(owner=owner) for name, (owner, _) in HISTORIES.items()}

    async def fill() -> None:
        await fake.store.add(list(rollouts.values()))
        for name, (_, history) in HISTORIES.items():
            for entry in history:
                by = entry.given_by or "x"
                await fake.store.add_rewards([GivenReward(rollouts[name].id, entry.reward)], owner=None, given_by=by)

    asyncio.run(fill())
    return {rollout.id: name for name, rollout in rollouts.items()}


def test_an_export_has_what_is_trusted(fake: FakeServer, tmp_path: Path) -> None:
    names = store(fake)

    def export(*flags: str, key: str = "x") -> dict[str, float | None]:
        out = tmp_path / "out.parquet"
        assert cli.main(["export", "--url", fake.url, "--api-key", key, "--out", str(out), *flags]) == 0
        return {names[one.id]: one.reward for batch in parquet.read(out) for one in batch}

    assert export() == {"a": 0.0, "b": 1.0, "c": 0.0, "d": None}
    assert export("--owner", "ann") == {"a": 0.0, "b": 1.0}
    assert export("--owner", "ann,bob", "--owner", "x") == export()
    assert export("--rewards-by", "root") == {"a": 1.0, "c": 1.0}
    assert export("--rewards-by", "root", "--rewards-by", "ann", "--owner", "ann") == {"a": 0.0, "b": 1.0}
    assert export(key="ann-key") == {"a": 0.0, "b": 1.0}
    nothing = ["export", "--url", fake.url, "--api-key", "ann-key", "--out", str(tmp_path / "none.parquet")]
    assert cli.main([*nothing, "--owner", "bob"]) == 1
    assert not (tmp_path / "none.parquet").exists()
    with pytest.raises(SystemExit):
        cli.main(["export", "--out", str(tmp_path / "out.parquet"), "--owner", "a,,b"])


def forge(fake: FakeServer) -> None:
    """Bob stores copies of all that is stored, metadata and all, and rewards them. Another admin rewards the rest."""
    copies = [unguided(owner="bob", metadata=one.metadata) for one in fake.stored()]
    asyncio.run(fake.store.add(copies))
    with httpx.Client(base_url=fake.url) as http:
        for key, ids in (
            ("bob-key", [one.id for one in copies]),
            ("other-admins", [one.id for one in fake.stored() if one.owner == "root"]),
        ):
            body = {"items": [{"id": name, "reward": 0.5, "source": "numeric"} for name in ids]}
            answer = http.post("/v1/rollouts/rewards", json=body, headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == 200, answer.text


def test_a_loop_learns_from_its_own_rollouts_and_rewards(
    fake: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are judged once more by those who count, and what Bob has forged is not among them."""
    reward_all = stages.reward_all

    async def after_a_forgery(*given: Any) -> Any:
        await asyncio.to_thread(forge, fake)
        return await reward_all(*given)

    monkeypatch.setattr(stages, "reward_all", after_a_forgery)
    flags = arguments(fake, tmp_path, "run", "--owner", "root", "--rewards-by", "root")
    at = flags.index("--rounds")
    flags[at + 1] = "1"
    main(flags)
    (row,) = report_of(tmp_path)["rounds"]
    assert row["export"]["rows"] == row["collect"]["wanted"] == 80
    exported = [one for batch in parquet.read(tmp_path / "run/round-0/rollouts.parquet") for one in batch]
    assert {one.owner for one in exported} == {"root"}
    assert {entry.given_by for one in exported for entry in one.rewards} == {"root"}
    assert {one.reward for one in exported} == {0.0, 1.0}
    assert fake.store.count(Filters(owners=["bob"]), owner=None) == 80


def test_a_loop_whose_own_rewards_do_not_count_says_so(fake: FakeServer, tmp_path: Path) -> None:
    with pytest.raises(LoopError, match="--rewards-by must name its key's holder"):
        main(arguments(fake, tmp_path, "run", "--rewards-by", "somebody"))
    with pytest.raises(LoopError, match="--owner is the loop's own"):
        main(arguments(fake, tmp_path, "other", train=("--owner", "ann")))


def test_a_watch_counts_and_learns_what_is_trusted(fake: FakeServer, tmp_path: Path) -> None:
    common = ["collect", "--prompts", str(questions(tmp_path)), "--url", fake.url, "--max-tokens", "48"]
    for key in ("ann-key", "bob-key"):
        state = str(tmp_path / f"{key}.jsonl")
        assert cli.main([*common, "--split", "train", "--n", "3", "--state", state, "--api-key", key]) == 0
    anns = [one.id for one in fake.stored() if one.owner == "ann"]
    assert len(anns) == 60

    async def give() -> None:
        """All have a reward, but only 50 of Ann's one that counts, which she has taken back since."""
        items = [GivenReward(name, float(i % 2)) for i, name in enumerate(anns[:50])]
        await fake.store.add_rewards(items, owner=None, given_by="root")
        for one in fake.stored():
            await fake.store.add_rewards([GivenReward(one.id, 0.0)], owner=None, given_by=one.owner)

    asyncio.run(give())
    main(
        [
            "--watch", "--min-new", "50", "--interval", "0.1", "--url", fake.url, "--admin-key", "x", "--name", "tiny",
            "--api-key", "bob-key",  # reads nothing of Ann's, and is not asked
            "--out", str(tmp_path / "critics"), "--run", str(tmp_path / "watch"), "--rounds", "1",
            "--owner", "ann", "--rewards-by", "root", "--",
            "--layers", "1", "--epochs", "1", "--batch-tokens", "4000", "--held-out", "0.3",
        ]
    )  # fmt: skip
    card = json.loads((tmp_path / "critics" / "tiny" / "1" / "critic.json").read_text())
    assert card["data"]["train_rollouts"] + card["data"]["held_out_rollouts"] == 50
    learned = [one for batch in parquet.read(tmp_path / "watch/round-0/rollouts.parquet") for one in batch]
    assert sum(one.reward or 0.0 for one in learned) == 25


def test_journals_from_before_go_on(tmp_path: Path) -> None:
    recipe = CriticRecipe(settings=TrainSettings(base="m"), out=tmp_path)
    assert not {"owner", "rewards_by"} & recipe.identity()["train"].keys()
    named = CriticRecipe(settings=TrainSettings(base="m", owner=("ann",)), out=tmp_path)
    assert named.identity()["train"]["owner"] == ["ann"]
