"""Peer: Hugging Face `generate` with a logits processor that runs a cached critic twice a step.

The way of the method's research code, as its authors describe it: the last token goes through the critic, so that its
cache grows; then every candidate of every row is a row of its own over an expanded copy of that cache. A batch is
decoded to its end before the next begins. Prompts are in the caches of both models before the clock starts, as they
are in ours.
"""

import copy
import os
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList

from benchmarks.guidance.ours import ETA, Ask
from benchmarks.guidance.pairs import OWN_TOKENS, Pair, prompts
from benchmarks.guidance.two_pass import tilted
from qsharp_core.critic.model import Critic

BATCHES = (1, 4, 8, 16, 32)
TRIAL_TOKENS = 4


@dataclass(frozen=True)
class Way:
    """How a peer's `generate` is called: requests per call, and torch's threads."""

    batch: int
    threads: int


class TwoPassCritic(LogitsProcessor):
    """Guidance of one `generate` call.

    Args:
        critic: with a V head.
        cache: keys and values of the tokens it has seen; it grows.
    """

    def __init__(self, critic: Critic, cache: DynamicCache, eta: float, candidates: int, min_prob: float = 0.0) -> None:
        assert critic.head.shape.kind == "V"
        self.critic, self.cache = critic, cache
        self.eta, self.candidates, self.min_prob = eta, candidates, min_prob

    @torch.inference_mode()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._forward(input_ids[:, self.cache.get_seq_length() :], self.cache)
        ids_RK = scores.topk(self.candidates).indices
        hidden = self._forward(ids_RK.reshape(-1, 1), fork(self.cache, self.candidates))
        outputs = self.critic.head.at_tokens(hidden[:, -1]).unflatten(0, ids_RK.shape)
        eta_R = torch.full((len(ids_RK),), self.eta, dtype=torch.float64)
        return tilted(scores, ids_RK, outputs, self.critic.distribution, eta_R, self.min_prob)

    def _forward(self, ids: Tensor, cache: DynamicCache) -> Tensor:
        ids = ids.clamp(max=self.critic.vocab - 1)  # the reference's table may be padded past the tokenizer's end
        return self.critic.backbone(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state


class GeneratePeer:
    """Both models of a pair in this process."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.model: Any = AutoModelForCausalLM.from_pretrained(pair.reference, dtype=pair.dtype).eval()
        # `generate` fills what a call leaves open from the model's own defaults, an end token for one.
        self.model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        self.critic = pair.critic("V")
        self.critic.backbone.set_attn_implementation("sdpa")

    def best(self, ask: Ask) -> Way:
        """The fastest way for that many requests, by short trials of one batch each; the shortest of two counts."""
        found: dict[Way, float] = {}
        for threads in range(1, min(2, os.cpu_count() or 1) + 1):
            for batch in (b for b in BATCHES if b <= ask.rows):
                trial = replace(ask, rows=batch, tokens=TRIAL_TOKENS)
                way = Way(batch, threads)
                found[way] = min(self.seconds(trial, seed, way) for seed in range(2)) / batch
        return min(found, key=lambda way: found[way])

    @torch.inference_mode()
    def seconds(self, ask: Ask, seed: int, way: Way) -> float:
        """Wall time of one wave, batch after batch."""
        ids = torch.tensor(prompts(self.pair, ask.rows, seed, ask.prompts))
        before = torch.get_num_threads()
        torch.set_num_threads(way.threads)
        total = 0.0
        caches = [self._seen(model, ids) for model in (self.model, self.critic.backbone)]
        for rows in torch.arange(ask.rows).split(way.batch):
            reference, critic = (fork(cache) for cache in caches)
            reference.batch_select_indices(rows)
            critic.batch_select_indices(rows)
            guidance = TwoPassCritic(self.critic, critic, ETA, ask.candidates, ask.min_prob)
            started = time.perf_counter()
            made = self.model.generate(
                ids[rows], attention_mask=torch.ones_like(ids[rows]), past_key_values=reference,
                logits_processor=LogitsProcessorList([guidance]), max_new_tokens=ask.tokens,
            )  # fmt: skip
            total += time.perf_counter() - started
            assert made.shape[1] == ids.shape[1] + ask.tokens, made.shape
        torch.set_num_threads(before)
        return total

    def _seen(self, model: Any, ids: Tensor) -> DynamicCache:
        """A cache of all of the prompts but their last tokens; what they have in common is run once."""
        alike = (ids == ids[0]).all(0)[:-OWN_TOKENS]
        shared = int(alike.long().cumprod(0).sum())
        cache = DynamicCache(config=model.config)
        model(input_ids=ids[:1, :shared], past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(ids))
        model(input_ids=ids[:, shared:-1], past_key_values=cache, use_cache=True)
        return cache


def fork(cache: DynamicCache, repeats: int = 1) -> DynamicCache:
    """A cache that grows apart from the given one, each row `repeats` times."""
    made = copy.copy(cache)
    made.layers = [copy.copy(layer) for layer in cache.layers]
    if repeats > 1:
        made.batch_repeat_interleave(repeats)
    return made
