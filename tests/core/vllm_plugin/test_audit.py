"""Which rows are drawn for an audit, and what comes of it."""

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qsharp_core.critic import checkpoint
from qsharp_core.critic.scoring.backbone import CachedBackbone
from qsharp_core.critic.scoring.paged import PagedScorer
from qsharp_core.vllm_plugin import audit
from qsharp_core.vllm_plugin.audit import Auditor
from qsharp_core.vllm_plugin.params import GuidanceParams
from qsharp_core.vllm_plugin.registry import LoadedCritic
from qsharp_core.vllm_plugin.rows import LogitsRow, TrackedRequest
from tests.support import models

CPU = torch.device("cpu")
CACHED: Any = SimpleNamespace(card=SimpleNamespace(key="critic@1"), cached_scorer=object())  # for who never asks it
KINDS: dict[str, dict[str, Any]] = {
    "V": {"kind": "llama"},
    "Q": {"kind": "qwen2", "head": "Q"},
    "window": {"kind": "mistral", "mlp": 32},
}


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture(params=KINDS)
def critic(request: pytest.FixtureRequest, tmp_path: Path) -> LoadedCritic:
    return loaded(models.write_critic(tmp_path / "critic", **KINDS[request.param]))


def loaded(folder: Path) -> LoadedCritic:
    card, critic = checkpoint.load(folder)
    return LoadedCritic(card, folder, PagedScorer(CachedBackbone(critic, 400, 4)), max_length=400)


def engine_of(critic: LoadedCritic) -> PagedScorer:
    assert isinstance(critic.cached_scorer, PagedScorer)
    return critic.cached_scorer


def rows_of(histories: list[list[int]]) -> list[LogitsRow]:
    request = TrackedRequest(GuidanceParams(eta=0.1), 1.0)
    return [LogitsRow(i, request, len(history), partial(list, history)) for i, history in enumerate(histories)]


def scored(critic: LoadedCritic, auditor: Auditor, spoil: bool = False) -> None:
    """Two steps of three rows, watched; in the second one a slot is wrong."""
    histories = [list(range(30, 50)), list(range(60, 90)), list(range(30, 53))]
    engine = engine_of(critic)
    sequences = [engine.open() for _ in histories]
    ids = torch.arange(6).repeat(3, 1) + 100
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    for step in range(2):
        if spoil and step:
            engine.pool.values[0][sequences[0].blocks[0] * 4 + 3] += 1.0
            histories = [[*history, 5] for history in histories]
        outputs = engine.score(sequences, histories, ids, mask)
        auditor.watch(critic, rows_of(histories), ids, mask, outputs)
    auditor._executor.shutdown()
    for sequence in sequences:
        engine.close(sequence)


def test_right_scores_pass(critic: LoadedCritic, executor: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "USUAL_TOKENS", 1000)
    auditor = Auditor(1.0, CPU, executor)
    auditor._room = threading.Semaphore(100)
    scored(critic, auditor)
    results = auditor.take_results()
    assert len(results) == 4  # a row without candidates has nothing to compare
    assert all(result.critic == "critic@1" and not result.failed and result.error < 1e-5 for result in results)
    assert not auditor.take_results()


def test_a_wrong_slot_fails(
    critic: LoadedCritic,
    executor: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(audit, "USUAL_TOKENS", 1000)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    auditor = Auditor(1.0, CPU, executor)
    auditor._room = threading.Semaphore(100)
    forgotten = []
    monkeypatch.setattr(engine_of(critic), "_forget", lambda: forgotten.append(True))
    scored(critic, auditor, spoil=True)
    failed = [result.failed for result in auditor.take_results()]
    windowed = (
        engine_of(critic).critic.backbone.config.model_type == "mistral"
    )  # 24 tokens: the slot is seen by all rows
    assert failed == [False, False, True, False] or windowed
    assert any(failed)
    assert forgotten  # before the cache was used again
    assert "tokens=[30, 31," in caplog.text
    assert "candidates=[100, 101, 102, 103, 104, 105] cached=[[" in caplog.text


@pytest.mark.parametrize(("rate", "low", "high"), [(0.0, 0, 0), (0.1, 800, 1200), (1.0, 10_000, 10_000)])
def test_the_share_that_is_drawn(
    rate: float, low: int, high: int, executor: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    auditor = Auditor(rate, CPU, executor)
    auditor._room = threading.Semaphore(100_000)
    drawn: list[int] = []
    monkeypatch.setattr(auditor, "_audit", lambda case: drawn.append(case.outputs_KN.item()))
    for batch in (1, 7, 32, 0, 60):
        outputs = torch.arange(batch).reshape(-1, 1, 1)
        for _ in range(100):
            auditor.watch(CACHED, rows_of([[1]] * batch), outputs[..., 0], outputs[..., 0] >= 0, outputs)
    executor.shutdown()
    assert low <= len(drawn) <= high
    if rate:
        assert {*drawn} == {*range(60)}  # wherever a row is in its batch


def test_long_rows_are_drawn_more_rarely(executor: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    auditor = Auditor(1.0, CPU, executor)
    auditor._room = threading.Semaphore(100_000)
    drawn: list[int] = []
    monkeypatch.setattr(auditor, "_audit", lambda case: drawn.append(len(case.history)))
    nothing = torch.zeros(1, 1)
    for length in (audit.USUAL_TOKENS, 4 * audit.USUAL_TOKENS, audit.MOST_TOKENS + 1):
        for _ in range(400):
            auditor.watch(CACHED, rows_of([[1] * length]), nothing, nothing > 0, nothing[..., None])
    executor.shutdown()
    assert drawn.count(audit.USUAL_TOKENS) == 400
    assert 60 <= drawn.count(4 * audit.USUAL_TOKENS) <= 140
    assert audit.MOST_TOKENS + 1 not in drawn


def test_few_rows_wait(executor: ThreadPoolExecutor, tmp_path: Path) -> None:
    critic = loaded(models.write_critic(tmp_path / "critic"))
    auditor = Auditor(1.0, CPU, executor)
    gate = threading.Event()
    executor.submit(gate.wait)
    sequence, ids = engine_of(critic).open(), torch.tensor([[5, 6]])
    outputs = engine_of(critic).score([sequence], [[1, 2, 3]], ids, ids > 0)
    for _ in range(20):
        auditor.watch(critic, rows_of([[1, 2, 3]]), ids, ids > 0, outputs)
    gate.set()
    executor.submit(lambda: None).result()
    assert len(auditor.take_results()) == audit.MOST_WAITING
    auditor.watch(critic, rows_of([[1, 2, 3]]), ids, ids > 0, outputs)
    executor.shutdown()
    assert len(auditor.take_results()) == 1


def test_a_plain_pass_that_cannot_be_run_says_nothing_of_the_scores(
    executor: ThreadPoolExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    critic = loaded(models.write_critic(tmp_path / "critic"))

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(engine_of(critic), "score_uncached", full)
    auditor = Auditor(1.0, CPU, executor)
    ids = torch.tensor([[5, 6]])
    for _ in range(10):
        auditor.watch(critic, rows_of([[1, 2, 3]]), ids, ids > 0, torch.zeros(1, 2, 1))
        executor.submit(lambda: None).result()
    assert auditor.take_results() == []
    assert not engine_of(critic)._distrusted


def test_rows_that_have_failed_are_not_compared(executor: ThreadPoolExecutor, tmp_path: Path) -> None:
    critic = loaded(models.write_critic(tmp_path / "critic"))
    auditor = Auditor(1.0, CPU, executor)
    ids = torch.tensor([[5, 6]])
    auditor.watch(critic, rows_of([[1, 2, 3]]), ids, ids > 0, torch.full((1, 2, 1), float("nan")))
    executor.shutdown()
    assert auditor.take_results() == []
