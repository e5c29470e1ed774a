"""`qsharp loop`: rounds, kills between them, versions that are not better; the long-running mode."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qsharp_core import cli
from server.store.filters import Filters
from server.store.rewards import GivenReward
from tests.support import fake_server, models
from tests.support.fake_server import FakeServer, Loaded
from tests.trainer.test_runs import assert_same
from tests.trainer.test_trial import Traffic
from trainer.commands.loop import main
from trainer.loop import training, watch
from trainer.loop.activation import ActivationDecision, ServedCritic, decide
from trainer.loop.stages import export_to
from trainer.loop.versions import LoopError, Version
from trainer.loop.watch import count_trainable
from trainer.rollouts import retrying
from trainer.rollouts.client import JSONObject, ServerClient, StoredCount
from trainer.rollouts.errors import TransientError
from trainer.rollouts.journal import Journal, JournalError
from trainer.training import job
from trainer.training.report import TrainingReport

QUESTIONS = [(a, b, c) for a in range(1, 6) for b in range(1, 3) for c in range(1, 3)]


class KilledError(BaseException):
    """What a kill is, as far as a journal can tell."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_reference(tmp_path_factory.mktemp("base"), sharpness=1.0)


@pytest.fixture
def fake(tmp_path: Path, base: Path) -> Iterator[FakeServer]:
    with fake_server.running(f"sqlite:///{tmp_path / 'rollouts.db'}") as server:
        server.root = str(base)
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Impatient, and training in this process: a new one would spend its time on imports."""

    async def run_job(path: Path) -> None:
        assert job.run(job.Job.model_validate_json(path.read_bytes())) == 0

    monkeypatch.setattr(retrying, "_backoff", lambda state: 0.01)
    monkeypatch.setattr(training, "run_job", run_job)
    torch.set_num_threads(1)


def questions(tmp_path: Path) -> Path:
    """Short ones: a token of the fake server is a character."""
    path = tmp_path / "few.jsonl"
    lines = [
        {"id": f"{a}+{b}+{c}", "prompt": f"What is {a} + {b} + {c}?\nAnswer:", "answer": str(a + b + c)}
        for a, b, c in QUESTIONS
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def arguments(fake: FakeServer, tmp_path: Path, run: str = "run", *more: str, train: tuple[str, ...] = ()) -> list[str]:
    return [
        "--prompts", str(questions(tmp_path)), "--verifier", "numeric", "--split", "train", "--url", fake.url,
        "--admin-key", "x", "--out", str(tmp_path / f"{run}-critics"), "--run", str(tmp_path / run), "--name", "tiny",
        "--rounds", "2", "--n", "4", "2", "--eta", "0.2", "--candidates", "6", "--max-tokens", "48", *more, "--",
        "--layers", "1", "--epochs", "1", "--lr", "3e-3", "--batch-tokens", "4000", "--held-out", "0.3", *train,
    ]  # fmt: skip


def report_of(tmp_path: Path, run: str = "run") -> Any:
    return json.loads((tmp_path / run / "report.json").read_text())


def without_times(value: Any) -> Any:
    """A report, less what differs between two runs: times, tries, and what only a resumed stage counts."""
    drop = {"seconds", "retries", "made", "before", "found", "given", "mean", "tokens", "run"}
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in drop}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def by_item(fake: FakeServer) -> dict[str, Any]:
    """What is stored and what it earned, by item; fails if an item is there twice."""
    stored = fake.stored()
    found = {r.metadata["qsharp_item"]: (r.completion_token_ids, r.first_valid_position, r.reward) for r in stored}
    assert len(found) == len(stored)
    return found


def test_a_critic_of_that_name_from_another_folder_is_not_taken_for_this_one(tmp_path: Path, fake: FakeServer) -> None:
    fake.critics["tiny@1"] = Loaded("tiny", "1", "/elsewhere/tiny/1")
    version = Version("tiny@1", tmp_path / "tiny" / "1")

    async def activate() -> None:
        async with ServerClient(fake.url) as client:
            await ServedCritic(client, "tiny", tmp_path).activate(version)

    with pytest.raises(LoopError, match="the server has tiny@1 from /elsewhere/tiny/1"):
        asyncio.run(activate())
    assert not fake.critics["tiny@1"].active


def test_two_rounds(fake: FakeServer, tmp_path: Path) -> None:
    more = ("--eval-samples", "2", "--eval-split", "train", "--eval-method", "qsharp", "--eval-method", "cd")
    main(arguments(fake, tmp_path, "run", *more))
    first, second = report_of(tmp_path)["rounds"]
    assert (first["collect"]["wanted"], first["collect"]["guided_by"]) == (80, None)
    assert first["train"]["critic"] == "tiny@1"
    assert first["activate"]["activated"] == (
        first["train"]["held_out"]["overall"]["log_loss"] < first["train"]["held_out"]["overall"]["log_loss_constant"]
    )
    assert second["train"]["critic"] == "tiny@2"
    rows = second["train"]["data"]
    if first["activate"]["activated"]:
        assert second["collect"]["guided_by"] == "tiny@1"
        # All rounds' rollouts; roll-ins are read, and none of their positions is trained on.
        assert (rows["read"], rows["no_valid_position"]) == (80 + 2 * 40, 40)
        assert second["train"]["parent"]["critic"] == "tiny@1"
    assert next(r["method"] for r in first["evaluate"]["results"]) == "reference"
    assert set(second["seconds"]) >= {"collect", "reward", "export", "train", "activate"}
    active = [key for key, one in fake.critics.items() if one.active and one.name == "tiny"]
    assert active == ([report_of(tmp_path)["critic"]] if report_of(tmp_path)["critic"] else [])
    # Once more: nothing is left to do.
    posts = fake.posts.copy()
    main(arguments(fake, tmp_path, "run", *more))
    assert fake.posts == posts


def test_a_head_on_the_models_own_hidden_states_learns_from_branches(
    fake: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(fake, tmp_path, "run", "--branch", "3")
    given = [*given[: given.index("--") + 1], "--backbone", "reference", "--steps", "60", "--held-out", "0.3"]
    main(given)
    first, second = report_of(tmp_path)["rounds"]
    assert first["collect"]["wanted"] == 20 * (4 + 3)
    held_out = first["train"]["held_out"]
    assert held_out["branches"]["rollouts"] > 0
    assert first["activate"]["activated"] == (
        held_out["overall"]["log_loss"] < held_out["overall"]["log_loss_constant"]
    )
    assert second["train"]["critic"] == "tiny@2"
    if first["activate"]["activated"]:
        assert second["train"]["parent"]["comparison"]["by"] == "log_loss"
    assert second["collect"]["wanted"] == 20 * 2  # branches are the first round's
    # The second round has the reference run over what is new.
    said = [line for line in capsys.readouterr().out.split("distinct prefixes") if "the reference was run for" in line]
    assert len(said) == 2
    assert (tmp_path / "run-critics" / ".features").is_dir()


@pytest.fixture
def always_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "decide", lambda report, active: ActivationDecision(True, "told so"))


@pytest.mark.usefixtures("always_better")
@pytest.mark.parametrize("noted", [True, False], ids=["after", "before"])
def test_kills_between_stages_change_nothing(
    fake: FakeServer, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, noted: bool
) -> None:
    """Killed at the end of every stage, just after or just before that is noted."""
    add, spared = Journal.add, [0]

    def dying(journal: Journal, entry: dict[str, Any]) -> None:
        if "stage" not in entry:
            return add(journal, entry)
        spared[0] -= 1
        if noted or spared[0] >= 0:
            add(journal, entry)
        if spared[0] < 0:
            raise KilledError
        return None

    with fake_server.running(f"sqlite:///{tmp_path / 'unbroken.db'}") as unbroken:
        unbroken.root = str(base)
        unbroken.ids = fake.ids = lambda metadata: metadata["qsharp_item"]  # training goes by the order of ids
        main(arguments(unbroken, tmp_path, "same"))
        report, stored = without_times(report_of(tmp_path, "same")), by_item(unbroken)
        keys = set(unbroken.critics)
    os.rename(tmp_path / "same", tmp_path / "unbroken")
    os.rename(tmp_path / "same-critics", tmp_path / "unbroken-critics")
    monkeypatch.setattr(Journal, "add", dying)
    kills = 0
    while True:
        # Where nothing is noted, a stage is killed the first time and done the second.
        spared[0] = 0 if noted or kills % 2 == 0 else 1
        try:
            main(arguments(fake, tmp_path, "same"))
        except KilledError:
            kills += 1
            continue
        break
    assert kills >= 14  # stages of two rounds
    assert by_item(fake) == stored
    assert without_times(report_of(tmp_path, "same")) == report
    assert set(fake.critics) == keys
    assert sorted(p.name for p in (tmp_path / "same-critics" / "tiny").iterdir()) == ["1", "2"]
    for version in ("1", "2"):
        assert_same(tmp_path / "same-critics" / "tiny" / version, tmp_path / "unbroken-critics" / "tiny" / version)


def test_what_is_not_better_is_published_and_not_activated(
    fake: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = iter([ActivationDecision(True, "good"), ActivationDecision(False, "worse")])
    monkeypatch.setattr(training, "decide", lambda report, active: next(told))
    main(arguments(fake, tmp_path, "run", "--continue"))
    first, second = report_of(tmp_path)["rounds"]
    assert first["activate"] == {"activated": True, "why": "good", "critic": "tiny@1", "trial": None}
    assert second["activate"] == {"activated": False, "why": "worse", "critic": "tiny@1", "trial": None}
    assert second["train"]["critic"] == "tiny@2"
    assert (tmp_path / "run-critics" / "tiny" / "2" / "critic.json").is_file()
    card = json.loads((tmp_path / "run-critics" / "tiny" / "2" / "critic.json").read_text())
    assert (card["parent"], card["recommended_eta"]) == ("tiny@1", 0.2)
    assert report_of(tmp_path)["critic"] == "tiny@1"
    assert {key: one.active for key, one in fake.critics.items()} == {"fake@1": True, "tiny@1": True}


def trained(overall: dict[str, Any] | None, parent: dict[str, Any] | None = None) -> TrainingReport:
    """A training's report with these measures."""
    measures = overall and {"n": 1, "rollouts": 1, "reward_mean": 0.5, "auc": None, "ece": 0.0, **overall}
    held_out: dict[str, Any] = {
        "overall": measures,
        "by_position": [],
        "last_token": measures,
        "branches": None,
        "prompts": 1,
    }
    fields = {"critic": "a@2", "data": {}, "steps": 1, "best_epoch": None, "held_out": measures and held_out}
    return TrainingReport.model_validate(fields | {"parent": parent and {"held_out": measures, **parent}})


def test_verdicts() -> None:
    overall = {"log_loss": 0.6, "log_loss_constant": 0.7, "brier": 0.3, "brier_constant": 0.2}
    assert decide(trained(overall), None).better
    del overall["log_loss_constant"]  # a categorical critic's
    assert not decide(trained(overall), None).better
    assert not decide(trained(None), None).better
    comparison = {"by": "log_loss", "improvement": 0.01, "standard_error": 0.002, "prompts": 9, "better": True}
    report = trained(overall, {"critic": "a@1", "comparison": comparison})
    assert decide(report, "a@1").better
    assert "by +0.01000 ± 0.00200" in decide(report, "a@1").why
    assert not decide(report, "a@0").better  # it was compared with another one
    assert not decide(trained(overall, {"critic": "a@1", "comparison": None}), "a@1").better


def test_a_version_that_a_restarted_server_lost_is_loaded_again(fake: FakeServer, tmp_path: Path) -> None:
    lost = models.write_critic(tmp_path / "tiny" / "2", name="tiny", version="2")
    older = models.write_critic(tmp_path / "tiny" / "1", name="tiny", version="1")

    async def current(remembered: Path) -> Version | None:
        async with ServerClient(fake.url) as server:
            return await ServedCritic(server, "tiny", tmp_path).current(Version.at(remembered))

    fake.critics["tiny@1"] = Loaded("tiny", "1", active=True)
    assert asyncio.run(current(lost)) == Version("tiny@2", lost)
    assert fake.critics["tiny@2"].active
    # Somebody rolls back: that counts.
    fake.critics["tiny@1"].active, fake.critics["tiny@2"].active = True, False
    assert asyncio.run(current(lost)) == Version("tiny@1", older)
    # Servers of a store forget nothing: somebody has unloaded it, and that counts, too.
    del fake.critics["tiny@2"]
    fake.wanted = {"versions": ["tiny@1"], "active": {"tiny": "1"}, "trials": {}, "problems": {}}
    assert asyncio.run(current(lost)) == Version("tiny@1", older)
    assert "tiny@2" not in fake.critics


def test_the_budget(fake: FakeServer, tmp_path: Path) -> None:
    given = arguments(fake, tmp_path)
    at = given.index("--rounds")
    with pytest.raises(LoopError, match="--max-rollouts"):
        main([*given[:at], *given[at + 2 :]])
    main([*given[:at], "--max-rollouts", "100", *given[at + 2 :]])
    assert len(report_of(tmp_path)["rounds"]) == 1  # 80 fit, 40 more do not
    main([*given[:at], "--max-hours", "1e-9", *given[at + 2 :]])
    assert len(report_of(tmp_path)["rounds"]) == 1
    with pytest.raises(LoopError, match="--run is the loop's own"):
        main([*given, "--run", "x"])
    with pytest.raises(JournalError, match=r"eta was 0\.2, is 0\.3"):
        main(["0.3" if given[i - 1] == "--eta" else flag for i, flag in enumerate(given)])


def store_rollouts(fake: FakeServer, tmp_path: Path) -> list[str]:
    """80 of the reference and 20 guided ones; ids of the former."""
    common = [
        "collect", "--prompts", str(questions(tmp_path)), "--url", fake.url, "--max-tokens", "48", "--split", "train",
    ]  # fmt: skip
    assert cli.main([*common, "--n", "4", "--state", str(tmp_path / "a.jsonl")]) == 0
    assert cli.main([*common, "--n", "1", "--state", str(tmp_path / "b.jsonl"), "--eta", "0.1"]) == 0
    return [rollout.id for rollout in fake.stored() if rollout.eta is None]


def give(fake: FakeServer, ids: list[str]) -> None:
    """Rewards that are not all alike."""
    asyncio.run(
        fake.store.add_rewards(
            [GivenReward(one, float(i % 2), None) for i, one in enumerate(ids)], owner=None, given_by="me"
        )
    )


def watch_flags(fake: FakeServer, tmp_path: Path, rounds: int) -> list[str]:
    return [
        "--watch", "--min-new", "40", "--interval", "0.1", "--url", fake.url, "--admin-key", "x", "--name", "tiny",
        "--out", str(tmp_path / "critics"), "--run", str(tmp_path / "watch"), "--rounds", str(rounds), "--",
        "--layers", "1", "--epochs", "1", "--batch-tokens", "4000", "--held-out", "0.3",
    ]  # fmt: skip


@pytest.mark.usefixtures("always_better")
def test_watching_waits_for_new_rewards(fake: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = store_rollouts(fake, tmp_path)
    guided = [rollout.id for rollout in fake.stored() if rollout.eta is not None]
    give(fake, [*ids[:30], *guided])  # guided throughout: nothing that could be trained on
    looks = [0]

    async def looking(*given: Any) -> StoredCount:
        """What happens between two looks into the store."""
        looks[0] += 1
        if looks[0] == 1:
            raise TransientError("the server is away")
        if looks[0] == 4:
            assert "tiny@1" not in fake.critics
            await fake.store.add_rewards(
                [GivenReward(one, float(i % 2), None) for i, one in enumerate(ids[30:40])], owner=None, given_by="me"
            )
        if looks[0] == 6:
            fake.critics.pop("tiny@1")  # a restart
        if looks[0] == 8:
            assert fake.critics["tiny@1"].active
            await fake.store.add_rewards(
                [GivenReward(one, float(i % 2), None) for i, one in enumerate(ids[40:])], owner=None, given_by="me"
            )
        return await count_trainable(*given)

    monkeypatch.setattr(watch, "wait_random_exponential", lambda *_: lambda state: 0.01)
    monkeypatch.setattr(watch, "count_trainable", looking)
    main(watch_flags(fake, tmp_path, rounds=2))
    assert looks[0] == 8
    assert fake.critics["tiny@2"].active
    cards = [json.loads((tmp_path / "critics" / "tiny" / v / "critic.json").read_text()) for v in ("1", "2")]
    assert [card["data"]["train_rollouts"] + card["data"]["held_out_rollouts"] for card in cards] == [40, 80]
    assert not (tmp_path / "watch" / "round-0").exists()  # old files go


@pytest.mark.usefixtures("always_better")
def test_watching_looks_at_new_rewards_alone(fake: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known rollouts are deleted, and counts have seven too many, as if they were rewarded while a file was made."""
    ids = store_rollouts(fake, tmp_path)
    give(fake, ids[:40])
    looks: list[int | None] = []
    exports = [0]

    async def looking(client: ServerClient, query: dict[str, str], since: int | None) -> StoredCount:
        looks.append(since)
        if since is not None and looks.count(since) == 1:
            old = Filters(has_reward=True, created_before=time.time())
            assert (await fake.store.prune(old, 25, owner=None)).deleted == 25
            await fake.store.add_rewards([GivenReward(one, 1.0) for one in ids[40:75]], owner=None, given_by="me")
        if since is not None and looks.count(since) == 4:
            await fake.store.add_rewards([GivenReward(one, 0.0) for one in ids[75:]], owner=None, given_by="me")
        stored = await count_trainable(client, query, since)
        return stored if since is None else StoredCount(stored.count + 7, stored.last_reward)

    async def exporting(*given: Any) -> int:
        exports[0] += 1
        return await export_to(*given)

    monkeypatch.setattr(watch, "count_trainable", looking)
    monkeypatch.setattr(watch, "export_to", exporting)
    main(watch_flags(fake, tmp_path, rounds=2))
    assert looks == [None, *[40] * 4]
    assert exports[0] == 3  # one for each round, and one that found the count too large
    card = json.loads((tmp_path / "critics" / "tiny" / "2" / "critic.json").read_text())
    assert card["data"]["train_rollouts"] + card["data"]["held_out_rollouts"] == 15 + 40


@pytest.mark.usefixtures("always_better")
@pytest.mark.parametrize(("chances", "version"), [((0.4, 0.8), "2"), ((0.8, 0.4), "1")])
def test_a_watch_tries_its_next_version_on_live_traffic(
    fake: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chances: tuple[float, float], version: str
) -> None:
    """Both are better on held-out rollouts; users say otherwise of one."""
    ids = store_rollouts(fake, tmp_path)
    give(fake, ids[:40])
    traffic, decisions = Traffic(fake, chances), ServedCritic.decisions

    async def while_requests_come(served: ServedCritic) -> list[JSONObject]:
        await traffic.some(40)
        return await decisions(served)

    async def with_the_other_rewards(*given: Any) -> StoredCount:
        if "tiny@1" in fake.critics:
            await fake.store.add_rewards(
                [GivenReward(one, float(i % 2), None) for i, one in enumerate(ids[40:])], owner=None, given_by="me"
            )
        return await count_trainable(*given)

    monkeypatch.setattr(ServedCritic, "decisions", while_requests_come)
    monkeypatch.setattr(watch, "count_trainable", with_the_other_rewards)
    main(["--trial", "0.5", *watch_flags(fake, tmp_path, rounds=2)])
    assert [key for key, one in fake.critics.items() if one.active and one.name == "tiny"] == [f"tiny@{version}"]
    assert [one["share"] for one in fake.decisions] == ([1, 0.5, 1] if version == "2" else [1, 0.5, 0])
    journal = (tmp_path / "watch" / "state.jsonl").read_text()
    result = next(json.loads(line) for line in reversed(journal.splitlines()) if '"stage":"activate"' in line)["result"]
    assert result["activated"] == (version == "2")
    assert result["trial"]["outcome"] == ("better" if version == "2" else "worse")
    assert f"n = {result['trial']['n'][0]}" in result["why"]


def test_sigterm_stops_a_watch_and_what_it_started(fake: FakeServer, tmp_path: Path) -> None:
    """As a process, with training as one of its own."""
    give(fake, store_rollouts(fake, tmp_path))
    command = [sys.executable, "-c", "import sys; from qsharp_core.cli import main; sys.exit(main())"]
    process = subprocess.Popen(
        [*command, "loop", *watch_flags(fake, tmp_path, rounds=9)], stderr=subprocess.PIPE, text=True
    )
    state, deadline = tmp_path / "watch" / "state.jsonl", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if state.exists() and '"stage":"end"' in state.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert "the same command goes on from here" in errors
    assert (tmp_path / "critics" / "tiny" / "1" / "critic.json").is_file()
