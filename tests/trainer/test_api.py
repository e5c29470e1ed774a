"""`import qsharp`: the commands as functions, with the commands' defaults, and typed answers."""

import asyncio
import inspect
import json
import re
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

import qsharp
from qsharp_core import cli
from tests.support import fake_server, models
from tests.support.fake_server import FakeServer
from trainer.api.base_model import base_of
from trainer.commands import collect, evaluate, export, reward, train
from trainer.experiments.experiment import Experiment
from trainer.experiments.files import RecipeError, load
from trainer.tasks.base import TaskError
from trainer.tasks.sources import task_from, task_of

SUMS = [f"What is {a} + {b} + {c}?\nAnswer:" for a in range(1, 5) for b in range(1, 4) for c in range(1, 3)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_reference(tmp_path_factory.mktemp("base"), "qwen2", sharpness=1.0)


@pytest.fixture
def fake(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    with fake_server.running(f"sqlite:///{tmp_path / 'rollouts.db'}") as server:
        server.root = str(base)
        monkeypatch.setenv("QSHARP_URL", server.url)
        yield server


def right(case: qsharp.Case) -> float:
    assert case.problem is not None
    return float(case.completion.endswith(f"is {case.problem.answer}."))


def rows() -> list[dict[str, Any]]:
    return [{"prompt": one, "answer": sum(int(x) for x in one if x.isdigit())} for one in SUMS]


def test_from_prompts_to_a_plot(fake: FakeServer, tmp_path: Path) -> None:
    """Verifiers are functions of this process, and prompts a list: nothing is a file that need not be one."""
    made = qsharp.collect(rows(), n=6, state=tmp_path / "state", max_tokens=48)
    assert made.made == 6 * len(SUMS)
    rewarded = qsharp.reward(right, prompts=rows())
    assert (rewarded.given, rewarded.tally.failed) == (made.made, 0)
    assert {one.rewards[0].source for one in fake.stored()} == {"right"}
    assert qsharp.export(tmp_path / "all.parquet", has_reward=True) == made.made
    version = qsharp.train(tmp_path / "all.parquet", out=tmp_path / "critics", name="mine", held_out=0.3, steps=120)
    assert (version.key, version.folder) == ("mine@1", tmp_path / "critics" / "mine" / "1")
    held_out = version.report.held_out
    assert held_out is not None
    assert held_out.overall.log_loss < (held_out.overall.log_loss_constant or 0)
    assert (version.run / "learning-curve.png").is_file()
    client = qsharp.Client()
    assert client.load_critic(version.folder).id == "mine@1"
    assert {one.id for one in client.critics()} == {"fake@1", "mine@1"}
    report = qsharp.evaluate(rows(), eta=[0.1, 0.3], samples=2, verifier=right, max_tokens=48, out=tmp_path / "out")
    assert [(one.method, one.eta) for one in report.results] == [
        ("reference", None), ("qsharp", 0.1), ("qsharp", 0.3),
    ]  # fmt: skip
    assert not report.graded
    assert report.results[0].majority is None  # of free texts
    assert (tmp_path / "out" / "report.png").is_file()


def test_an_evaluation_takes_more_samples_later_and_keeps_those_it_has(fake: FakeServer, tmp_path: Path) -> None:
    def evaluated(samples: int) -> tuple[int, list[list[str]]]:
        before = fake.posts["sample"]
        report = qsharp.evaluate(
            rows(), eta=0.1, critic="fake@1", samples=samples, verifier=right, max_tokens=48, out=tmp_path
        )
        assert {one.n for one in report.results} == {samples * report.results[0].problems}
        entries = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()[1:]]
        return fake.posts["sample"] - before, [[one["text"] for one in entry["samples"]] for entry in entries]

    asked, few = evaluated(2)
    again, _ = evaluated(2)
    more, all_of_them = evaluated(5)
    fewer, _ = evaluated(3)
    assert (again, more, fewer) == (0, asked, 0)
    assert all_of_them[: len(few)] == few
    assert [len(texts) for texts in all_of_them[len(few) :]] == [3] * len(few)
    assert [texts[:2] for texts in all_of_them[len(few) :]] != few  # not the same ones again


def test_functions_run_in_a_notebooks_loop(fake: FakeServer, tmp_path: Path) -> None:
    async def cell() -> list[str]:
        qsharp.collect(SUMS[:2], state=tmp_path / "state", max_tokens=9)
        assert base_of(None, fake.url, None) == fake.root  # what training asks the server for
        return qsharp.Client().complete(SUMS[0], seed=1, n=2).texts

    assert len(asyncio.run(cell())) == 2
    assert len(fake.stored()) == 2


def test_a_client_has_typed_answers(fake: FakeServer) -> None:
    client = qsharp.Client(fake.url)
    answer = client.complete(SUMS[0], eta=0.1, guidance={"critic": "fake@1"}, n=3, seed=5)
    assert len(answer.choices) == 3
    assert all(one.guidance is not None and one.guidance.kl > 0 for one in answer.choices)
    assert fake.seen[-1]["guidance"] == {"critic": "fake@1"}
    assert (fake.seen[-1]["eta"], fake.seen[-1]["model"]) == (0.1, "fake")
    client.complete(SUMS[0], guidance={"kl_total": 2.0})
    assert "eta" not in fake.seen[-1]  # the server takes the critic's
    client.complete(SUMS[0], guidance={"detail": "tokens"})
    assert fake.seen[-1]["eta"] is None
    chat = client.chat("Hello!", seed=1)
    assert chat.texts == [chat.choices[0].text] != [""]
    assert fake.seen[-1]["messages"] == [{"role": "user", "content": "Hello!"}]
    assert qsharp.score(SUMS[0], "ab", url=fake.url) == [[0.5, pytest.approx(0.25, abs=0.2)]]
    with pytest.raises(qsharp.QSharpError, match="cannot be reached"):
        qsharp.Client("http://127.0.0.1:9", patience=0).critics()


COMMANDS: list[tuple[Callable[..., Any], Any]] = [
    (qsharp.collect, collect), (qsharp.reward, reward), (qsharp.evaluate, evaluate), (qsharp.export, export),
    (qsharp.train, train),
]  # fmt: skip


@pytest.mark.parametrize(("function", "command"), COMMANDS, ids=[one.__name__ for one, _ in COMMANDS])
def test_functions_have_the_commands_defaults(
    function: Callable[..., Any], command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parser that the command makes is looked at when it parses."""
    seen: list[ArgumentParser] = []

    def parse(self: ArgumentParser, *_: object) -> None:
        seen.append(self)
        raise SystemExit

    for name in ("QSHARP_URL", "QSHARP_API_KEY", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ArgumentParser, "parse_args", parse)
    with pytest.raises(SystemExit):
        command.main([])
    parameters = inspect.signature(function).parameters
    shared = 0
    for action in seen[0]._actions:
        if action.dest in parameters and not action.required and action.dest not in ("url", "prompts"):
            default, ours = action.default, parameters[action.dest].default
            # No names, an empty list and None all say that nothing was named; the functions fill these in.
            assert (default or None) == (ours or None) or action.dest in ("out", "name"), action.dest
            shared += 1
    assert shared >= 5


def test_import_qsharp_loads_neither_torch_nor_the_trainer() -> None:
    code = "import qsharp, sys; qsharp.QSharpError; assert not {'torch', 'trainer'} & sys.modules.keys(); dir(qsharp)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(AttributeError, match="no attribute 'colect'"):
        _ = qsharp.colect


def test_urls_and_keys_come_from_the_environment_or_stand_anywhere(
    fake: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QSHARP_API_KEY", "secret")
    common = ["--task", "sums", "--limit", "1", "--max-tokens", "4"]
    assert cli.main(["collect", *common, "--state", str(tmp_path / "a")]) == 0
    monkeypatch.setenv("QSHARP_URL", "http://127.0.0.1:9")
    at = ["--url", fake.url]
    ways = ([*at, "collect"], [f"--url={fake.url}", "--api-key", "x", "collect"], ["collect", *at])
    for number, command in enumerate(ways):
        assert cli.main([*command, *common, "--seed", str(number + 1), "--state", str(tmp_path / str(number))]) == 0
    assert len(fake.stored()) == 4
    for critics in ([*at, "critics"], ["critics", *at], ["critics", "list", *at]):
        assert cli.main(critics) == 0
        assert "cannot be reached" not in capsys.readouterr().err
    assert cli.main([*at, "critics", "score", "fake", SUMS[0], "ab"]) == 0
    assert re.fullmatch(r"0\.5000  'a'\n0\.\d{4}  'b'\n", capsys.readouterr().out)
    assert cli.main(["critics"]) == 1
    assert "http://127.0.0.1:9 cannot be reached" in capsys.readouterr().err


def test_prompts_come_from_data_sets_and_lists(tmp_path: Path) -> None:
    chat = [[{"role": "user", "content": text}] for text in ("a", "b")]
    data = Dataset.from_dict({"prompt": chat, "word": ["x", "y"]})
    task, spec = task_from(data)
    problems = task.of_split("train")
    assert spec is None
    assert [(one.id, one.data["word"]) for one in problems] == [("1", "x"), ("2", "y")]
    assert problems[0].request() == ("/v1/chat/completions", {"messages": chat[0]})
    task, _ = task_from(DatasetDict({"train": data, "test": data.select([1])}))
    assert task.splits == ("train", "test")
    assert len(task.of_split("test")) == 1
    task, _ = task_from(["one", {"prompt": [1, 2], "split": "b"}])
    assert [one.prompt for one in task.of_split("b")] == ["one", [1, 2]]
    # A folder of data files is a data set, too; so would be a name of the hub.
    folder = tmp_path / "data"
    folder.mkdir()
    data.to_json(folder / "train.jsonl")
    task = task_of(None, str(folder))
    assert task.splits == ("train",)
    assert [one.data["word"] for one in task.of_split("train")] == ["x", "y"]
    Dataset.from_dict({"question": ["a"]}).to_json(folder / "train.jsonl")
    with pytest.raises(TaskError, match="neither a column prompt nor messages, but question"):
        task_of(None, str(folder)).of_split("train")
    with pytest.raises(TaskError, match="got a int"):
        task_from(3)  # type: ignore[arg-type]


def test_recipes_take_prompts_and_a_verifier(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('kind = "experiment"\nprompts = "mine.jsonl"\nverifier = "mine:good"\n')
    settings = load(str(recipe)).settings
    assert isinstance(settings, Experiment)
    assert (settings.prompts, settings.verifiers, settings.critic.backbone) == (
        "mine.jsonl",
        ("mine:good",),
        "reference",
    )
    with pytest.raises(RecipeError, match="name either task or prompts"):
        load(str(recipe), ["task=sums"])
    with pytest.raises(RecipeError, match="not both"):
        load(str(recipe), ['verifiers=["a"]'])
