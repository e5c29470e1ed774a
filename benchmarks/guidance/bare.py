"""The critic's arithmetic alone: what no implementation of guidance can leave out.

transformers' own forward passes over the same rows, lengths and candidates, one a step, each candidate seeing its row's
prefix and itself; with a Q head, the last token of each row. Nothing is selected, tilted, copied or looked up.
"""

import time

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.guidance.pairs import PROMPT_TOKENS
from qsharp_core.critic.model import Critic


@torch.inference_mode()
def seconds(critic: Critic, rows: int, tokens: int, candidates: int) -> float:
    """Time of the forward passes of a wave of `rows` requests with `tokens` tokens each.

    The cache is made anew for each pass and not timed; appending to it, which is not arithmetic, is timed apart and
    taken off.
    """
    critic.backbone.set_attn_implementation("sdpa")
    kind = critic.head.shape.kind
    new = candidates if kind == "V" else 1
    total = 0.0
    for step in range(tokens):
        length = PROMPT_TOKENS + step
        cache = _cache(critic, rows, length)
        ids = torch.randint(3, critic.vocab, (rows, new))
        mask = torch.zeros(rows, 1, new, length + new, dtype=torch.bool)
        mask[..., :length] = True
        mask[..., length:] = torch.eye(new, dtype=torch.bool)
        positions = torch.full((rows, new), length)
        asked = torch.randint(critic.vocab, (rows, candidates))
        appending = _append_seconds(cache, rows, new)
        started = time.perf_counter()
        hidden = critic.backbone(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        if kind == "V":
            critic.head.at_tokens(hidden)
        else:
            critic.head.of_tokens(hidden[:, -1], asked)
        total += time.perf_counter() - started - appending
    return total


def _cache(critic: Critic, rows: int, length: int) -> DynamicCache:
    config = critic.backbone.config
    heads = config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dtype = next(critic.parameters()).dtype
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        shape = (rows, heads, length, dim)
        cache.update(torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype), layer)
    return cache


def _append_seconds(cache: DynamicCache, rows: int, new: int) -> float:
    made: list[Tensor] = []
    started = time.perf_counter()
    for layer in cache.layers:
        for old in (layer.keys, layer.values):
            assert old is not None
            made.append(torch.cat([old, old[:, :, :new]], dim=2))
    return time.perf_counter() - started
