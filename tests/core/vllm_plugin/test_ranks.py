"""Two tensor-parallel ranks in two processes: whatever the critic does on the first, both tilt by the same bits."""

import json
import multiprocessing
import pickle
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qsharp_core import policy
from qsharp_core.critic import checkpoint
from qsharp_core.critic.folder import BACKBONE, CARD
from qsharp_core.errors import ConfigError
from qsharp_core.vllm_plugin import upstream
from qsharp_core.vllm_plugin.rows import LogitsRow, TrackedRequest
from qsharp_core.vllm_plugin.settings import refuse_unsupported
from qsharp_core.vllm_plugin.step import StepGuide
from tests.support import models

LENGTH = 64
HISTORY = [5, 6, 7, 8]
# What each row is asked and has behind it. Row 3 fails on the first rank when it opens, with more candidates than any
# other row; 4 when it is scored (too long), 5 in the forward pass (no such token), with 6, of the same critic.
ROWS: list[tuple[dict[str, Any], list[int]]] = [
    ({"qsharp_eta": 0.1, "qsharp_id": 0}, HISTORY),
    ({"qsharp_eta": 0.2, "qsharp_critic": "wide", "qsharp_tail": "keep", "qsharp_candidates": 5}, HISTORY[:2]),
    ({"qsharp_id": 2}, HISTORY),
    ({"qsharp_eta": 0.1, "qsharp_critic": "nobody", "qsharp_candidates": 64, "qsharp_id": 3}, HISTORY),
    ({"qsharp_eta": 0.1, "qsharp_id": 4}, HISTORY * 200),
    ({"qsharp_eta": 0.1, "qsharp_critic": "deep", "qsharp_id": 5}, [models.VOCAB + 1]),
    ({"qsharp_eta": 0.1, "qsharp_critic": "deep", "qsharp_id": 6}, HISTORY),
    ({"qsharp_eta": 0.1, "qsharp_critic": "native", "qsharp_id": 7}, HISTORY),
]
FAILURES = [None, None, None, "unknown_critic", "too_long", "exception", "exception", None]


def vllm_config(folders: list[Path], ranks: int) -> Any:
    """What `StepGuide` reads of vLLM's configuration."""
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(folders[0].parent / "reference"),
            max_model_len=LENGTH,
            skip_tokenizer_init=True,
            get_vocab_size=lambda: models.VOCAB,
            dtype=torch.float32,
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=8),
        use_v2_model_runner=False,
        parallel_config=SimpleNamespace(
            tensor_parallel_size=ranks,
            pipeline_parallel_size=1,
            prefill_context_parallel_size=1,
            enable_batch_sharded_sampling=False,
            data_parallel_index=0,
            data_parallel_size=1,
        ),
        speculative_config=None,
        additional_config={"qsharp": {"critics": [str(folder) for folder in folders]}},
    )


def logits() -> Tensor:
    """Coarse, so that many are tied, as bfloat16 makes them."""
    return torch.randn(len(ROWS) + 1, models.VOCAB, generator=torch.Generator().manual_seed(3)).mul(2).round()


def hidden() -> Tensor:
    """What the logits would have been computed from, on every rank."""
    return torch.randn(len(ROWS) + 1, 64, generator=torch.Generator().manual_seed(4))


def row(index: int, request: TrackedRequest, history: list[int]) -> LogitsRow:
    return LogitsRow(index, request, len(history), lambda: history)


def steps(guide: StepGuide) -> tuple[list[Tensor], list[TrackedRequest]]:
    """The logits of two steps and one in which nothing is guided, and the requests, closed."""
    entered = (guide.open(SimpleNamespace(extra_args=args, temperature=1.0)) for args, _ in ROWS)
    opened = [request for request in entered if request is not None]
    found = []
    for longer in ([], [9]):
        tilted = logits()
        guide.apply(tilted, [row(i + 1, opened[i], history + longer) for i, (_, history) in enumerate(ROWS)], hidden)
        found.append(tilted)
    unguided = logits()
    guide.apply(unguided, [row(3, opened[2], HISTORY)], hidden)
    assert torch.equal(unguided, logits())
    for request in opened:
        guide.close(request)
    return found, opened


def rank_main(rank: int, folders: list[Path], root: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{root}/meet", rank=rank, world_size=2)
    alone = StepGuide(vllm_config(folders, 1), torch.device("cpu"))
    # Where vLLM keeps it, the test of the whole engine shows.
    upstream.tensor_parallel_group = lambda _: torch.distributed.group.WORLD  # type: ignore[assignment]
    guide = StepGuide(vllm_config(folders, 2), torch.device("cpu"))
    wanted, _ = steps(alone)
    if rank == 1:  # the other end of `topk`'s freedom: tied tokens in another order
        select = policy.select_candidates
        policy.select_candidates = lambda *args: reverse_ties(select(*args))
    found, requests = steps(guide)
    result = {
        "logits": found,
        "alone": wanted,
        "failures": [request.failure for request in requests],
        "critics": list(guide.registry.critics),
        "blocks": [c.cached_scorer.blocks.used for c in guide.registry.critics.values() if c.cached_scorer],
    }
    torch.save(result, root / f"rank{rank}")


def reverse_ties(candidates: Any) -> Any:
    """The same candidates' places, each held by the last of the tokens that are as likely as the first one found."""
    ids = candidates.ids_RK.clone()
    for row, scores in enumerate(candidates.log_ref_RV):
        for value in scores[ids[row]].unique():
            tied = (scores == value).nonzero()[:, 0].flip(0)
            places = (scores[ids[row]] == value).nonzero()[:, 0]
            ids[row, places] = tied[: len(places)]
    assert ids.shape[1] == 1 or not torch.equal(ids, candidates.ids_RK)
    return type(candidates)(candidates.log_ref_RV, ids, candidates.log_ref_RK, candidates.mask_RK)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("ranks")
    uneven = {"kind": "categorical", "atoms": [-1.0, 0.0, 0.5, 2.0]}
    return [
        models.write_critic(root / "plain", name="plain", seed=1),
        models.write_critic(root / "wide", name="wide", distribution=uneven, reward_range=(-1.5, 2.0), seed=2),
        models.write_critic(root / "deep", name="deep", mlp=32, seed=5),
        models.write_native_critic(root / "native", models.write_reference(root / "reference")),
    ]


def test_both_ranks_tilt_by_the_same_bits(folders: list[Path], tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=rank_main, args=(rank, folders, tmp_path), daemon=True) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / f"rank{rank}") for rank in (0, 1))

    assert first["failures"] == FAILURES
    assert first["critics"] == ["plain@1", "wide@1", "deep@1", "native@1"]
    assert first["blocks"] == [0, 0, 0]
    assert second["critics"] == []
    for ours, theirs, one in zip(first["logits"], second["logits"], first["alone"], strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(ours, one)
        untouched = [0] + [i + 1 for i, (args, _) in enumerate(ROWS) if FAILURES[i] or "qsharp_eta" not in args]
        assert torch.equal(ours[untouched], logits()[untouched])
        assert not torch.isclose(ours[[1, 2, 8]], logits()[[1, 2, 8]]).all(-1).any()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"pipeline_parallel_size": 2}, "tensor-parallel-size"),
        ({"prefill_context_parallel_size": 2}, "tensor-parallel-size"),
        ({"enable_batch_sharded_sampling": True}, "batch-sharded-sampling"),
    ],
)
def test_what_is_not_supported_is_refused(settings: dict[str, int], complaint: str) -> None:
    config = vllm_config([Path("unused")], 2)
    refuse_unsupported(config)
    vars(config.parallel_config).update(settings)
    with pytest.raises(ConfigError, match=complaint):
        refuse_unsupported(config)


@pytest.mark.parametrize("borrows", [False, True])
def test_loading_a_critic_draws_nothing_from_the_common_generators(tmp_path: Path, borrows: bool) -> None:
    """The ranks sample with them, in step; only the first one loads."""
    folder = models.write_critic(tmp_path / "critic", mlp=8)
    reference = models.write_reference(tmp_path / "reference")
    if borrows:
        weights = load_file(folder / BACKBONE / "model.safetensors")
        del weights["embed_tokens.weight"]
        save_file(weights, folder / BACKBONE / "model.safetensors", {"format": "pt"})
        card = json.loads((folder / CARD).read_text())
        (folder / CARD).write_text(json.dumps({**card, "borrow": ["input_embeddings"]}))
    before = torch.get_rng_state(), pickle.dumps([np.random.get_state(), random.getstate()])
    checkpoint.load(folder, reference=reference)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == pickle.dumps([np.random.get_state(), random.getstate()])
