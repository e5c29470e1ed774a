"""One real server per model runner for the whole session, on tiny models written by hand.

Its settings make everything hard at once: prompts longer than a step's token budget, a key/value cache so small that
concurrent requests are preempted, critics' caches so small that rows of one step do not fit together, prefix caching,
seven critics of different kinds side by side. And the server audits every guided row that it finds the time for.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest

# One thread each: with the server beside them, more threads on few cores are many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import HealthCheck, settings

from tests.support import models
from trainer.serving import serve

# How long an example takes says something about the machine, not about the code.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

SUPPORT = Path(__file__).parent / "support"
ADMIN_KEY = "admin-secret"
BUDGET, BLOCK = 48, 32
CACHE_GIB = 1.44e-6  # of a critic's cache, for each token of the longest sequence


def settings_of(longest: int) -> str:
    """A cache holds little more than one such sequence of the critic with the widest keys, 1.5 KB a token; the memory
    for candidates is that of four rows with 64.
    """
    ours = {"beside": True, "audit_rate": 1, "cache_gib": CACHE_GIB * longest, "scratch_tokens": 256}
    return json.dumps({"qsharp": ours})


V2_ENVIRONMENT = {
    # A worktree that borrows another's environment says by this variable where its code is: then servers use it, too.
    "PYTHONPATH": os.pathsep.join(filter(None, [str(SUPPORT / "triton_cpu"), os.getenv("PYTHONPATH")])),
    "TRITON_INTERPRET": "1",
    "TRITON_DEFAULT_BACKEND": "cpu",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_PLUGINS": "qsharp_triton_cpu",
}


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """Whatever a test sets, the servers of later tests do not inherit it."""
    with patch.dict(os.environ):
        yield


@dataclass(frozen=True)
class Server:
    """A running server and the folders it serves."""

    url: str
    reference: Path
    critics: dict[str, Path]
    root: Path
    log: Path


def write_critics(root: Path, reference: Path) -> dict[str, Path]:
    """Both heads, both distributions, four architectures, one with learned positions and one with a window; and two
    on the reference's own hidden states.
    """
    uneven = {"kind": "categorical", "atoms": [-1.0, 0.0, 0.5, 2.0]}
    return {
        "plain": models.write_critic(root / "plain", name="plain", seed=1),
        "wide": models.write_critic(
            root / "wide", kind="gpt2", distribution=uneven, reward_range=(-1.5, 2.0), name="wide", seed=2
        ),
        "fast": models.write_critic(root / "fast", kind="qwen2", head="Q", name="fast", seed=3),
        "both": models.write_critic(
            root / "both", kind="opt", head="Q", distribution=uneven, reward_range=(-1.0, 2.0), name="both", seed=4
        ),
        "deep": models.write_critic(root / "deep", kind="mistral", mlp=32, name="deep", seed=5),
        "native": models.write_native_critic(root / "native", reference, name="native", seed=6),
        "uneven": models.write_native_critic(
            root / "uneven", reference, distribution=uneven, reward_range=(-1.0, 2.0), width=80, name="uneven", seed=7
        ),
    }


def flags(reference: Path, critics: dict[str, Path], rows: int, blocks: int, longest: int = 512) -> list[str]:
    """What both servers are started with. Critics may be loaded from all temporary folders of this run of the tests."""
    named = [flag for path in critics.values() for flag in ("--critic", str(path))]
    return [
        str(reference), *named, "--critic-root", str(reference.parents[1]), "--admin-key", ADMIN_KEY,
        "--served-model-name", "tiny", "--dtype", "float32",
        "--enforce-eager", "--max-model-len", str(longest), "--max-num-seqs", str(rows), "--max-num-batched-tokens",
        str(BUDGET), "--block-size", str(BLOCK), "--num-gpu-blocks-override", str(blocks), "--enable-prefix-caching",
        "--kv-cache-memory-bytes", "50000000", "--max-queued", "1000", "--additional-config", settings_of(longest),
    ]  # fmt: skip


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The V1 model runner (vLLM's on CPU), a Llama reference."""
    root = tmp_path_factory.mktemp("v1")
    reference = models.write_reference(root / "reference")
    critics = write_critics(root, reference)
    more = ["--rollouts", f"sqlite:///{root / 'rollouts.db'}", "--critic-load-seconds", "20"]
    paths = [str(SUPPORT / "faults"), *filter(None, [os.environ.get("PYTHONPATH")])]
    faults = {"PYTHONPATH": os.pathsep.join(paths), "QSHARP_FAULT": str(root / "fault")}
    with serve([*flags(reference, critics, rows=16, blocks=24), *more], root / "log", faults) as url:
        yield Server(url, reference, critics, root, root / "log")


@pytest.fixture(scope="session")
def server_v2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The V2 model runner under Triton's interpreter, a Qwen reference."""
    root = tmp_path_factory.mktemp("v2")
    reference = models.write_reference(root / "reference", kind="qwen2", seed=9)
    critics = write_critics(root, reference)
    with serve(flags(reference, critics, rows=8, blocks=18, longest=256), root / "log", V2_ENVIRONMENT) as url:
        yield Server(url, reference, critics, root, root / "log")
