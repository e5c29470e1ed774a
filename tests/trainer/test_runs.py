"""The command as a user runs it: versions, refusals, kills, processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qsharp_core.cli import main
from qsharp_core.critic import checkpoint
from tests.support import models
from tests.support import trainer_data as world
from tests.support.object_store import object_store
from trainer.training.optimisation import warmup_cosine
from trainer.training.publish import latest, publish, versions
from trainer.training.run import Run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model and rollouts."""
    root = tmp_path_factory.mktemp("place")
    models.write_reference(root / "base", "qwen2", sharpness=1.0)
    world.write(root / "data.parquet", world.rollouts(prompts=30, each=8))
    return root


def arguments(place: Path, out: Path, *more: str) -> list[str]:
    """A small run: 2 of 3 layers, 3 epochs of about 20 steps."""
    return [
        "train", "--data", str(place / "data.parquet"), "--out", str(out), "--base", str(place / "base"),
        "--layers", "2", "--epochs", "3", "--lr", "1e-3", "--batch-tokens", "100", "--held-out", "0.2",
        "--publish-anyway", *more,
    ]  # fmt: skip


def lines(run: Path, kind: str = "loss") -> list[Any]:
    return [x[kind] for x in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if kind in x]


def weights(version: Path) -> dict[str, torch.Tensor]:
    return load_file(version / "backbone" / "model.safetensors") | {
        f"head.{k}": v for k, v in load_file(version / "head.safetensors").items()
    }


def assert_same(a: Path, b: Path) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.fixture(scope="module")
def unbroken(place: Path) -> Path:
    """A run's output folder."""
    out = place / "unbroken"
    assert main(arguments(place, out)) == 0
    return out


def test_a_version_has_its_card_and_loads(place: Path, unbroken: Path) -> None:
    card, critic = checkpoint.load(unbroken / "critic" / "1")
    assert len(critic.backbone.layers) == 2
    assert (card.key, card.head, card.distribution.kind) == ("critic@1", "V", "bernoulli")
    assert card.tokenizer_fingerprint == checkpoint.fingerprint(models.tokenizer())
    extra = card.model_extra or {}
    assert extra["sampling_policy"] == {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    assert extra["data"]["read"] == 240
    assert extra["data"]["train_rollouts"] + extra["data"]["held_out_rollouts"] == 240
    assert extra["metrics"]["overall"]["log_loss"] < 0.7
    assert str(place) not in card.model_dump_json()  # nothing of the machine
    losses = lines(unbroken / ".runs" / "critic")
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # an untrained head knows nothing
    assert sum(losses[-5:]) < sum(losses[:5])
    assert not list((unbroken / ".runs" / "critic").glob("checkpoint-*"))


def test_passes_and_parents(place: Path, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A step in four passes is the same step; and the next version is measured against the one before."""
    single, many = tmp_path / "single", tmp_path / "many"
    assert main(arguments(place, single, "--no-share-prefixes", "--epochs", "1")) == 0
    assert main(arguments(place, many, "--no-share-prefixes", "--epochs", "1", "--grad-accumulation", "4")) == 0
    assert lines(many / ".runs" / "critic") == pytest.approx(lines(single / ".runs" / "critic"), rel=1e-4)
    # On from a version, in bfloat16, under the same name.
    more = ["--epochs", "1", "--dtype", "bf16", "--recommended-eta", "0.2", "--tensorboard", str(tmp_path / "board")]
    parent = unbroken / "critic" / "1"
    given = arguments(place, single, *more)
    del given[given.index("--base") : given.index("--epochs")]  # a continued critic has its own
    assert main([*given, "--continue", str(parent)]) == 0
    card = checkpoint.read_card(single / "critic" / "2")
    extra = card.model_extra or {}
    assert (extra["parent"], card.recommended_eta, extra["base"]) == ("critic@1", 0.2, "base")
    assert extra["compared_with"]["comparison"]["by"] == "log_loss"
    difference = extra["compared_with"]["held_out"]["log_loss"] - extra["metrics"]["overall"]["log_loss"]
    assert extra["compared_with"]["comparison"]["improvement"] == pytest.approx(difference)
    assert extra["compared_with"]["held_out"]["log_loss"] == pytest.approx(
        checkpoint.read_card(parent).model_extra["metrics"]["overall"]["log_loss"]  # type: ignore[index]
    )
    assert {p.dtype for p in weights(single / "critic" / "2").values()} == {torch.bfloat16}
    assert list((tmp_path / "board" / "critic-2").glob("events*"))
    assert "critic@1: log loss better by" in capsys.readouterr().out


def test_borrowed_embeddings_are_neither_trained_nor_stored(place: Path, tmp_path: Path) -> None:
    assert (
        main(arguments(place, tmp_path, "--borrow-embeddings", "--epochs", "1", "--name", "light", "--head", "Q")) == 0
    )
    folder = tmp_path / "light" / "1"
    assert "embed_tokens.weight" not in weights(folder)
    _, critic = checkpoint.load(folder, reference=place / "base")
    assert torch.equal(critic.backbone.embed_tokens.weight, checkpoint.input_embeddings(place / "base"))
    again = [*arguments(place, tmp_path, "--epochs", "1"), "--continue", str(folder)]
    del again[again.index("--layers") : again.index("--layers") + 2]
    assert main(again) == 0
    assert checkpoint.read_card(tmp_path / "light" / "2").borrow == ["input_embeddings"]


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--layers", "9"], "3 layers, --layers asks for 9"),
        (["--epochs", "0"], "--epochs"),
        (["--distribution", "categorical"], "needs --atoms"),
        (["--distribution", "categorical", "--atoms", "1", "0"], "must ascend"),
        (["--continue", "x", "--head", "Q", "--name", "c"], "--layers is the continued critic's own"),
        (["--base", "no/where-at-all/model"], "neither a folder nor a model"),
        (["--data", "nothing.parquet"], "cannot be read"),
    ],
)
def test_mistakes_are_named(
    place: Path, tmp_path: Path, more: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(place, tmp_path, *more)) == 1
    assert complaint in capsys.readouterr().err


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    """The command in a process of its own, one thread as here."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "trainer.training", *arguments[1:]]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(place: Path, unbroken: Path, tmp_path: Path) -> None:
    given = arguments(place, tmp_path, "--checkpoint-every", "7", "--resume")
    run = tmp_path / ".runs" / "critic"
    total = len(lines(unbroken / ".runs" / "critic"))
    for kill_at in (total // 4, total // 2):
        process = start(given)
        deadline = time.monotonic() + 120
        while (
            process.poll() is None
            and time.monotonic() < deadline
            and (not (run / "metrics.jsonl").is_file() or len(lines(run)) < kill_at)
        ):
            time.sleep(0.002)
        assert process.poll() is None, "it was over before it could be killed"
        process.send_signal(signal.SIGKILL)
        assert time.monotonic() < deadline
        process.wait()
    before = len(lines(run))
    assert before < total
    assert not (tmp_path / "critic").exists()
    # Without --resume an unfinished run is not thrown away.
    assert main(given[:-1]) == 1
    # As of a kill in the middle of a line, and of a checkpoint.
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9')
    (run / ".checkpoint-00000099.tmp").mkdir()
    torch.set_num_threads(1)
    assert main(given) == 0
    assert_same(tmp_path / "critic" / "1", unbroken / "critic" / "1")
    assert lines(run) == lines(unbroken / ".runs" / "critic")
    assert lines(run, "held_out") == lines(unbroken / ".runs" / "critic", "held_out")
    # A finished run is finished.
    assert main(given) == 0
    assert [p.name for p in (tmp_path / "critic").iterdir()] == ["1"]
    # And it is not gone on with under other settings.
    assert main([*given, "--seed", "1"]) == 1


def test_a_run_publishes_once(unbroken: Path, tmp_path: Path) -> None:
    card, critic = checkpoint.load(unbroken / "critic" / "1")
    fields = card.model_dump(exclude={"version", "run"})

    def save(folder: Path, card: checkpoint.CriticCard) -> None:
        checkpoint.save(folder, card, critic)

    first = publish(tmp_path, fields, save, "run-a", tmp_path)
    assert publish(tmp_path, fields, save, "run-b", tmp_path).name == "2"
    assert publish(tmp_path, fields, save, "run-a", tmp_path) == first == tmp_path / "critic" / "1"
    (tmp_path / "critic" / "10").mkdir()  # no card: somebody's rubbish, not a version
    assert publish(tmp_path, fields, save, "run-c", tmp_path).name == "3"


def test_working_files_of_versions_in_a_store_stay_here(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the next version is measured against the one before, which is fetched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QSHARP_CRITIC_CACHE_FOLDER", str(tmp_path / "cache"))
    with object_store() as store:
        given = [*arguments(place, tmp_path, "--epochs", "1", "--name", "sums")]
        given[given.index("--out") + 1] = str(store.root)
        assert main([*given, "--out", "s3://no-such-bucket/x"]) == 1
        assert "no such bucket" in capsys.readouterr().err
        assert main(given) == 0
        assert f"published {store.root}/sums/1" in capsys.readouterr().out
        assert main([*given, "--seed", "1"]) == 0
        assert "against sums@1: " in capsys.readouterr().out
        assert versions(store.root, "sums") == [1, 2]
        assert latest(store.root, "sums") == store.root / "sums" / "2"
        assert set(store.objects(store.root / "sums")) == {
            *(f".claims/{number}" for number in "12"),
            *(f"{number}/{name}" for number in "12"
              for name in ("critic.json", "head.safetensors", "backbone/config.json", "backbone/model.safetensors")),
        }  # fmt: skip
        # On from a version at a URL, into a folder.
        more = ["--continue", f"{store.root}/sums/2", "--epochs", "1"]
        again = [*arguments(place, tmp_path / "out"), *more]
        for flag in ("--layers", "--base"):
            del again[again.index(flag) : again.index(flag) + 2]
        assert main(again) == 0
        assert (checkpoint.read_card(tmp_path / "out" / "sums" / "1").model_extra or {})["parent"] == "sums@2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "critics", "out"]
    assert (tmp_path / "critics" / ".runs" / "sums" / "run.json").is_file()


SHARE = "accelerate.commands.launch --use_fsdp --fsdp_version 2 --num_processes 2 --num_machines 1"
TWO = {
    "copies": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "shares": ["-m", *SHARE.split(), "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"],
}
"""How two processes are started that have a copy of the critic each, or share its weights."""


def start_two(kind: str, arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, *TWO[kind], "-m", "trainer.training", *arguments[1:]],
            cwd=ROOT, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def assert_close(a: Path, b: Path) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    print(f"weights differ by {max(float((ours[name] - theirs[name]).abs().max()) for name in ours):.1e}")
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", TWO)
def test_two_processes_take_the_same_steps_as_one(place: Path, tmp_path: Path, kind: str) -> None:
    """Steps of two or three rollouts, so that some have one for a single process only; one that is stopped goes on."""
    small = world.write(tmp_path / "data.parquet", world.rollouts(prompts=12, each=3)[1:])
    more = ["--data", str(small), "--batch-tokens", "16", "--epochs", "2", "--no-share-prefixes", "--mlp", "8"]
    assert main(arguments(place, tmp_path / "one", *more)) == 0
    one, two = tmp_path / "one" / ".runs" / "critic", tmp_path / "two" / ".runs" / "critic"
    given = [*arguments(place, tmp_path / "two", *more), "--resume"]
    process = start_two(kind, given, tmp_path / "log")
    deadline = time.monotonic() + 240
    while not (two / "metrics.jsonl").is_file() or len(lines(two)) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) != 0
    (checkpoint_of,) = two.glob("checkpoint-*")  # made by both together, after the same step
    kept = load_file(checkpoint_of / "state.safetensors")
    trained = weights(tmp_path / "one" / "critic" / "1")
    named = {f"head.{k.removeprefix('model.critic.head.')}": v for k, v in kept.items() if ".head." in k}
    assert {k: v.shape for k, v in named.items() if k in trained} == {
        k: v.shape for k, v in trained.items() if k.startswith("head.")
    }
    assert 3 <= len(lines(two)) < len(lines(one))
    process = start_two(kind, given, tmp_path / "log")
    assert process.wait(240) == 0, (tmp_path / "log").read_text()[-3000:]
    said = " ".join((tmp_path / "log").read_text().split())
    assert "2 processes" in said
    assert ("that share the critic's weights" in said) == (kind == "shares")
    assert min(lines(one, "rollouts")) == 1
    for what in ("loss", "grad_norm"):
        pairs = list(zip(lines(one, what), lines(two, what), strict=True))
        print(f"{what} of {len(pairs)} steps differs by {max(abs(a - b) / a for a, b in pairs):.1e} of its size")
    assert lines(two) == pytest.approx(lines(one), rel=1e-4)
    assert lines(two, "grad_norm") == pytest.approx(lines(one, "grad_norm"), rel=1e-3)
    reports = [json.loads((run / "metrics.json").read_text())["held_out"] for run in (one, two)]
    assert reports[1]["overall"] == pytest.approx(reports[0]["overall"], rel=1e-3)
    assert_close(tmp_path / "two" / "critic" / "1", tmp_path / "one" / "critic" / "1")
    assert [p.name for p in (tmp_path / "two" / "critic").iterdir()] == ["1"]
    assert len(Run(two).card.id) == 32


def test_ways_of_sharding_that_are_not_supported_are_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main(arguments(place, tmp_path)) == 1
    assert "FSDP's version 1 is not supported: add --fsdp_version 2" in capsys.readouterr().err
    assert not (tmp_path / ".runs").exists()


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [warmup_cosine(s, 100, 1.0, 0.1) for s in range(1, 101)]
    assert rates[:10] == pytest.approx([k / 10 for k in range(1, 11)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 1e-3
    assert warmup_cosine(1, 1, 1.0, 0.0) == 1.0
