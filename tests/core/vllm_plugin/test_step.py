"""The guided step without an engine around it: what requests that fail or end leave behind."""

import gc
import math
import random
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zmq
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate

from qsharp_core.critic import checkpoint
from qsharp_core.critic.scoring.backbone import CachedBackbone
from qsharp_core.critic.scoring.paged import PagedScorer
from qsharp_core.vllm_plugin import tilts
from qsharp_core.vllm_plugin.registry import LoadedCritic
from qsharp_core.vllm_plugin.telemetry import StepReport, decoder
from qsharp_core.vllm_plugin.v1 import QSharpLogitsProcessor
from tests.support import models, oracle

PARALLEL = SimpleNamespace(
    pipeline_parallel_size=1, prefill_context_parallel_size=1, tensor_parallel_size=1, data_parallel_size=1,
    data_parallel_index=0, enable_batch_sharded_sampling=False,
)  # fmt: skip


@pytest.fixture
def processor(tmp_path: Path) -> Iterator[QSharpLogitsProcessor]:
    config = SimpleNamespace(
        speculative_config=None, parallel_config=PARALLEL, additional_config={},
        model_config=SimpleNamespace(dtype=torch.float32), scheduler_config=SimpleNamespace(max_num_seqs=8),
    )  # fmt: skip
    made = QSharpLogitsProcessor(config, torch.device("cpu"), False)
    made.guide.registry.add(loaded(models.write_critic(tmp_path / "critic")))
    yield made
    made.guide.reporter.sender._context.destroy(linger=0)


def loaded(folder: Path) -> LoadedCritic:
    card, critic = checkpoint.load(folder)
    return LoadedCritic(card, folder, PagedScorer(CachedBackbone(critic, 400, 4)), max_length=400)


def engine_of(processor: QSharpLogitsProcessor) -> PagedScorer:
    (critic,) = processor.guide.registry.critics.values()
    assert isinstance(critic.cached_scorer, PagedScorer)
    return critic.cached_scorer


def begin(processor: QSharpLogitsProcessor, **ours: Any) -> list[int]:
    """A guided request in row 0; its growing output."""
    output: list[int] = []
    params = SamplingParams(extra_args={"qsharp_eta": 0.1, "qsharp_min_prob": 0, **ours})
    processor.update_state(BatchUpdate(1, [], [(0, params, [5, 6, 7], output)], []))
    return output


def step(processor: QSharpLogitsProcessor) -> torch.Tensor:
    """What it did to the logits of row 0."""
    logits = torch.randn(1, models.VOCAB, generator=torch.Generator().manual_seed(0))
    processor.update_state(None)
    processor._discarded, processor._hidden = [False], partial(torch.empty, 1, 8)
    return processor.apply(logits.clone()).log_softmax(-1) - logits.log_softmax(-1)


def asked(processor: QSharpLogitsProcessor, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Every history that the critic is asked about."""
    engine = engine_of(processor)
    histories: list[list[int]] = []
    score = engine.score

    def spied(sequences: Any, given: list[list[int]], *rest: Any) -> torch.Tensor:
        histories.extend(map(list, given))
        return score(sequences, given, *rest)

    monkeypatch.setattr(engine, "score", spied)
    return histories


def test_a_placeholder_token_never_reaches_the_critic(
    processor: QSharpLogitsProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch's arrays are kept from the step before, when the row was guided."""
    histories = asked(processor, monkeypatch)
    output = begin(processor)
    for token in (9, 10):
        assert step(processor).abs().max() > 0.1
        output.append(token)
    output[-1] = -1
    assert step(processor).abs().max() == 0
    output[-1] = 10
    assert step(processor).abs().max() == 0  # and it stays unguided
    assert histories == [[5, 6, 7], [5, 6, 7, 9]]
    ((request, _, _),) = processor._rows.values()
    assert request.failure == "placeholder_token"


@pytest.mark.parametrize("reason", ["too_long", "exception"])
def test_a_row_that_fails_is_not_asked_for_again(
    processor: QSharpLogitsProcessor, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    output, engine = begin(processor), engine_of(processor)
    step(processor)
    output.append(9)
    if reason == "too_long":
        output.extend(random.Random(0).choices(range(100), k=engine.capacity))
    else:

        def fail(*_: Any) -> None:
            raise RuntimeError("broken")

        monkeypatch.setattr(engine, "score", fail)
    assert step(processor).abs().max() == 0
    monkeypatch.undo()
    histories = asked(processor, monkeypatch)
    del output[2:]
    assert step(processor).abs().max() == 0
    assert histories == []
    ((request, _, _),) = processor._rows.values()
    assert request.failure == reason


def test_an_unloaded_critic_is_not_kept_by_what_is_on_its_way_to_the_host(
    processor: QSharpLogitsProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU it may be on its way until the next guided step, which may never come."""
    monkeypatch.setattr(tilts._BrokenRows, "done", False)
    begin(processor)
    step(processor)
    watch = weakref.ref(engine_of(processor).critic.backbone)
    processor.guide.registry.unload("critic@1")
    processor.update_state(BatchUpdate(0, [0], [], []))
    assert processor.guide._tilts._checks
    gc.collect()
    assert watch() is None


def test_one_row_that_is_not_finite_costs_itself_alone(processor: QSharpLogitsProcessor) -> None:
    """Its keys and values lie in blocks that other rows get when it has ended."""
    engine = engine_of(processor)
    with torch.inference_mode():
        engine.critic.backbone.get_input_embeddings().weight[7] = float("nan")
    begin(processor)
    assert step(processor).abs().max() == 0
    ((request, _, _),) = processor._rows.values()
    assert request.failure == "not_finite"
    assert all(tensor.isfinite().all() for tensor in engine.pool.stacked)


def test_a_request_that_has_nothing_left_to_spend_is_the_references(processor: QSharpLogitsProcessor) -> None:
    begin(processor, qsharp_id=5, qsharp_kl_total=0)
    assert step(processor).abs().max() < 1e-5
    begin(processor, qsharp_id=6, qsharp_kl_total=1e6)
    assert step(processor).abs().max() > 0.1


@pytest.fixture
def reported(processor: QSharpLogitsProcessor, tmp_path: Path) -> Iterator[Any]:
    """Returns the next report that the processor has sent."""
    with zmq.Context() as context, context.socket(zmq.PULL) as socket:
        address = f"ipc://{tmp_path / 's'}"
        socket.bind(address)
        processor.guide.reporter.sender.connect(address)

        def receive() -> StepReport:
            assert socket.poll(10_000)
            return decoder.decode(socket.recv())

        yield receive


@pytest.mark.parametrize("tail", ["floor", "keep", "drop"])
@pytest.mark.parametrize("method", ["qsharp", "cd"])
def test_candidates_are_reported_with_all_that_the_policy_follows_from(
    processor: QSharpLogitsProcessor, reported: Any, tmp_path: Path, tail: str, method: str
) -> None:
    folder, eta, count = tmp_path / "critic", 0.1, 7
    settings = {"tail": tail, "method": method, "candidates": count}
    begin(processor, qsharp_id=3, qsharp_report_candidates=True, **{f"qsharp_{k}": v for k, v in settings.items()})
    step(processor)
    logits = torch.randn(1, models.VOCAB, generator=torch.Generator().manual_seed(0))[0].double()
    token = int(logits.topk(3).indices[-1])
    processor.guide.report(torch.tensor([token]))
    report = reported()
    candidates = report.candidates[0]
    log_ref = logits.log_softmax(-1)
    assert candidates.token_ids == log_ref.topk(count).indices.tolist()
    assert candidates.ref_logprobs == pytest.approx(log_ref.topk(count).values.tolist(), abs=1e-5)
    outputs = oracle.critic_outputs(folder, [5, 6, 7], candidates.token_ids)
    assert torch.tensor(candidates.outputs) == pytest.approx(outputs.numpy(), abs=1e-4)

    # From what was reported alone, in float64, follows all else that was reported.
    got_ref = torch.tensor(candidates.ref_logprobs, dtype=torch.float64)
    tail_mass = 1 - got_ref.exp().sum()
    tilt = oracle.tilts(folder, torch.tensor(candidates.outputs, dtype=torch.float64), eta, method)
    kept = (got_ref + tilt).logsumexp(-1) - got_ref.logsumexp(-1)
    of_tail = {"floor": torch.tensor(0.0), "keep": kept, "drop": torch.tensor(-math.inf)}[tail]
    log_norm = torch.logaddexp((got_ref + tilt).logsumexp(-1), tail_mass.log() + of_tail)
    place = candidates.token_ids.index(token)
    assert report.value == pytest.approx([eta * log_norm.item()], abs=1e-9)
    assert report.logprob == pytest.approx([(got_ref + tilt - log_norm)[place].item()], abs=1e-9)


def test_candidates_are_reported_where_asked_for_alone(processor: QSharpLogitsProcessor, reported: Any) -> None:
    begin(processor, qsharp_id=3)
    step(processor)
    processor.guide.report(torch.tensor([4]))
    assert reported().candidates == {}
    begin(processor, qsharp_id=4, qsharp_report_candidates=True, qsharp_min_prob=1)
    step(processor)
    processor.guide.report(torch.tensor([4]))
    assert reported().candidates == {}  # one token alone was no choice, and the critic was not asked
