"""What `make bench` compares us with guides as we do: peers that compute something else would prove nothing."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LogitsProcessorList

from benchmarks.guidance.peer_generate import TwoPassCritic
from qsharp_core.critic import checkpoint
from tests.support import models, oracle

ETA, CANDIDATES = 0.2, 8
PROMPT, MADE = list(range(30, 50)), [60, 61, 70, 33, 90]
OTHER, OTHER_MADE = list(range(100, 131)), [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("peers")
    return models.write_reference(root / "reference", seed=41), models.write_critic(root / "critic", seed=42)


@pytest.fixture(scope="module")
def reference(folders: tuple[Path, Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32).eval()


@torch.inference_mode()
def step_logits(reference: Any, history: list[int]) -> Tensor:
    """`[1, V]`"""
    logits: Tensor = reference(torch.tensor([history])).logits[:, -1]
    return logits


def wanted(folders: tuple[Path, Path], prompt: list[int], made: list[int], min_prob: float = 0.0) -> list[Tensor]:
    made_of = oracle.completion(*folders, prompt, made, eta=ETA, candidates=CANDIDATES, min_prob=min_prob)
    return [expected.pi.log() for expected in made_of]


def assert_same(guided_V: Tensor, log_pi_V: Tensor) -> None:
    torch.testing.assert_close(guided_V.double().log_softmax(-1), log_pi_V, atol=2e-4, rtol=0)


@pytest.mark.parametrize("min_prob", [0.0, 0.02, 0.9])
def test_generate_peer(folders: tuple[Path, Path], reference: Any, min_prob: float) -> None:
    critic = checkpoint.load(folders[1], reference=folders[0])[1]
    critic.backbone.set_attn_implementation("sdpa")
    guide = TwoPassCritic(critic, DynamicCache(config=critic.backbone.config), ETA, CANDIDATES, min_prob)
    for t, log_pi in enumerate(wanted(folders, PROMPT, MADE, min_prob)):
        history = PROMPT + MADE[:t]
        assert_same(guide(torch.tensor([history]), step_logits(reference, history))[0], log_pi)


def test_generate_peer_inside_generate(folders: tuple[Path, Path], reference: Any) -> None:
    """Two rows in a batch, greedy: `generate` feeds the processor what it expects."""
    critic = checkpoint.load(folders[1], reference=folders[0])[1]
    critic.backbone.set_attn_implementation("sdpa")
    guide = TwoPassCritic(critic, DynamicCache(config=critic.backbone.config), ETA, CANDIDATES)
    batch = torch.tensor([PROMPT, OTHER[: len(PROMPT)]])
    made = reference.generate(
        batch, attention_mask=torch.ones_like(batch), logits_processor=LogitsProcessorList([guide]), do_sample=False,
        min_new_tokens=8, max_new_tokens=8,
    )  # fmt: skip
    for row in made.tolist():
        prompt, tokens = row[: len(PROMPT)], row[len(PROMPT) :]
        for log_pi, token in zip(wanted(folders, prompt, tokens), tokens, strict=True):
            log_pi[1] = float("-inf")  # `min_new_tokens` masks the end token
            assert log_pi[token] >= log_pi.max() - 1e-3


def test_dense_peer(folders: tuple[Path, Path], reference: Any) -> None:
    """Two requests, one unguided between them; the rows move and one leaves."""
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    from benchmarks.guidance.peer_dense import DenseProcessor

    config = SimpleNamespace(
        additional_config={"qsharp": {"critics": [str(folders[1])]}},
        model_config=SimpleNamespace(dtype=torch.float32, model=folders[0], max_model_len=64),
        scheduler_config=SimpleNamespace(max_num_seqs=3),
    )
    processor = DenseProcessor(config, torch.device("cpu"), False)
    guided = SamplingParams(extra_args={"qsharp_eta": ETA, "qsharp_candidates": CANDIDATES})
    outputs: tuple[list[int], list[int]] = ([], [])
    processor.update_state(
        BatchUpdate(
            3, removed=[], moved=[],
            added=[(0, guided, PROMPT, outputs[0]), (1, SamplingParams(), OTHER, []), (2, guided, OTHER, outputs[1])],
        )
    )  # fmt: skip
    both = list(zip(wanted(folders, PROMPT, MADE), wanted(folders, OTHER, OTHER_MADE), strict=True))
    for t, (first, second) in enumerate(both[:3]):
        plain = step_logits(reference, OTHER)
        logits = torch.cat(
            [step_logits(reference, PROMPT + MADE[:t]), plain, step_logits(reference, OTHER + OTHER_MADE[:t])]
        )
        got = processor.apply(logits)
        assert_same(got[0], first)
        assert torch.equal(got[1], plain[0])
        assert_same(got[2], second)
        outputs[0].append(MADE[t])
        outputs[1].append(OTHER_MADE[t])
    # the first request ends and the last takes its row
    processor.update_state(BatchUpdate(2, removed=[0], added=[], moved=[(2, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    got = processor.apply(torch.cat([step_logits(reference, OTHER + OTHER_MADE[:3]), step_logits(reference, OTHER)]))
    assert_same(got[0], both[3][1])
    processor.update_state(BatchUpdate(1, removed=[0], added=[], moved=[]))
    assert sorted(processor.free) == [0, 1, 2]
