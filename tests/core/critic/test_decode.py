"""Steps in fixed shapes give the scores of full forward passes, whatever happens to the rows."""

import gc
import random
import weakref
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qsharp_core.critic import checkpoint
from qsharp_core.critic.scoring import backbone
from qsharp_core.critic.scoring.build import build_scorer
from qsharp_core.critic.scoring.decoder import Decoder
from qsharp_core.critic.scoring.fixed import FixedShapeScorer
from qsharp_core.critic.scoring.paged import PagedScorer
from qsharp_core.critic.scoring.prefix_attention import gathered
from tests.core.critic.test_engine import CRITICS, TOLERANCE
from tests.support import models, oracle


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("critics")
    return {name: models.write_critic(root / name, **options) for name, options in CRITICS.items()}  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name in CRITICS if name != "mistral-V-mlp"])
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**32),
    tokens=st.sampled_from([64, 600]),
    count=st.sampled_from([1, 4, 9]),
    prefill=st.sampled_from([3, 1024]),
)
def test_scores_equal_full_forward_passes(
    folders: dict[str, Path], name: str, seed: int, tokens: int, count: int, prefill: int
) -> None:
    with mock.patch.object(backbone, "PREFILL_TOKENS", prefill):
        drive(folders, name, random.Random(seed), tokens, count)


def drive(folders: dict[str, Path], name: str, rng: random.Random, tokens: int, count: int) -> None:
    """Rows that grow, pause and are preempted; nine of them do not fit a pool of 64 tokens together."""
    folder = folders[name]
    engine = build_scorer(checkpoint.load(folder)[1], tokens, 4, kernel=gathered)
    assert isinstance(engine, FixedShapeScorer)
    shared = [rng.randrange(models.VOCAB) for _ in range(12)]
    rows = [
        (engine.open(), [*shared, *(rng.randrange(models.VOCAB) for _ in range(rng.randrange(5)))])
        for _ in range(count)
    ]
    reads = splits = 0
    for step in range(12):
        if step % 5 == 3:  # preempted: comes back as a new row with the tokens it had
            sequence, history = rows.pop(0)
            engine.close(sequence)
            rows.append((engine.open(), history))
        running = [row for row in rows if rng.random() < 0.9] or rows[:1]
        most = rng.choice([1, 5, 12])
        ids = torch.stack([torch.tensor(rng.sample(range(models.VOCAB), most)) for _ in running])
        last = torch.tensor([history[-1] for _, history in running])

        def read(i: int, running: list = running) -> list[int]:
            nonlocal reads
            reads += 1
            return list(running[i][1])

        outputs = engine.score([s for s, _ in running], [len(h) for _, h in running], last, ids, read)
        splits += engine.take_counts().splits
        for r, (_, history) in enumerate(running):
            wanted = oracle.critic_outputs(folder, history, ids[r].tolist())
            torch.testing.assert_close(outputs[r].double(), wanted.double(), atol=TOLERANCE, rtol=TOLERANCE)
            history.append(rng.randrange(models.VOCAB))  # candidate or not: the engine is not told
    if tokens == 600:  # room for all: histories are read for new rows alone, first or preempted
        assert reads <= len(rows) + 2
        assert splits == 0
    elif count == 9:
        assert splits > 0
    for sequence, _ in rows:
        engine.close(sequence)
    assert engine.blocks.free == engine.blocks.total


def test_compiled_steps(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They are the plain ones; what was compiled serves the next critic of these shapes, and keeps none alive."""
    monkeypatch.setattr(Decoder, "capture", lambda *_: None)  # which wants a GPU

    def loaded() -> FixedShapeScorer:
        scorer = build_scorer(checkpoint.load(folders["llama-V"])[1], 64, 4, kernel=gathered, graphs=((1,), (1,)))
        assert isinstance(scorer, FixedShapeScorer)
        return scorer

    first = loaded()  # it compares them with a plain forward pass
    assert first.decoder._fused is not first.decoder._plain
    with torch._dynamo.config.patch(error_on_recompile=True):
        loaded()
    watch = weakref.ref(first.critic.backbone)
    del first
    gc.collect()
    assert watch() is None
    assert "critic without" not in caplog.text


def test_steps_that_do_not_compile_are_run_as_they_are(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(Decoder, "capture", lambda *_: None)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    engine = build_scorer(checkpoint.load(folders["llama-V"])[1], 64, 4, kernel=gathered, graphs=((1,), (1,)))
    assert isinstance(engine, FixedShapeScorer)
    assert engine.decoder._fused is engine.decoder._plain
    assert "without compiled steps: no compiler" in caplog.text


def test_a_sliding_window_is_run_without_fixed_shapes(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    scorer = build_scorer(checkpoint.load(folders["mistral-V-mlp"])[1], 64, 4, kernel=gathered)
    assert isinstance(scorer, PagedScorer)
    assert "sliding-window" in caplog.text
