"""The critic's arithmetic alone: what no implementation of guidance can leave out.

transformers' own forward passes over the same rows, lengths and candidates, one a step, each candidate seeing its row's
prefix and itself; with a Q head, the last token of each row. Nothing is selected, tilted, copied or looked up.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.guidance.pairs import PROMPT_TOKENS
from qsharp_core.critic.model import Critic


@torch.inference_mode()
def seconds(critic: Critic, rows: int, tokens: int, candidates: int) -> float:
    """Time of the forward passes of a wave of `rows` requests with `tokens` tokens each.

    The cache is made anew for each pass and not timed; appending to it, which is not arithmetic, is timed apart and
    taken off. On a GPU the pass of the wave's middle is captured as a graph, so that its launches are not counted
    either, and replayed for every step.
    """
    critic.backbone.set_attn_implementation("sdpa")
    if next(critic.parameters()).is_cuda:
        step = _Step(critic, rows, PROMPT_TOKENS + tokens // 2, candidates)
        return _replayed(step.run, tokens) - _replayed(step.append, tokens)
    total = 0.0
    for token in range(tokens):
        step = _Step(critic, rows, PROMPT_TOKENS + token, candidates)
        appending = _timed(step.append)
        total += _timed(step.run) - appending
    return total


class _Step:
    """A forward pass and what it reads: a cache of `length` positions of each row, the candidates, their mask."""

    def __init__(self, critic: Critic, rows: int, length: int, candidates: int) -> None:
        self.critic = critic
        self.new = candidates if critic.head.shape.kind == "V" else 1
        with torch.device(next(critic.parameters()).device):
            self.cache = _cache(critic, rows, length)
            self.ids = torch.randint(3, critic.vocab, (rows, self.new))
            self.mask = torch.zeros(rows, 1, self.new, length + self.new, dtype=torch.bool)
            self.mask[..., :length] = True
            self.mask[..., length:] = torch.eye(self.new, dtype=torch.bool)
            self.positions = torch.full((rows, self.new), length)
            self.asked = torch.randint(critic.vocab, (rows, candidates))
        self.old: list[tuple[Tensor, Tensor]] = []
        for layer in self.cache.layers:
            assert layer.keys is not None
            assert layer.values is not None
            self.old.append((layer.keys, layer.values))

    def run(self) -> Tensor:
        for layer, (keys, values) in zip(self.cache.layers, self.old, strict=True):
            layer.keys, layer.values = keys, values
        hidden = self.critic.backbone(
            input_ids=self.ids, attention_mask=self.mask, position_ids=self.positions, past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state  # fmt: skip
        if self.critic.head.shape.kind == "V":
            return self.critic.head.at_tokens(hidden)
        return self.critic.head.of_tokens(hidden[:, -1], self.asked)

    def append(self) -> list[Tensor]:
        return [torch.cat([old, old[:, :, : self.new]], dim=2) for pair in self.old for old in pair]


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _replayed(work: Callable[[], object], times: int) -> float:
    """Seconds of so many replays of a captured graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()  # lazy initialisations must not be captured
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = work()
    graph.replay()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(times):
        graph.replay()
    torch.cuda.synchronize()
    del kept
    return time.perf_counter() - started


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
