"""One vLLM engine, with our logits processor, a peer's or none, and waves of requests through it."""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.guidance.pairs import BLOCK, Pair, Prompts, prompts

ETA = 0.2
_ids = itertools.count(1)
# On CPUs vLLM's worker goes on polling for a second after its last message, on the core that another engine's worker is
# bound to as well: wait that long before another engine is timed.
SETTLE_SECONDS = 0.0 if torch.cuda.is_available() else 1.5


@dataclass(frozen=True)
class Ask:
    """What a wave of requests asks: `rows` at once, `tokens` each; not guided without a critic.

    With a `kl_total` each request may spend that many nats.
    """

    rows: int
    tokens: int
    critic: str | None = None
    candidates: int = 8
    min_prob: float = 0.0
    prompts: Prompts = "alike"
    kl_total: float | None = None

    @property
    def extra_args(self) -> dict[str, Any] | None:
        """Guidance as vLLM's own API takes it."""
        if self.critic is None:
            return None
        return {
            "qsharp_eta": ETA, "qsharp_critic": self.critic, "qsharp_candidates": self.candidates,
            "qsharp_min_prob": self.min_prob,
        }  # fmt: skip


@contextmanager
def engine(pair: Pair, rows: int, processor: str | None, beside: bool | None = None) -> Iterator[Any]:
    """A `vllm.LLM` of the pair; without a processor it is plain vLLM. `beside` is our setting of that name."""
    from vllm import LLM

    critics = [str(path) for path in (*pair.critics.values(), pair.native)]
    settings = {"critics": critics, "cache_gib": pair.critic_gib, "beside": beside}
    guided = {"logits_processors": [processor], "additional_config": {"qsharp": settings}}
    llm = LLM(
        str(pair.reference), dtype=pair.dtype_name, max_model_len=1024, max_num_seqs=rows, block_size=BLOCK,
        kv_cache_memory_bytes=pair.cache_gib << 30, skip_tokenizer_init=True, disable_log_stats=True,
        **pair.engine, **(guided if processor else {}),
    )  # fmt: skip
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def seconds(llm: Any, pair: Pair, ask: Ask, seed: int) -> float:
    """Wall time of one wave. Its prompts have been seen before: what is timed is the decoding."""
    if ask.prompts == "task":  # their last tokens fill no block, and are run anew
        return seconds_less_first(llm, pair, ask, seed)
    wave(llm, pair, ask, seed, 1)
    return wave(llm, pair, ask, seed, ask.tokens)


def seconds_less_first(llm: Any, pair: Pair, ask: Ask, seed: int) -> float:
    """Wall time of one wave's decoding where more than its last token is run of a prompt: timed apart and taken off."""
    wave(llm, pair, ask, seed, 1)
    first = wave(llm, pair, ask, seed, 1)
    return wave(llm, pair, ask, seed, ask.tokens + 1) - first


def wave(llm: Any, pair: Pair, ask: Ask, seed: int, tokens: int) -> float:
    """Wall time of the ask's requests with `tokens` tokens each."""
    from vllm import SamplingParams

    given = [{"prompt_token_ids": ids} for ids in prompts(pair, ask.rows, seed, ask.prompts)]
    budget = [{} if ask.kl_total is None else {"qsharp_kl_total": ask.kl_total, "qsharp_id": next(_ids)} for _ in given]
    params = [
        SamplingParams(
            temperature=1.0, max_tokens=tokens, ignore_eos=True, detokenize=False,
            extra_args=ask.extra_args and ask.extra_args | more,
        )
        for more in budget
    ]  # fmt: skip
    started = time.perf_counter()
    llm.generate(given, params, use_tqdm=False)
    return time.perf_counter() - started
