"""What people see: tables that fit, plots whose labels cover nothing, learning curves, trackers."""

import io
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from rich.console import Console

from qsharp_core.cli import main
from tests.support import models
from tests.support import trainer_data as world
from trainer.evaluation.plot import draw
from trainer.evaluation.report import EvaluationReport, SettingReport
from trainer.evaluation.statistics import JudgedSample, summary
from trainer.evaluation.table import tables
from trainer.loop.report import LoopReport
from trainer.loop.table import evaluations, reasons
from trainer.loop.table import table as loop_table
from trainer.training.learning_plot import learning_curve
from trainer.training.report import HeldOutLine, Measures

# Of the demonstration's plot, where labels lay upon each other and upon lines.
DEMO = [
    ("reference", None, 0.440, 0.032, 0.0, 0.0), ("qsharp", 0.3, 0.635, 0.034, 0.43, 0.02),
    ("qsharp", 0.1, 0.723, 0.032, 0.58, 0.03), ("qsharp", 0.03, 0.727, 0.031, 0.58, 0.04),
    ("cd", 0.3, 0.652, 0.032, 0.38, 0.02), ("cd", 0.1, 0.759, 0.031, 2.36, 0.22),
    ("cd", 0.03, 0.011, 0.006, 45.7, 0.89),
]  # fmt: skip


def results(sign: float = 1.0) -> list[SettingReport]:
    """With every figure that there can be."""
    fields: dict[str, Any] = {"samples": None, "problems": 141, "n": 2820, "unjudged": 0, "by_k": {}}
    for name in ("majority", "weighted_majority", "oracle", "best_of", "full"):
        fields |= {name: 0.7512, f"{name}_se": 0.0321}
    return [
        SettingReport(
            method=method, eta=eta, accuracy=sign * accuracy, accuracy_se=error, gain=sign * (accuracy - 0.44),
            gain_se=0.031, kl=kl, kl_se=kl_se, tokens=126.8, tokens_se=1.0, **fields,
        )
        for method, eta, accuracy, error, kl, kl_se in DEMO
    ]  # fmt: skip


BUDGETS: list[dict[str, Any]] = [{"kl_total": 0.25}, {"kl_total": 0.5}, {"kl_token": 0.05}]


def limited() -> list[SettingReport]:
    """The reference, guidance at an eta, and the same within three budgets."""
    reference, _, free, *_ = results()
    within = [
        free.model_copy(update={"kl": 0.2 * i, "accuracy": 0.5 + 0.05 * i, **budget})
        for i, budget in enumerate(BUDGETS, 1)
    ]
    return [reference, free, *within]


def report(**fields: Any) -> EvaluationReport:
    about: dict[str, Any] = {
        "task": "sums", "verifiers": {}, "split": "held_out", "model": "m", "samples": 4, "sampling": {},
        "critic": None, "guidance": {}, "scored": False, "vote": None, "seed": 0, "seconds": 1.0, "failures": [],
        "results": results(),
    }  # fmt: skip
    return EvaluationReport(**about | fields)


@pytest.mark.parametrize("graded", [False, True])
def test_tables_fit_eighty_columns(graded: bool) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(*tables(4, results(-1.0 if graded else 1.0), graded=graded))
    text = console.export_text()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in text
    rows = [line for line in lines if line.split()[:1] and line.split()[0] in ("reference", "Q♯", "CD")]
    assert len(rows) == 2 * len(DEMO)  # two tables, and no row is wrapped
    if graded:
        assert "mean reward" in text
        assert "pass@1" not in text
        assert "-0.195 ± 0.031" in text
        assert "75.1 %" in text  # the share of rewards that are 1
    else:
        assert "pass@1" in text
        assert "+19.5 ± 3.1" in text
    assert "75.1 ± 3.2 %" in text or graded


def test_budgets_are_told_in_tables_and_plots() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(*tables(4, limited()))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    for told in ("Q♯ ≤ 0.25 nats", "Q♯ ≤ 0.5 nats", "Q♯ ≤ 0.05 a token"):
        assert text.count(told) == 2
    axes = Figure(figsize=(7.2, 4.8), dpi=140, layout="constrained").add_subplot()
    draw(axes, report(results=limited()))
    assert {note.get_text() for note in axes.texts} == {"η = 0.1", "≤ 0.25 nats", "≤ 0.5 nats", "≤ 0.05 a token"}
    curves = {"Q♯", "Q♯ within a budget", "Q♯ within a budget a token"}  # one that joined two kinds would run back
    assert curves <= {text.get_text() for text in axes.get_legend().get_texts()}  # type: ignore[union-attr]


def test_free_texts_have_no_majority() -> None:
    def samples(votes: list[str | None]) -> dict[str, list[JudgedSample]]:
        return {"p": [JudgedSample(reward=float(i), kl=0.0, tokens=3, vote=v, score=0.5) for i, v in enumerate(votes)]}

    free = summary(samples([None, None]), samples([None, None]), 2, voted=False)
    assert (free.majority, free.weighted_majority) == (None, None)
    assert free.oracle == 1.0
    assert summary(samples(["a", None]), samples(["a", None]), 2).majority == 0.0
    # Of a task whose answers could be counted, nobody may have given one.
    assert summary(samples([None, None]), samples([None, None]), 2).majority == 0.5


def test_labels_of_a_plot_cover_neither_each_other_nor_points() -> None:
    figure = Figure(figsize=(7.2, 4.8), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    draw(axes, report())
    axes.set_title("a title, which moves the axes")
    figure.draw_without_rendering()
    labels = [one for one in axes.texts if isinstance(one, Annotation)]
    assert sorted(one.get_text() for one in labels) == sorted(f"η = {eta:g}" for _, eta, *_ in DEMO if eta)
    boxes = [one.get_window_extent() for one in labels]
    assert not [pair for pair in combinations(range(len(boxes)), 2) if boxes[pair[0]].overlaps(boxes[pair[1]])]
    for _, _, accuracy, _, kl, _ in DEMO:
        x, y = axes.transData.transform((kl, accuracy))
        assert not any(box.contains(x, y) for box in boxes)
    frame = axes.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 + 2 for box in boxes)


def test_a_learning_curve_has_the_constant_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: drawn.append(self))
    lines = [
        HeldOutLine(
            step=step,
            epoch=1,
            held_out=Measures(
                n=9, rollouts=3, reward_mean=0.5, log_loss=loss, brier=0.2, auc=auc, ece=0.0, brier_constant=0.25,
                log_loss_constant=0.69,
            ),
        )
        for step, loss, auc in ((10, 0.68, 0.6), (20, 0.61, 0.7), (30, 0.65, None))
    ]  # fmt: skip
    learning_curve(tmp_path / "curve.png", lines, "mine")
    losses, aucs = drawn[0].axes
    curve, best, constant = losses.lines
    assert [tuple(point) for point in curve.get_xydata().tolist()] == [(10, 0.68), (20, 0.61), (30, 0.65)]  # type: ignore[union-attr]
    assert (best.get_xdata(), best.get_ydata()) == ([20], [0.61])
    assert set(constant.get_ydata()) == {0.69}  # type: ignore[arg-type]
    assert list(aucs.lines[0].get_xdata()) == [10, 20]  # type: ignore[arg-type]


def _no_place(_: object) -> None:
    raise OSError("no such place")


def test_trackers_see_the_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models.write_reference(tmp_path / "base", "qwen2", sharpness=1.0)
    world.write(tmp_path / "data.parquet", world.rollouts(prompts=20, each=8))
    command = [
        "train", "--data", str(tmp_path / "data.parquet"), "--out", str(tmp_path / "out"), "--held-out", "0.3",
        "--base", str(tmp_path / "base"), "--steps", "30", "--publish-anyway",
    ]  # fmt: skip
    assert main([*command, "--log-with", "nonsense"]) == 1
    assert "does not find this tracker" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accelerate.tracking.TensorBoardTracker.start", _no_place)
        assert main([*command, "--log-with", "tensorboard", "--out", str(tmp_path / "elsewhere")]) == 1
    assert "--log-with tensorboard: it does not start: no such place" in capsys.readouterr().err
    board = tmp_path / "board"
    assert main([*command, "--log-with", "tensorboard", "--tensorboard", str(board)]) == 0
    assert main([*command, "--tensorboard", str(board)]) == 0
    assert sorted(one.name for one in board.iterdir()) == ["critic-1", "critic-2"]
    run = tmp_path / "out" / ".runs" / "critic"
    assert list((run / "1" / "qsharp").rglob("events*"))  # of Accelerate's tracker, put aside with its run
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    seen = EventAccumulator(str(board / "critic-2"))
    seen.Reload()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    wanted = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    shown = [(one.step, one.value) for one in seen.Scalars("train/loss")]
    assert [step for step, _ in shown] == [step for step, _ in wanted]
    assert [loss for _, loss in shown] == pytest.approx([loss for _, loss in wanted], rel=1e-5)


def test_a_loops_table_fits_and_its_reasons_stand_below() -> None:
    overall = {
        "n": 1, "rollouts": 1, "reward_mean": 0.5, "auc": 0.751, "ece": 0.0, "brier": 0.2, "brier_constant": 0.2,
        "log_loss": 0.6144, "log_loss_constant": 0.6912,
    }  # fmt: skip
    held_out: dict[str, Any] = {"overall": overall, "by_position": [], "last_token": overall, "branches": None}
    held_out["prompts"] = 1
    why = "not better than looped@1: held-out log loss by -0.00012 ± 0.00200"
    loop = LoopReport.model_validate(
        {
            "critic": "looped@1", "seconds": 9.0,
            "rounds": [
                {
                    "round": 1, "begin": {"critic": "looped@1"},
                    "collect": {
                        "run": "a", "wanted": 12160, "made": 1, "found": 0, "before": 0, "too_short": 0, "tokens": 1,
                        "retries": 0, "seconds": 1.0, "guided_by": "looped@1",
                    },
                    "reward": {"given": 3, "mean": 0.5543, "failed": 0, "not_applicable": 0}, "export": {"rows": 3},
                    "train": {
                        "critic": "looped@2", "data": {}, "steps": 1, "best_epoch": None, "held_out": held_out,
                        "parent": None,
                    },
                    "activate": {"activated": False, "why": why, "critic": "looped@1"}, "evaluate": None,
                    "seconds": {"collect": 7654.0},
                }
            ],
        }
    )  # fmt: skip
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(loop_table(loop))
    lines = [line for line in console.export_text().splitlines() if "looped@2" in line]
    assert [line.split() for line in lines] == [
        ["1", "looped@1", "12160", "0.554", "looped@2", "0.6144", "(0.6912)", "0.751", "no", "127.6"]
    ]
    assert reasons(loop) == [f"looped@2: {why}"]
    assert evaluations(loop) is None
    measured: dict[str, Any] = {"method": "reference", "eta": None, "problems": 14, "n": 112, "kl": None, "kl_se": None}
    measured |= {"accuracy": 0.05, "accuracy_se": 0.015, "gain": None, "gain_se": None}
    guided = {**measured, "method": "qsharp", "eta": 0.1, "accuracy": 0.192, "accuracy_se": 0.04, "gain": 0.143}
    guided |= {"gain_se": 0.046, "kl": 15.2, "kl_se": 0.55}
    said = loop.model_dump()
    said["rounds"][0]["evaluate"] = {"critic": "looped@1", "results": [measured, guided]}
    shown = evaluations(LoopReport.model_validate(said))
    assert shown is not None
    console.print(shown)
    measures = [line.split() for line in console.export_text().splitlines() if "112" in line]
    assert measures == [
        ["1", "reference", "–", "0.050", "±", "0.015", "112"],
        ["1", "looped@1", "0.1", "0.192", "±", "0.040", "+0.143", "±", "0.046", "15.20", "±", "0.55", "112"],
    ]
