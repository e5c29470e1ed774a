"""`qsharp run`: every recipe file is loaded and run, shrunken, through the real server; and what is wrong is told."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qsharp_core import cli
from tests.conftest import ADMIN_KEY, Server
from tests.support import models
from trainer.commands import run
from trainer.experiments import files
from trainer.experiments.files import RecipeError
from trainer.loop import training
from trainer.rewards.base import Case
from trainer.rollouts.journal import Journal, JournalError
from trainer.tasks.base import Problem, Task
from trainer.training import job

NAMES = sorted(files.built_in())
CROSS = ("cross-model-sums", "cross-model-native")
QUESTIONS = [(f"What is {a} + {b}?", str(a + b)) for a in range(2, 5) for b in (3, 7)]


def problems(_: str) -> list[Problem]:
    return [Problem(id=str(i), prompt=question, answer=answer) for i, (question, answer) in enumerate(QUESTIONS)]


TASK = Task(name="short", splits=("train", "held_out", "test"), problems=problems)
"""In place of those whose prompts are longer than the tiny model's context."""
LONG = ("sums", "sentence", "extraction", "svamp", "gsm8k-short")


async def parity(case: Case) -> float:
    """A reward that random text earns half the time."""
    return float(sum(map(ord, case.completion)) % 2)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training in this process: a new one would spend its time on imports."""

    async def run_job(path: Path) -> None:
        assert job.run(job.Job.model_validate_json(path.read_bytes())) == 0

    monkeypatch.setattr(training, "run_job", run_job)
    torch.set_num_threads(1)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few questions, as local files of GSM8K and MATH."""
    for name, form in (("gsm8k", "So it is\n#### {}"), ("math", "So it is $\\boxed{{{}}}$.")):
        lines = [json.dumps({"question": q, "answer": form.format(a)}) + "\n" for q, a in QUESTIONS]
        for split in ("train", "test"):
            (tmp_path / f"{name}_{split}.jsonl").write_text("".join(lines))
    (tmp_path / "math_test.jsonl").rename(tmp_path / "math500.jsonl")
    monkeypatch.setenv("QSHARP_DATA", str(tmp_path))


def shrunken(name: str, server: Server) -> list[str]:
    """What a recipe is changed to: the tiny model, few problems, few tokens."""
    recipe = files.load(name)
    common = {
        "server.url": server.url, "server.admin_key": ADMIN_KEY, "verifiers": ["tests.trainer.test_recipes:parity"],
        "sampling.max_tokens": 6, "evaluate.limit": 2, "evaluate.samples": 2, "evaluate.etas": [0.1],
    }  # fmt: skip
    if recipe.settings.model_dump().get("task") in LONG:
        common["task"] = "tests.trainer.test_recipes:TASK"
    learned = {
        "critic.base": str(server.reference), "critic.tokenizer": str(server.reference), "critic.layers": 1,
        "critic.held_out": 0.4, "critic.epochs": 1, "rollouts.limit": 6,
    }  # fmt: skip
    if (recipe.settings.model_dump().get("critic") or {}).get("backbone") == "reference":
        learned = {
            "critic.base": str(server.reference), "critic.held_out": 0.4, "critic.steps": 30, "rollouts.limit": 6,
            "rollouts.branches": 2, "evaluate.methods": ["qsharp", "cd"],
        }  # fmt: skip
    learned["critic.name"] = name  # they share a server
    if recipe.kind_name == "ablation":
        variants = recipe.settings.model_dump(mode="json", include={"variants"}, exclude_unset=True)["variants"]
        for choice in (variant.get("rollouts", {}) for variant in variants):
            choice.update({"number": 4} if "number" in choice else {})
        learned.pop("evaluate.methods", None)
        learned |= {"variants": variants, "seeds": [0]}  # more: tests/trainer/test_ablation.py
    by_kind: dict[str, dict[str, Any]] = {
        "experiment": common | learned | {"rollouts.samples": [4, 2]},
        "ablation": common | learned | {"rollouts.samples": [4]},
        "cross_model": common,
    }
    changes = by_kind[recipe.kind_name]  # a new kind says here how it is shrunken
    return [flag for key, value in changes.items() for flag in ("--set", f"{key}={_toml(value)}")]


def _toml(value: Any, inner: bool = False) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(one, inner=True)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(one, inner=True) for one in value) + "]"
    return value if isinstance(value, str) and not inner else json.dumps(value)


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    assert (folder / "report.png").read_bytes()[:4] == b"\x89PNG"
    return found


def settings_of(results: list[dict[str, Any]]) -> list[tuple[str, float | None]]:
    return [(r["method"], r["eta"]) for r in results]


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("tree-mdp", *CROSS) and not n.startswith("star-graph")])
def test_every_recipe_runs(server: Server, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`tree-mdp` runs in `test_e2e_tree_mdp`, Star-Graph in tests of its own, and cross-model below."""
    arguments = ["run", name, "--out", str(tmp_path / "run"), *shrunken(name, server)]
    assert cli.main(arguments) == 0
    report = report_of(tmp_path / "run")
    assert report["recipe"] == name
    recipe = files.load(name)
    parts = report["results"]
    if report["kind"] == "experiment":
        first, second = [entry["rollouts"] for entry in report["rounds"]]
        branches = 12 if report["settings"]["rollouts"]["branches"] else 0
        assert (first, second) == (24 + branches, 12)
        assert settings_of(parts) == [("reference", None), ("qsharp", 0.1), ("cd", 0.1)]
        assert all(r["n"] == 4 for r in parts)
        scored = report["settings"]["evaluate"]["scored"]
        assert all((r["best_of"] is not None, r["weighted_majority"] is not None) == (scored, scored) for r in parts)
        assert parts[1]["kl"] > 0 or not report["activated"]
        if recipe.settings.model_dump()["published"]:
            assert "published" in capsys.readouterr().out
    else:
        seeds = report["settings"]["seeds"] or [0]
        names = [v["name"] for v in report["settings"]["variants"]]
        assert [(one["critic"], one["seed"]) for one in parts] == [
            (f"{name}.{seed}@1" if seed else f"{name}@1", seed) for name in names for seed in seeds
        ]
        assert [(one["variant"], one["seeds"]) for one in report["over_seeds"]] == [(name, seeds) for name in names]
        assert all(settings_of(one["results"]) == [("reference", None), ("qsharp", 0.1)] for one in parts)
        assert len({one["held_out"]["log_loss"] for one in parts}) == len(parts)  # they are different critics


@pytest.mark.usefixtures("data")
def test_a_run_goes_on_and_refuses_other_settings(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", "gsm8k-tiny", "--out", str(tmp_path / "run"), *shrunken("gsm8k-tiny", server)]
    arguments += ["--set", "critic.name=going-on"]  # the server has that of the test above
    assert cli.main(arguments) == 0
    first = report_of(tmp_path / "run")
    samples = (tmp_path / "run" / "evaluation" / "samples.jsonl").read_bytes()
    trained = sorted(path.stat().st_mtime_ns for path in (tmp_path / "run" / "critics").rglob("*.safetensors"))
    assert cli.main(arguments) == 0
    assert report_of(tmp_path / "run")["results"] == first["results"]
    assert (tmp_path / "run" / "evaluation" / "samples.jsonl").read_bytes() == samples
    assert sorted(p.stat().st_mtime_ns for p in (tmp_path / "run" / "critics").rglob("*.safetensors")) == trained
    # More may be measured; nothing else may change.
    assert cli.main([*arguments, "--set", "evaluate.etas=[0.1, 0.5]"]) == 0
    again = report_of(tmp_path / "run")["results"]
    assert settings_of(again) == [("reference", None), *((m, eta) for m in ("qsharp", "cd") for eta in (0.1, 0.5))]
    assert [r for r in again if r["eta"] != 0.5] == first["results"]
    assert cli.main([*arguments, "--set", "sampling.temperature=0.7"]) == 1
    assert "begun with other settings: sampling was" in capsys.readouterr().err


@pytest.mark.usefixtures("data")
def test_seeds_are_added_to_an_ablation_and_variants_are_not_changed(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of one seed, as older versions left it, is gone on with."""
    out = tmp_path / "run"
    given = ["run", "ablation-sums", "--out", str(out), *shrunken("ablation-sums", server)]

    def variants(loss: str) -> list[str]:
        return ["--set", f'variants=[{{name="only"}}, {{name="other", loss="{loss}"}}]']

    assert cli.main([*given, *variants("squared")]) == 0
    first = report_of(out)
    weights = out / "critics" / "only" / "1" / "head.safetensors"
    before = weights.stat().st_mtime_ns
    assert cli.main([*given, *variants("squared"), "--set", "seeds=[0, 7]"]) == 0
    again = report_of(out)
    assert weights.stat().st_mtime_ns == before
    assert [one["critic"] for one in again["results"]] == ["only@1", "only.7@1", "other@1", "other.7@1"]
    assert [one for one in again["results"] if one["seed"] == 0] == first["results"]
    only = again["over_seeds"][0]
    losses = [one["held_out"]["log_loss"] for one in again["results"][:2]]
    assert only["log_loss"]["mean"] == pytest.approx(sum(losses) / 2)
    guided = [one["results"][1] for one in again["results"][:2]]
    assert only["results"][1]["accuracy"]["mean"] == pytest.approx(sum(one["accuracy"] for one in guided) / 2)
    assert only["results"][1]["kl"]["mean"] == pytest.approx(sum(one["kl"] for one in guided) / 2)
    assert only["results"][1]["n"] == 8
    alone = first["over_seeds"][0]["results"][1]
    assert (alone["accuracy"]["se"], alone["accuracy"]["sd"]) == (
        first["results"][0]["results"][1]["accuracy_se"],
        None,
    )
    capsys.readouterr()
    assert cli.main([*given, *variants("likelihood")]) == 1
    assert "other was trained with loss = 'squared', not 'likelihood'" in capsys.readouterr().err


@pytest.mark.parametrize("name", CROSS)
def test_cross_model(server: Server, tmp_path: Path, name: str) -> None:
    """References behind the session's server; those of fewer bits are made, and a critic gets its embeddings."""
    assert cli.main(["run", name, "--out", str(tmp_path / "run"), *shrunken(name, server)]) == 0
    first, *others = report_of(tmp_path / "run")["references"]
    assert first["model"] == str(server.reference)
    assert [one["model"] for one in others] == [str(tmp_path / "run" / "models" / one["reference"]) for one in others]
    eight, six, four, *_ = (one["relative_error"] for one in others)
    assert 0.001 < eight < six / 3 < four / 9 < 0.1
    methods = ["qsharp", "cd"] if name == "cross-model-sums" else ["qsharp"]
    assert settings_of(first["results"]) == [("reference", None), *((method, 0.1) for method in methods)]


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "own.toml"
    path.write_text(text)
    return str(path)


EXPERIMENT = 'kind = "experiment"\ntask = "sums"\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind = ", "own.toml is not TOML"),
        ('kind = "exp"', r"own.toml: kind: must be one of .*experiment.*got 'exp'"),
        ('kind = "experiment"', "own.toml: the recipe: name either task or prompts"),
        (EXPERIMENT + "etas = [1]", "own.toml: etas: there is no such field"),
        (EXPERIMENT + "[sampling]\ntemperature = -1", "own.toml: sampling.temperature: .*greater.*got -1"),
        (EXPERIMENT + '[critic]\nhead = "W"', "own.toml: critic.head: .*'V' or 'Q'.*got 'W'"),
        (EXPERIMENT + "[critic]\natoms = [1.0, 0.5]", "own.toml: critic: --atoms must ascend"),
        ('kind = "ablation"\ntask = "sums"\nvariants = [{name="a"}, {name="a"}]', "variants must have different names"),
    ],
)
def test_what_is_wrong_is_told_by_file_and_field(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        files.load(written(tmp_path, text))


def test_set(tmp_path: Path) -> None:
    path = written(tmp_path, EXPERIMENT)
    changes = ["evaluate.etas=[0.5, 1]", "model=folder/of it", "critic.layers=2", "sampling.top_p=0.9"]
    settings = files.load(path, changes).settings.model_dump()
    assert (settings["evaluate"]["etas"], settings["model"]) == ((0.5, 1.0), "folder/of it")
    assert (settings["critic"]["layers"], settings["critic"]["base"]) == (2, "served")
    assert settings["sampling"]["top_p"] == 0.9
    for wrong, said in (("etas", "KEY=VALUE"), ("task.x=1", "task is not a table"), ("=1", "KEY=VALUE")):
        with pytest.raises(RecipeError, match=said):
            files.load(path, [wrong])
    with pytest.raises(RecipeError, match=r"with --set: seed: .*got 'x'"):
        files.load(path, ["seed=x"])
    with pytest.raises(RecipeError, match=r"no recipe 'nothing': give a file, or one of .*tree-mdp"):
        files.load("nothing")


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--list"]) == 0
    shown = capsys.readouterr().out
    for name in NAMES:
        kind, said = files.headline(files.built_in()[name])
        assert name in shown
        assert kind in shown
        assert said
    with pytest.raises(RecipeError, match="--list"):
        run.main([])


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    recipe = files.load("tree-mdp")
    with Journal(tmp_path / run.LOCK, recipe.identity), pytest.raises(JournalError, match="in use"):
        run.main(["tree-mdp", "--out", str(tmp_path)])


def test_a_server_that_does_not_come_up_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--set", f"model={models.write_reference(tmp_path / 'm')}", "--set", 'server.flags=["--no-such-flag"]']
    assert cli.main(["run", "gsm8k-tiny", "--out", str(tmp_path / "run"), *flags]) == 1
    assert "--no-such-flag" in capsys.readouterr().err
