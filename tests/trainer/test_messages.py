"""What commands say of mistakes: at once, in a line, with an exit status that tells."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from rich.console import Console
from tenacity import RetryCallState

from qsharp_core import cli
from tests.support import fake_server, models
from tests.support import trainer_data as world
from tests.support.fake_server import FakeServer
from trainer.commands import reward as reward_command
from trainer.rewards.run import Rewarded
from trainer.rewards.verifiers import Verdict
from trainer.rollouts import retrying
from trainer.rollouts.errors import TransientError, check
from trainer.rollouts.retrying import FIRST_PATIENCE, PATIENCE, QUIET, Patience

ROOT = Path(__file__).parents[2]
HERE = "tests.support.verifiers"


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeServer]:
    with fake_server.running(f"sqlite:///{tmp_path / 'rollouts.db'}") as server:
        yield server


def prompts(path: Path, letter: str = "a", words: str = "Write ") -> Path:
    lines = [
        {"id": str(i), "prompt": f"{words}{i}", "letter": letter, "answer": 7, "split": "train" if i < 30 else "test"}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def collected(fake: FakeServer, tmp_path: Path) -> Path:
    file = prompts(tmp_path / "mine.jsonl")
    state = ["--state", str(tmp_path / "state.jsonl")]
    assert cli.main(["collect", "--url", fake.url, "--prompts", str(file), "--split", "train", *state]) == 0
    return file


def test_a_wrong_port_is_told_at_once_and_given_up_soon(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrying, "FIRST_PATIENCE", 1.0)
    began = time.monotonic()
    where = ["--url", "http://127.0.0.1:9", "--state", str(tmp_path / "state")]
    assert cli.main(["collect", "--task", "sums", *where]) == 1
    assert time.monotonic() - began < 8
    said = capsys.readouterr().err
    assert "http://127.0.0.1:9 cannot be reached" in said
    assert "does a server run there? (--url, QSHARP_URL): trying again (0 of 1 s)" in said
    assert FIRST_PATIENCE <= 15
    export = ["export", "--url", "http://127.0.0.1:9", "--out", str(tmp_path / "x.parquet")]
    assert cli.main(export) == 1
    assert "trying again" in capsys.readouterr().err


def test_a_server_that_has_answered_is_waited_for() -> None:
    patience = Patience(None)
    assert patience.seconds == PATIENCE > FIRST_PATIENCE
    told: list[str] = []
    named = Patience(3.0, told.append)
    for one, reached, seconds in ((patience, False, FIRST_PATIENCE), (patience, True, PATIENCE), (named, False, 3.0)):
        one.reached = reached
        state = RetryCallState(None, None, (), {})  # type: ignore[arg-type]
        stop = one.policy()["stop"]
        state.start_time = 0.0
        state.outcome_timestamp = seconds - 0.1
        assert not stop(state)
        state.outcome_timestamp = seconds
        assert stop(state)


def test_a_busy_server_is_waited_for_in_silence_at_first() -> None:
    """Its refusals are how it says that it is full; many of them are no news."""
    request = httpx.Request("GET", "http://here")
    told: list[str] = []
    for status, headers, spent, said in (
        (503, {"Retry-After": "1"}, QUIET - 1, False),
        (429, {"Retry-After": "1"}, QUIET - 1, False),
        (503, {"Retry-After": "1"}, QUIET + 1, True),
        (503, {}, 0.0, True),  # it goes down
        (503, {"Retry-After": "1", "X-Type": "NoServerError"}, 0.0, True),
        (502, {"Retry-After": "1"}, 0.0, True),
    ):
        told.clear()
        patience = Patience(None, told.append)
        state = RetryCallState(None, None, (), {})  # type: ignore[arg-type]
        error = {"message": "full", "type": headers.get("X-Type", "ServiceUnavailableError")}
        answer = httpx.Response(status, headers=headers, json={"error": error}, request=request)
        with pytest.raises(TransientError) as raised:
            check("http://here", answer)
        state.set_exception((TransientError, raised.value, None))
        state.start_time, state.outcome_timestamp = 0.0, spent
        patience.policy()["before_sleep"](state)
        assert bool(told) is said, (status, headers, spent)
        assert patience.retries == 1


def interrupted(command: list[str], ready: Path) -> tuple[int, str]:
    """The exit status and what a command said that got Ctrl-C once a file had grown."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    code = [sys.executable, "-c", "import sys; from qsharp_core.cli import main; sys.exit(main())"]
    process = subprocess.Popen([*code, *command], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if ready.is_file() and ready.read_bytes().count(b"\n") > 5:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


def test_ctrl_c_in_collect_is_a_line(fake: FakeServer, tmp_path: Path) -> None:
    fake.delay = 0.2
    state = tmp_path / "state.jsonl"
    command = ["collect", "--url", fake.url, "--task", "sums", "--n", "2", "--state", str(state)]
    status, said = interrupted(command, state)
    assert status == 130
    assert "Traceback" not in said
    assert said.splitlines()[-1] == "qsharp collect: stopped; the same command goes on from here"


def test_ctrl_c_in_train_saves_a_checkpoint_and_says_how_to_go_on(tmp_path: Path) -> None:
    models.write_reference(tmp_path / "base", "qwen2", sharpness=1.0)
    world.write(tmp_path / "data.parquet", world.rollouts(prompts=30, each=8))
    command = [
        "train", "--data", str(tmp_path / "data.parquet"), "--out", str(tmp_path / "out"),
        "--base", str(tmp_path / "base"), "--layers", "2", "--epochs", "40", "--lr", "1e-3", "--batch-tokens", "100",
        "--held-out", "0.2",
    ]  # fmt: skip
    run = tmp_path / "out" / ".runs" / "critic"
    status, said = interrupted(command, run / "metrics.jsonl")
    assert status == 130
    assert "Traceback" not in said
    line = said.splitlines()[-1]
    assert line.startswith("qsharp train: stopped after step ")
    assert line.endswith("the same command with --resume goes on from there")
    (checkpoint,) = run.glob("checkpoint-*")
    step = int(line.split()[5])
    assert int(checkpoint.name.removeprefix("checkpoint-")) == step
    assert cli.main([*command, "--resume", "--publish-anyway"]) == 0
    steps = [json.loads(x)["step"] for x in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in x]
    assert steps == list(range(1, len(steps) + 1))


def test_renamed_prompts_are_found_by_what_they_ask(
    fake: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    renamed = collected(fake, tmp_path).rename(tmp_path / "theirs.jsonl")
    reward = ["reward", "--workers", "1", "--url", fake.url, "--verifier", f"{HERE}:mentions"]
    assert cli.main([*reward, "--prompts", str(renamed)]) == 0
    stored = fake.stored()
    assert len(stored) == 30
    assert {one.reward for one in stored} == {0.0, 1.0}
    assert all(one.reward == float("a" in one.completion_text) for one in stored)
    # How many earned how much, and an example of each.
    said = capsys.readouterr().out
    for reward_given in (0.0, 1.0):
        texts = [" ".join(one.completion_text.split()) for one in stored if one.reward == reward_given]
        (shown,) = re.findall(rf"│ {reward_given:g} +│ {len(texts)} +│ (.*?) *│$", said, re.MULTILINE)
        assert any(shown in text for text in texts)


def test_what_the_model_says_alone_is_told_from_branches_and_guided_answers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = Rewarded(given=3, seen=3)
    for reward_given, own in ((1.0, True), (0.0, True), (0.25, False)):
        for tally in (result.tally, *([result.own] if own else [])):
            tally.add(Verdict(reward_given), ())
        result.values[reward_given] += 1
        result.examples[reward_given] = "text"
    reward_command._say(result, Console())
    said = " ".join(capsys.readouterr().out.split())
    assert "mean 0.4167 (0.5000 of the 2 whole answers of the model alone)" in said


def test_prompts_without_their_file_or_with_other_lines_are_told(
    fake: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    collected(fake, tmp_path)
    reward = ["reward", "--workers", "1", "--url", fake.url, "--verifier", f"{HERE}:mentions"]
    changed = prompts(tmp_path / "mine.jsonl", words="Say ")  # the same ids
    for flags in ([], ["--prompts", str(changed)]):
        assert cli.main([*reward, *flags]) == 1
        said = capsys.readouterr().err
        assert "completions could all not be judged" in said
        assert "of task 'mine' is in none of the tasks that were given: name its file with --prompts" in said
    assert all(one.reward is None for one in fake.stored())


def test_a_verifier_of_the_wrong_signature_is_refused_before_anything(
    fake: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    collected(fake, tmp_path)
    assert cli.main(["reward", "--workers", "1", "--url", fake.url, "--verifier", f"{HERE}:of_two"]) == 1
    said = capsys.readouterr().err
    assert "has the signature (prompt: str, completion: str) -> float" in said
    assert "must take one argument, the case" in said


def test_a_verifier_that_always_fails_is_given_up_and_its_first_failure_shown(
    fake: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = collected(fake, tmp_path)
    assert cli.main(["reward", "--workers", "1", "--url", fake.url, "--verifier", f"{HERE}:broken"]) == 1
    said = capsys.readouterr().err
    assert f"a completion could not be judged ({HERE}:broken: ValueError: no such column" in said
    assert "the first 20 completions could all not be judged" in said
    sampled = fake.posts["sample"]
    evaluate = ["evaluate", "--url", fake.url, "--prompts", str(file), "--split", "train", "--samples", "4"]
    more = ["--verifier", f"{HERE}:broken", "--eta", "0.1", "--out", str(tmp_path / "evaluation"), "--concurrency", "1"]
    assert cli.main([*evaluate, *more]) == 1
    assert fake.posts["sample"] - sampled < 10  # of 60: nothing is sampled for nothing


def test_reward_functions_of_trl_are_verifiers(fake: FakeServer, tmp_path: Path) -> None:
    file = collected(fake, tmp_path)
    assert (
        cli.main(
            ["reward", "--workers", "1", "--url", fake.url, "--verifier", f"{HERE}:as_trl", "--prompts", str(file)]
        )
        == 0
    )
    assert all(one.reward == float("a" in one.completion_text) for one in fake.stored())


def test_what_is_nothing_is_an_error(fake: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = collected(fake, tmp_path)
    out = tmp_path / "out.parquet"
    for command, message in (
        (["export", "--out", str(tmp_path / "out.csv")], "an export is a Parquet file, whatever its name says"),
        (["export", "--out", str(out), "--has-reward", "true"], "no stored rollout matches"),
        (["reward", "--verifier", f"{HERE}:mentions", "--metadata", "a=b"], "no stored rollout matches"),
    ):
        assert cli.main([*command, "--url", fake.url]) == 1
        assert message in capsys.readouterr().err
    assert not out.exists()
    # All of them judged already is no mistake.
    reward = ["reward", "--workers", "1", "--url", fake.url, "--verifier", f"{HERE}:mentions", "--prompts", str(file)]
    assert cli.main(reward) == 0
    assert cli.main(reward) == 0


def test_names_that_are_almost_right(fake: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = prompts(tmp_path / "mine.jsonl")
    state = ["--url", fake.url, "--state", str(tmp_path / "state")]
    for command, status, message in (
        (["colect"], 2, "no command 'colect'; did you mean 'collect'?"),
        (["collect", "--task", "sum", *state], 1, "known are .*did you mean 'sums'?"),
        (
            ["collect", "--prompts", str(file), "--split", "trian", *state],
            1,
            "splits train, test; got .trian.; did",
        ),
        (["collect", "--task", "sums", "--split", "heldout", *state], 1, "did you mean 'held_out'?"),
        (["collect", "--task", "sums", "--eta", "1", "--critic", "fke", *state], 1, "did you mean 'fake"),
        (["reward", "--verifier", "numerc", "--url", fake.url], 1, "did you mean 'numeric'?"),
    ):
        assert cli.main(command) == status
        assert re.search(message, capsys.readouterr().err), command
    with pytest.raises(SystemExit):
        cli.main(["collect", "--task", "sums", "--concurency", "3", *state])
    assert "--concurency 3; did you mean '--concurrency'?" in capsys.readouterr().err
