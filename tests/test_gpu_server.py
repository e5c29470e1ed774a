"""On an NVIDIA GPU: vLLM's V2 runner with CUDA kernels and graphs, through HTTP and offline."""

import asyncio
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import conftest, models
from tests.conftest import Server
from tests.test_e2e_exact import check, requests, run_all, unambiguous
from tests.test_gpu_critic import ON_A_GPU, no_waiting
from trainer.serving import serve

pytestmark = ON_A_GPU


def flags(reference: Path, critics: dict[str, Path], *more: str) -> list[str]:
    """As of the servers on CPU, but captured steps."""
    given = [flag for flag in conftest.flags(reference, critics, rows=16, blocks=24) if flag != "--enforce-eager"]
    # Graphs without compiling, which takes longer than all of this.
    graphs = ["--compilation-config", '{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}']
    return [*given, "--gpu-memory-utilization", "0.3", *graphs, *more]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_reference(tmp_path_factory.mktemp("reference"), kind="qwen2", seed=9)


def server_of(root: Path, reference: Path, *more: str) -> Iterator[Server]:
    critics = conftest.write_critics(root, reference)
    # vLLM's attention in float32 is Triton's, which would multiply in TF32.
    with serve(flags(reference, critics, *more), root / "log", {"TRITON_F32_DEFAULT": "ieee"}) as url:
        yield Server(url, reference, critics, root, root / "log")


@pytest.fixture(scope="module")
def server_float32(tmp_path_factory: pytest.TempPathFactory, reference: Path) -> Iterator[Server]:
    yield from server_of(tmp_path_factory.mktemp("float32"), reference)


@pytest.fixture(scope="module")
def server_bfloat16(tmp_path_factory: pytest.TempPathFactory, reference: Path) -> Iterator[Server]:
    """The reference's logits are exact, so that what differs is the critics'."""
    yield from server_of(tmp_path_factory.mktemp("bfloat16"), reference, "--critic-dtype", "bfloat16")


def test_every_field_of_every_token_in_float32(server_float32: Server) -> None:
    bodies = requests(server_float32, random.Random(8), longest=120, tokens=48)
    answers = asyncio.run(run_all(server_float32, bodies, at_once=16))
    compared = sum(
        check(server_float32, body, got) for body, choices in zip(bodies, answers, strict=True) for got in choices
    )
    assert compared > 1000


def test_captured_steps_of_critics_in_bfloat16(server_bfloat16: Server) -> None:
    """The path of critics in production; `deep` has a window and takes the other one."""
    log = server_bfloat16.log.read_text()
    assert log.count("critic without") == log.count("critic without fixed shapes") == 1, log
    # At the smallest eta log-probabilities magnify the critic's noise fifty times.
    bodies = [b for b in requests(server_bfloat16, random.Random(9), longest=120, tokens=48) if b["eta"] != 0.02]
    answers = asyncio.run(run_all(server_bfloat16, bodies, at_once=16))
    values: list[float] = []
    logprobs: list[float] = []
    for body, choices in zip(bodies, answers, strict=True):
        for got in choices:
            for entry, want in unambiguous(server_bfloat16, body, got):
                logprobs.append(abs(entry["logprob"] - want.logprob))
                if want.value is not None:
                    values.append(abs(entry["value"] - want.value))
    assert len(values) > 300
    for differences, usual, most in ((values, 0.002, 0.015), (logprobs, 0.002, 0.03)):
        assert statistics.median(differences) < usual
        assert statistics.quantiles(differences, n=100)[-1] < most


def test_a_guided_step_does_not_wait_for_the_device(
    tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import LLM, SamplingParams

    from qsharp_core.vllm_plugin import processors, v2

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    critic = models.write_critic(tmp_path / "critic", head="V", name="v")
    llm = LLM(
        str(reference), dtype="bfloat16", logits_processors=[processors.V2], max_model_len=512, max_num_seqs=8,
        kv_cache_memory_bytes=1 << 26, gpu_memory_utilization=0.3, skip_tokenizer_init=True,
        additional_config={"qsharp": {"critics": [str(critic)]}},
        compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
    )  # fmt: skip
    steps = 0
    original = v2.QSharpLogitsProcessor.apply

    def apply(self: Any, logits: Any, ctx: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps <= 2:  # prompts are read
            return original(self, logits, ctx)
        with no_waiting():
            return original(self, logits, ctx)

    monkeypatch.setattr(v2.QSharpLogitsProcessor, "apply", apply)
    guided = SamplingParams(temperature=1.0, max_tokens=48, ignore_eos=True, detokenize=False,
                            extra_args={"qsharp_eta": 0.2})  # fmt: skip
    outputs = llm.generate([{"prompt_token_ids": [5, 6, 7 + i]} for i in range(8)], guided, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [48] * 8
    assert steps >= 48
