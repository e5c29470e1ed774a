"""`qsharp collect`: every item once, whatever breaks; labels of roll-outs; the journal."""

import asyncio
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qsharp_core import cli
from tests.support import fake_server
from tests.support.fake_server import FakeServer
from trainer.commands import collect as collect_command
from trainer.rollouts import journal, retrying
from trainer.rollouts.client import ServerClient
from trainer.rollouts.collect import CollectError, collect
from trainer.rollouts.collection import Collection, cut_of, items_of, seed_of
from trainer.rollouts.errors import RequestError
from trainer.rollouts.journal import Journal, JournalError
from trainer.rollouts.parameters import GuidanceParameters, SamplingParameters
from trainer.tasks.base import Problem, Task, TaskError
from trainer.tasks.registry import find_task

SUMS = find_task("sums")
UNGUIDED = Collection(
    task="sums",
    split="train",
    model="fake",
    samples=2,
    sampling=SamplingParameters(max_tokens=48, stop=("\n",)),
    limit=10,
)
ROLLED = Collection(
    **{**{name: getattr(UNGUIDED, name) for name in UNGUIDED.__dataclass_fields__},
       "guidance": GuidanceParameters(eta=0.1, critic="fake@1", candidates=8), "roll_in": True, "round": 1}
)  # fmt: skip


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeServer]:
    with fake_server.running(f"sqlite:///{tmp_path / 'rollouts.db'}") as server:
        yield server


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "_backoff", lambda state: 0.01)


def run(fake: FakeServer, state: Path, collection: Collection = UNGUIDED, task: Task = SUMS, **options: Any) -> Any:
    async def go() -> Any:
        async with ServerClient(fake.url, connections=8, patience=options.pop("patience", 20.0)) as server:
            return await collect(server, task, collection, state, concurrency=8)

    return asyncio.run(go())


def by_item(fake: FakeServer) -> dict[str, Any]:
    """What was sampled, by item; fails if an item is there twice."""
    found = {}
    for one in fake.stored():
        assert one.metadata["qsharp_item"] not in found
        found[one.metadata["qsharp_item"]] = (
            one.prompt_token_ids,
            one.completion_token_ids,
            one.first_valid_position,
            one.cut,
            one.metadata["qsharp_problem"],
        )
    return found


# -- what is collected


def test_an_unguided_round(fake: FakeServer, tmp_path: Path) -> None:
    result = run(fake, tmp_path / "state")
    assert (result.wanted, result.made, result.before, result.found) == (20, 20, 0, 0)
    stored = fake.stored()
    assert Counter(one.metadata["qsharp_problem"] for one in stored) == Counter(
        {problem.id: 2 for problem in SUMS.of_split("train")[:10]}
    )
    assert all(one.first_valid_position == 0 and one.eta is None for one in stored)
    assert {one.metadata["qsharp_round"] for one in stored} == {"0"}
    assert result.tokens == sum(len(one.completion_token_ids) for one in stored)
    for body in fake.seen:
        # All of the policy, so that no default of the server's changes it.
        assert (body["temperature"], body["top_p"], body["top_k"], body["max_tokens"]) == (1.0, 1.0, 0, 48)
        assert body["eta"] is None
        assert body["stop"] == ["\n"]
        assert body["seed"] == seed_of(body["metadata"]["qsharp_item"])
    assert len({body["seed"] for body in fake.seen}) == 20


def test_a_rolled_in_round(fake: FakeServer, tmp_path: Path) -> None:
    result = run(fake, tmp_path / "state", ROLLED)
    assert (result.wanted, result.made, result.too_short) == (20, 40, 0)
    stored = {one.id: one for one in fake.stored()}
    parents = [one for one in stored.values() if one.eta is not None]
    outs = [one for one in stored.values() if one.eta is None]
    assert (len(parents), len(outs)) == (20, 20)
    assert all(one.first_valid_position is None for one in parents)
    for one in outs:
        assert one.parent_id is not None
        assert one.cut is not None
        parent = stored[one.parent_id]
        assert one.metadata["qsharp_item"].removesuffix(":out") == parent.metadata["qsharp_item"].removesuffix(":in")
        assert 1 <= one.cut < len(parent.completion_token_ids)
        assert one.completion_token_ids[: one.cut] == parent.completion_token_ids[: one.cut]
        # The token at the cut is the guided policy's; all after it are the reference's.
        assert one.first_valid_position == one.cut - 1
        assert len(one.completion_token_ids) <= 48
    for body in fake.seen:
        if body["eta"] is not None:
            assert body["guidance"] == {"critic": "fake@1", "method": "qsharp", "candidates": 8}


def test_cuts_are_uniform_and_stay_within() -> None:
    length, draws = 6, 20_000
    counts = Counter(cut_of(f"key {i}", length) for i in range(draws))
    assert set(counts) == set(range(1, length))
    expected = draws / (length - 1)
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 18.5  # chi-square, 4 degrees, p = 0.001
    assert cut_of("key", 2) == 1


def test_a_completion_of_one_token_is_not_cut(fake: FakeServer, tmp_path: Path) -> None:
    task = Task(name="letters", splits=("all",), problems=lambda _: [Problem(id="a", prompt="say")])
    fields = {name: getattr(ROLLED, name) for name in ROLLED.__dataclass_fields__}
    short = Collection(
        **{**fields, "task": "letters", "split": "all", "sampling": SamplingParameters(max_tokens=1), "limit": None}
    )
    assert run(fake, tmp_path / "state", short, task).too_short == 2
    assert len(fake.stored()) == 2  # the parents
    again = run(fake, tmp_path / "state", short, task)
    assert (again.before, again.made, again.too_short) == (2, 0, 0)


def test_chat_problems_roll_in_on_the_chat_route(fake: FakeServer, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hello"}]
    task = Task(name="talk", splits=("all",), problems=lambda _: [Problem(id="a", messages=messages)])
    fields = {name: getattr(ROLLED, name) for name in ROLLED.__dataclass_fields__}
    run(fake, tmp_path / "state", Collection(**{**fields, "task": "talk", "split": "all", "samples": 4}), task)
    assert {(one.route, one.eta) for one in fake.stored()} == {("chat", 0.1), ("completion", None)}


BRANCHING = Collection(**{**{name: getattr(UNGUIDED, name) for name in UNGUIDED.__dataclass_fields__}, "branches": 3})


def test_branches_leave_rollouts_where_the_model_is_unsure(fake: FakeServer, tmp_path: Path) -> None:
    result = run(fake, tmp_path / "state", BRANCHING)
    assert (result.wanted, result.made, result.failed) == (50, 50, {})
    stored = {one.id: one for one in fake.stored()}
    branches = [one for one in stored.values() if one.parent_id is not None]
    assert Counter(one.metadata["qsharp_problem"] for one in branches) == Counter(
        {problem.id: 3 for problem in SUMS.of_split("train")[:10]}
    )
    changed = 0
    for one in branches:
        assert one.parent_id is not None
        assert one.cut is not None
        parent, at = stored[one.parent_id], one.cut - 1
        assert parent.parent_id is None
        assert parent.metadata["qsharp_problem"] == one.metadata["qsharp_problem"]
        assert one.completion_token_ids[:at] == parent.completion_token_ids[:at]
        assert chr(parent.completion_token_ids[at]).isdigit()  # it is sure of all else
        assert chr(one.completion_token_ids[at]) in "01234567"  # the eight likeliest
        assert one.first_valid_position == at
        assert len(one.completion_token_ids) <= 48
        changed += one.completion_token_ids[at] != parent.completion_token_ids[at]
    assert changed > len(branches) / 2
    # What else might have been drawn is known from the sampling.
    assert not any(body.get("prompt_logprobs") for body in fake.seen)
    assert len(by_item(fake)) == 50


def test_more_branches_go_on_from_what_there_is_and_faults_change_nothing(fake: FakeServer, tmp_path: Path) -> None:
    run(fake, tmp_path / "state")
    rng = random.Random(0)
    fake.faults.extend(rng.choice([None, None, 429, 503, "lost", "dropped"]) for _ in range(60))
    result = run(fake, tmp_path / "state", BRANCHING)
    assert (result.before, result.made + result.found) == (20, 30)
    # Parents that another run sampled are looked at, and nothing of that is stored.
    looked = {tuple(body["prompt"]) for body in fake.seen if body.get("prompt_logprobs")}
    parents = [fake.store.get(one.parent_id, owner=None) for one in fake.stored() if one.parent_id is not None]
    assert looked == {(*one.prompt_token_ids, *one.completion_token_ids) for one in parents if one is not None}
    assert len(by_item(fake)) == 50
    with fake_server.running(f"sqlite:///{tmp_path / 'other.db'}") as other:
        run(other, tmp_path / "other-state", BRANCHING)
        assert by_item(fake) == by_item(other)


def test_where_the_model_is_sure_of_everything_nothing_branches(fake: FakeServer, tmp_path: Path) -> None:
    task = Task(name="letters", splits=("all",), problems=lambda _: [Problem(id="a", prompt="say")])
    fields = {name: getattr(BRANCHING, name) for name in BRANCHING.__dataclass_fields__}
    letters = Collection(**{**fields, "task": "letters", "split": "all", "limit": None})
    result = run(fake, tmp_path / "state", letters, task)
    assert (result.made, result.no_way_out) == (2, 3)
    assert run(fake, tmp_path / "state", letters, task).before == 5


def test_a_branch_whose_parent_failed_is_tried_again(fake: FakeServer, tmp_path: Path) -> None:
    fake.refuse = lambda body: str(body["prompt"]).endswith("What is 1 + 1 + 2?\nAnswer:")
    result = run(fake, tmp_path / "state", BRANCHING)
    assert len(result.failed) == 5
    fake.refuse = lambda body: False
    result = run(fake, tmp_path / "state", BRANCHING)
    assert (result.before, result.made, result.failed) == (45, 5, {})


def test_more_samples_and_problems_go_on_from_what_there_is(fake: FakeServer, tmp_path: Path) -> None:
    run(fake, tmp_path / "state")
    fields = {name: getattr(UNGUIDED, name) for name in UNGUIDED.__dataclass_fields__}
    result = run(fake, tmp_path / "state", Collection(**{**fields, "samples": 3, "limit": 12}))
    assert (result.wanted, result.before, result.made) == (36, 20, 16)
    assert len(by_item(fake)) == 36


def test_items_follow_from_what_is_asked() -> None:
    problems = [Problem(id="1", prompt="a"), Problem(id="2", prompt="b")]
    keys = [item.key for item in items_of(UNGUIDED, problems)]
    assert len(set(keys)) == 4
    assert keys == [item.key for item in items_of(UNGUIDED, problems)]
    changed = [Problem(id="1", prompt="a"), Problem(id="2", prompt="c")]
    assert [a == b.key for a, b in zip(keys, items_of(UNGUIDED, changed), strict=True)] == [True, False, True, False]


# -- what breaks


def test_passing_errors_are_tried_again(fake: FakeServer, tmp_path: Path) -> None:
    fake.faults.extend([429, 503, "dropped", 502, 500, 504] * 3)
    result = run(fake, tmp_path / "state")
    assert result.retries == 18
    assert len(by_item(fake)) == 20
    assert not result.failed


def test_a_lost_answer_is_found_in_the_store(fake: FakeServer, tmp_path: Path) -> None:
    fake.faults.extend(["lost"] * 7)
    result = run(fake, tmp_path / "state", ROLLED)
    assert (result.found, result.made) == (7, 33)
    assert len(by_item(fake)) == 40


def test_faults_change_nothing_of_the_result(fake: FakeServer, tmp_path: Path) -> None:
    rng = random.Random(0)
    fake.faults.extend(rng.choice([None, None, 429, 503, "lost", "dropped"]) for _ in range(60))
    run(fake, tmp_path / "state", ROLLED)
    broken = by_item(fake)
    with fake_server.running(f"sqlite:///{tmp_path / 'other.db'}") as other:
        run(other, tmp_path / "other-state", ROLLED)
        assert broken == by_item(other)


def test_an_item_that_fails_is_noted_and_tried_again_by_the_next_run(fake: FakeServer, tmp_path: Path) -> None:
    fake.refuse = lambda body: str(body["prompt"]).endswith("What is 1 + 1 + 2?\nAnswer:")
    result = run(fake, tmp_path / "state")
    assert (result.made, len(result.failed)) == (18, 2)
    assert all("problem 1+1+2" in text and "400: too long" in text for text in result.failed.values())
    fake.refuse = lambda body: False
    result = run(fake, tmp_path / "state")
    assert (result.before, result.made, result.failed) == (18, 2, {})


def test_when_everything_fails_it_ends(fake: FakeServer, tmp_path: Path) -> None:
    fake.refuse = lambda body: True
    with pytest.raises(RequestError, match="400: too long"):
        run(fake, tmp_path / "state")
    assert fake.posts["sample"] < 30


def test_a_request_that_always_answers_500_is_given_up(fake: FakeServer, tmp_path: Path) -> None:
    fake.faults.extend([500] * 4)
    fields = {name: getattr(UNGUIDED, name) for name in UNGUIDED.__dataclass_fields__}
    result = run(fake, tmp_path / "state", Collection(**{**fields, "samples": 1, "limit": 1}))
    assert (result.made, len(result.failed), result.retries) == (0, 1, 3)


def test_patience_ends(tmp_path: Path) -> None:
    async def go() -> None:
        async with ServerClient("http://127.0.0.1:9", patience=0.2) as server:
            await server.model()

    with pytest.raises(RequestError, match="cannot be reached"):
        asyncio.run(go())


def test_wrong_urls_are_told_at_once(tmp_path: Path) -> None:
    async def go(url: str) -> None:
        async with ServerClient(url, patience=60) as server:
            await server.model()

    for url in ("localhost:8000", "ftp://x", "http://x:port", "nonsense"):
        with pytest.raises(RequestError):
            asyncio.run(go(url))


# -- the journal


def test_a_new_journal_adopts_what_the_store_has(fake: FakeServer, tmp_path: Path) -> None:
    run(fake, tmp_path / "state", ROLLED)
    before = by_item(fake)
    (tmp_path / "state").unlink()
    result = run(fake, tmp_path / "state", ROLLED)
    assert (result.before, result.made) == (20, 0)
    assert by_item(fake) == before


def test_a_journal_that_a_crashed_machine_cut_anywhere_goes_on(fake: FakeServer, tmp_path: Path) -> None:
    state = tmp_path / "state"
    run(fake, state, ROLLED)
    before, boot = by_item(fake), journal.boot()
    assert boot is not None
    whole = state.read_bytes().replace(boot.encode(), b"before the crash")
    rng = random.Random(1)
    for at in [0, whole.index(b"\n"), whole.index(b"\n") + 1, *(rng.randrange(len(whole)) for _ in range(6))]:
        state.write_bytes(whole[:at])
        assert run(fake, state, ROLLED).made == 0
        assert by_item(fake) == before


def test_a_journal_that_was_killed_goes_on(fake: FakeServer, tmp_path: Path) -> None:
    state = tmp_path / "state"
    run(fake, state, ROLLED)
    before, lines = by_item(fake), state.read_bytes().splitlines(keepends=True)
    done = [line for line in lines if b'"done"' in line]
    state.write_bytes(b"".join(line for line in lines if line not in done[::2]) + b'{"done":"torn')
    result = run(fake, state, ROLLED)
    assert result.made == 0
    assert result.found > 5
    assert by_item(fake) == before


def test_a_journal_of_other_work_is_refused(fake: FakeServer, tmp_path: Path) -> None:
    run(fake, tmp_path / "state")
    with pytest.raises(JournalError, match="roll_in was False, is True"):
        run(fake, tmp_path / "state", ROLLED)


def test_two_processes_cannot_share_a_journal(tmp_path: Path) -> None:
    with Journal(tmp_path / "state", {"a": 1}), pytest.raises(JournalError, match="in use"):
        Journal(tmp_path / "state", {"a": 1})
    (tmp_path / "other").write_text("hello\n")
    with pytest.raises(JournalError, match="not a journal"):
        Journal(tmp_path / "other", {"a": 1})


def test_a_journal_survives_texts_of_all_kinds(tmp_path: Path) -> None:
    entries = [{"text": text} for text in ("\r\n", "\u2028", "\x85", "é", "\ud800")]
    with Journal(tmp_path / "state", {}) as opened:
        for entry in entries:
            opened.add(entry)
    with Journal(tmp_path / "state", {}) as opened:
        assert opened.entries == entries


# -- the command


def test_the_command(fake: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        '{"prompt": "one"}\n{"id": "b", "messages": [{"role": "user", "content": "two"}], "answer": 3}\n'
    )
    arguments = ["--url", fake.url + "/v1/", "--prompts", str(prompts), "--n", "3", "--max-tokens", "5", "--top-k", "7"]
    assert cli.main(["collect", *arguments, "--state", str(tmp_path / "state")]) == 0
    assert "6 completions sampled" in " ".join(capsys.readouterr().err.split())
    assert Counter(one.metadata["qsharp_problem"] for one in fake.stored()) == {"1": 3, "b": 3}
    assert {one.sampling.top_k for one in fake.stored()} == {7}
    assert cli.main(["collect", *arguments, "--eta", "0.1", "--roll-in", "--state", str(tmp_path / "next")]) == 0
    assert {body["guidance"]["critic"] for body in fake.seen if body["eta"]} == {"fake@1"}
    fake.refuse = lambda body: True
    assert cli.main(["collect", *arguments, "--seed", "1", "--state", str(tmp_path / "third")]) == 1
    assert "6 of 6 items failed" in capsys.readouterr().err


def test_wrong_commands_are_told(fake: FakeServer, tmp_path: Path) -> None:
    state = ["--state", str(tmp_path / "state"), "--url", fake.url]
    for arguments, kind, message in (
        (["--task", "sums", "--roll-in"], CollectError, "needs --eta"),
        ([], TaskError, "either --task or --prompts"),
        (["--task", "nothing"], TaskError, "known are .*sums"),
        (["--task", "json:loads"], TaskError, "not a trainer.tasks.base.Task"),
        (["--task", "no_such_module:x"], TaskError, "cannot be loaded"),
        (["--task", "sums", "--split", "test"], TaskError, "splits train, held_out"),
        (["--task", "sums", "--eta", "1", "--critic", "other"], RequestError, "loaded are fake@1"),
        (["--prompts", str(tmp_path / "missing")], TaskError, "cannot be read"),
    ):
        with pytest.raises(kind, match=message):
            collect_command.main([*arguments, *state])


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "Expecting"), ('{"id": 1}', "either prompt or messages"), ('{"prompt": "a", "messages": []}', "either")],
)
def test_wrong_lines_are_told(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n\n' + line)
    with pytest.raises(TaskError, match=f"line 3: .*{message}"):
        collect_command.main(["--prompts", str(path), "--state", str(tmp_path / "state")])


def test_killed_again_and_again_it_ends_with_an_unbroken_run_s_result(fake: FakeServer, tmp_path: Path) -> None:
    rng = random.Random(0)
    fake.delay = 0.05
    state = tmp_path / "state"
    command = [
        str(Path(sys.executable).parent / "qsharp"), "collect", "--url", fake.url, "--task", "sums", "--n", "2",
        "--limit", "40", "--eta", "0.1", "--roll-in", "--round", "1", "--concurrency", "4", "--state", str(state),
    ]  # fmt: skip
    kills = 0
    for _ in range(100):
        if kills < 6:
            fake.faults.extend(rng.choice([None, None, None, "lost", 503]) for _ in range(4))
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        before, deadline = len(fake.seen), time.monotonic() + 30
        while process.poll() is None and len(fake.seen) == before and time.monotonic() < deadline:
            time.sleep(0.005)
        if kills < 6 and process.poll() is None:
            time.sleep(rng.random() * 0.4)
            process.send_signal(signal.SIGKILL)
            kills += 1
        _, errors = process.communicate(timeout=60)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors.decode()
    assert kills >= 3
    broken = by_item(fake)
    assert len(broken) == 160
    run_id = {one.metadata["qsharp_run"] for one in fake.stored()}
    assert len(run_id) == 1
    done = [json.loads(line) for line in state.read_text().splitlines()]
    assert len({entry["done"] for entry in done if "done" in entry}) == 160
    fake.delay = 0.0
    with fake_server.running(f"sqlite:///{tmp_path / 'other.db'}") as other:
        command[command.index(fake.url)], command[-1] = other.url, str(tmp_path / "other-state")
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        assert broken == by_item(other)
