"""On an NVIDIA GPU: vLLM's V2 runner with CUDA kernels and graphs, through HTTP and offline."""

import asyncio
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import conftest
from tests.conftest import ADMIN_KEY, Server
from tests.e2e.test_exact import check, metric, requests, run_all, send, unambiguous
from tests.gpu.test_critic import ON_A_GPU, no_waiting
from tests.support import models
from trainer.serving import serve

pytestmark = ON_A_GPU
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}


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
    bodies = requests(server_float32, random.Random(8), count=60, longest=120, tokens=48)
    answers = asyncio.run(run_all(server_float32, bodies, at_once=16))
    compared = sum(
        check(server_float32, body, got) for body, choices in zip(bodies, answers, strict=True) for got in choices
    )
    assert compared > 1000
    assert audited(server_float32) > 0


def audited(server: Server) -> float:
    """Rows that the server has scored again itself; none of them was wrong."""
    assert metric(server, "qsharp_audit_failures_total") == 0
    return metric(server, "qsharp_audited_rows_total")


def test_captured_steps_of_critics_in_bfloat16(server_bfloat16: Server) -> None:
    """The path of critics in production; `deep` has a window and takes the other one."""
    log = server_bfloat16.log.read_text()
    assert log.count("critic without") == log.count("critic without fixed shapes") == 1, log
    # At the smallest eta log-probabilities magnify the critic's noise fifty times.
    bodies = [
        b for b in requests(server_bfloat16, random.Random(9), count=60, longest=120, tokens=48) if b["eta"] != 0.02
    ]
    answers = asyncio.run(run_all(server_bfloat16, bodies, at_once=16))
    assert close(server_bfloat16, bodies, answers) > 300
    assert audited(server_bfloat16) > 0


def close(server: Server, bodies: list[dict[str, Any]], answers: list[list[dict[str, Any]]]) -> int:
    """Holds answers by critics in bfloat16 to the definition; returns how many tokens were guided."""
    values: list[float] = []
    logprobs: list[float] = []
    for body, choices in zip(bodies, answers, strict=True):
        for got in choices:
            for entry, want in unambiguous(server, body, got):
                logprobs.append(abs(entry["logprob"] - want.logprob))
                if want.value is not None:
                    values.append(abs(entry["value"] - want.value))
    for differences, usual, most in ((values, 0.002, 0.015), (logprobs, 0.002, 0.03)):
        assert statistics.median(differences) < usual
        assert statistics.quantiles(differences, n=100)[-1] < most
    return len(values)


@pytest.mark.parametrize("kind", ["separate", "native"])
def test_a_critic_is_loaded_into_the_running_engine(server_bfloat16: Server, kind: str) -> None:
    """A separate one is compiled and captured in a thread beside the steps of others, which stay right meanwhile."""
    server, name = server_bfloat16, f"late-{kind}"
    if kind == "native":
        folder = models.write_native_critic(server.root / name, server.reference, name=name, seed=41)
    else:
        folder = models.write_critic(server.root / name, kind="qwen2", name=name, seed=41)

    def asking(critic: str, seed: int) -> dict[str, Any]:
        return {
            "model": "tiny", "prompt": [*range(20, 60), 60 + seed % 100], "max_tokens": 64, "temperature": 1.0, "n": 1,
            "ignore_eos": True, "stream": False, "seed": seed, "eta": 0.2,
            "guidance": {"critic": critic, "detail": "tokens", "min_prob": 0.0},
        }  # fmt: skip

    async def load(client: httpx.AsyncClient) -> httpx.Response:
        try:
            return await client.post("/v1/critics", json={"path": str(folder)}, headers=ADMIN)
        finally:
            loaded.set()

    async def running(client: httpx.AsyncClient) -> None:
        """Keeps the engine in steps until the critic is there."""
        while not loaded.is_set():
            bodies = [asking(("plain", "fast", "native")[i % 3], len(beside) + i) for i in range(6)]
            answers = await asyncio.gather(*(send(client, gate, body) for body in bodies))
            beside.extend(zip(bodies, answers, strict=True))

    async def run() -> httpx.Response:
        async with httpx.AsyncClient(base_url=server.url, timeout=600) as client:
            answer, _ = await asyncio.gather(load(client), running(client))
            return answer

    loaded, gate = asyncio.Event(), asyncio.Semaphore(16)
    beside: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
    answer = asyncio.run(run())
    assert answer.status_code == 200, answer.text
    some = [*beside[:6], *beside[-6:]]
    assert close(server, [body for body, _ in some], [answers for _, answers in some]) > 100
    server.critics[name] = folder
    bodies = [asking(name, seed) for seed in range(8)]
    assert close(server, bodies, asyncio.run(run_all(server, bodies, at_once=8))) > 300
    assert httpx.delete(f"{server.url}/v1/critics/{name}/1", headers=ADMIN).status_code in (200, 202)
    del server.critics[name]


def test_a_guided_step_does_not_wait_for_the_device(
    tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import LLM, SamplingParams

    from qsharp_core.vllm_plugin import processors, v2

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    critics = [
        models.write_critic(tmp_path / "critic", head="V", name="v"),
        models.write_native_critic(tmp_path / "native", reference, name="native"),
    ]
    llm = LLM(
        str(reference), dtype="bfloat16", logits_processors=[processors.V2], max_model_len=512, max_num_seqs=8,
        kv_cache_memory_bytes=1 << 26, gpu_memory_utilization=0.3, skip_tokenizer_init=True,
        additional_config={"qsharp": {"critics": [*map(str, critics)]}},
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
    guided = [
        SamplingParams(
            temperature=1.0, max_tokens=48, ignore_eos=True, detokenize=False,
            extra_args={"qsharp_eta": 0.2, "qsharp_critic": ("v", "native")[i % 2]},
        )
        for i in range(8)
    ]  # fmt: skip
    outputs = llm.generate([{"prompt_token_ids": [5, 6, 7 + i]} for i in range(8)], guided, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [48] * 8
    assert steps >= 48
