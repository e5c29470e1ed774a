"""A decode step in fixed shapes, for accelerators: nothing in it waits for the device.

Every row runs its last token, whose keys and values are written to the pool, and behind it its candidates, which attend
to the row's prefix and to themselves (a Q head runs the last token alone). Which candidate was chosen in the step
before need not be known: its token is run again, one more beside the candidates, and the host knows lengths only.

On CUDA the pass is compiled, so that what lies between the matrix products is few kernels, and captured as a graph for
each bucket of rows: a step then costs its arithmetic, not its launches.

Shapes: R rows, M = 1 + K tokens a row, B blocks a row, H query heads, G key heads, D head width.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qsharp_core.critic.attention import Pool
from qsharp_core.critic.model import Critic
from qsharp_core.errors import CriticError

# An attention kernel: `gathered` is the definition.
PrefixAttention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, float], tuple[Tensor, Tensor]]
# `with_self`, or what it was compiled to.
Merge = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]


def gathered(
    query_RMHD: Tensor,
    keys: Tensor,
    values: Tensor,
    table_RB: Tensor,
    length_R: Tensor,
    block_size: int,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Attention of a row's queries to the first `length_R` positions of its blocks, in plain torch.

    Args:
        query_RMHD: M queries a row; all see the same positions.
        keys, values: one layer's pool, `[slots, G, D]`.
        table_RB: block tables, int32.
        length_R: positions that are seen, int32, one at least.
        block_size: slots a block.
        scaling: of the scores.

    Returns:
        The output `[R, M, H, D]`, and the log of the sum of the exponentiated scores, `[R, M, H]` float32.
    """
    offset = torch.arange(block_size, device=table_RB.device)
    slots_RL = (table_RB.long()[:, :, None] * block_size + offset).flatten(1)
    groups = keys.shape[1]
    query = query_RMHD.unflatten(2, (groups, -1))
    scores = torch.einsum("rmgpd,rlgd->rmgpl", query, keys[slots_RL]).float() * scaling
    seen_RL = torch.arange(slots_RL.shape[1], device=table_RB.device) < length_R[:, None]
    scores = scores.masked_fill(~seen_RL[:, None, None, None], float("-inf"))
    output = torch.einsum("rmgpl,rlgd->rmgpd", scores.softmax(-1).to(values.dtype), values[slots_RL])
    return output.flatten(2, 3), scores.logsumexp(-1).flatten(2, 3)


def with_self(
    output_RMHD: Tensor, lse_RMH: Tensor, query_RMHD: Tensor, key_RMGD: Tensor, value_RMGD: Tensor, scaling: float
) -> Tensor:
    """Merges each candidate's attention to its prefix with that to itself, by log-sum-exp.

    A row's first token is its last one so far: the prefix holds it already.
    """
    per_group = query_RMHD.shape[2] // key_RMGD.shape[2]
    own_RMH = (query_RMHD * key_RMGD.repeat_interleave(per_group, dim=2)).sum(-1).float() * scaling
    weight_RMH1 = torch.sigmoid(own_RMH - lse_RMH)[..., None]
    weight_RMH1[:, 0] = 0.0
    value_RMHD = value_RMGD.repeat_interleave(per_group, dim=2).float()
    return torch.lerp(output_RMHD.float(), value_RMHD, weight_RMH1).to(output_RMHD.dtype)


@dataclass
class DecodePass:
    """One forward pass of `[R, M]` tokens, packed row by row."""

    pool: Pool
    prefix: PrefixAttention
    merge: Merge
    block_size: int
    write_R: Tensor
    table_RB: Tensor
    length_R: Tensor

    def attend(
        self, layer: int, query_NHD: Tensor, key_NGD: Tensor, value_NGD: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        # The last token and its candidates would see different windows.
        if window is not None and window < self.table_RB.shape[1] * self.block_size:
            raise CriticError("a backbone with sliding-window attention cannot be run in fixed shapes")
        rows = len(self.length_R)
        query, key, value = (t.unflatten(0, (rows, -1)) for t in (query_NHD, key_NGD, value_NGD))
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        keys[self.write_R] = key[:, 0]
        values[self.write_R] = value[:, 0]
        output, lse = self.prefix(query, keys, values, self.table_RB, self.length_R, self.block_size, scaling)
        return self.merge(output, lse, query, key, value, scaling).flatten(0, 1)


@dataclass
class _Inputs:
    """What a pass reads, for as many rows as it has; static memory where it is captured."""

    tokens_RM: Tensor
    asked_RK: Tensor
    write_R: Tensor
    table_RB: Tensor
    length_R: Tensor


@dataclass(frozen=True)
class _Functions:
    """What a pass is made of."""

    backbone: Callable[..., Any]
    merge: Merge

    def compiled(self) -> "_Functions":
        """Compiled at their first calls, for all layers and shapes at once; a size of one is a case of its own.

        Critics of equal shapes share what was compiled. A process that loads critics of very many shapes reaches
        torch's limit of cases a function: torch then says so and runs further ones as they are.
        """
        return _Functions(*(torch.compile(part, dynamic=True) for part in (self.backbone, self.merge)))


@dataclass
class _Graph:
    """A captured pass: fill `inputs`, replay, read `outputs`."""

    graph: "torch.cuda.CUDAGraph"
    inputs: _Inputs
    outputs: Tensor


class Decoder:
    """Runs decode steps of one critic.

    Args:
        critic: its backbone's attention is the paged one.
        pool: its last block is for nothing that outlives a pass: padding rows write there.
        block_size: slots a block.
        longest: positions a row may have.
        prefix: the attention kernel.
        compiled: whether passes to be captured are compiled; others never are, as that would hold up whoever asks.
    """

    def __init__(
        self,
        critic: Critic,
        pool: Pool,
        block_size: int,
        longest: int,
        prefix: PrefixAttention,
        compiled: bool = False,
    ) -> None:
        self.critic, self.pool, self.prefix, self.block_size = critic, pool, prefix, block_size
        self._plain = _Functions(critic.backbone, with_self)
        self._fused = self._plain.compiled() if compiled else self._plain
        self.device = pool.keys[0].device
        self._width = -(-longest // block_size)
        self._scratch = len(pool.keys[0]) // block_size - 1
        self._graphs: dict[tuple[int, int], _Graph] = {}

    def score(self, last_R: Tensor, ids_RK: Tensor, lengths: NDArray[np.int32], tables: list[list[int]]) -> Tensor:
        """The head's outputs `[R, K, n_out]` for every candidate, on the device.

        Args:
            last_R: each row's last token, on the device; the pool holds all before it.
            ids_RK: candidates, on the device.
            lengths: tokens of each row, the last one included.
            tables: each row's blocks, for that many positions.
        """
        rows, candidates = ids_RK.shape
        graph = self._graph_for(rows, candidates)
        if graph is None:
            return self._forward(self._plain, self._inputs(last_R, ids_RK, lengths, tables))
        fixed = graph.inputs
        fixed.tokens_RM[:rows, : 1 + candidates] = self._tokens(last_R, ids_RK)
        fixed.asked_RK[:rows, :candidates] = ids_RK
        places = self._places(lengths, tables, padded=len(fixed.length_R))
        for there, here in zip((fixed.write_R, fixed.table_RB, fixed.length_R), places, strict=True):
            there.copy_(_pinned(here), non_blocking=True)
        graph.graph.replay()
        return graph.outputs[:rows, :candidates].clone()

    def hidden(self, last_R: Tensor, ids_RK: Tensor, lengths: NDArray[np.int32], tables: list[list[int]]) -> Tensor:
        """The backbone's last hidden states `[R, M, D]` instead, as in passes to be captured; no graph."""
        return self._hidden(self._fused, self._inputs(last_R, ids_RK, lengths, tables))

    @torch.inference_mode()
    def capture(self, rows: Collection[int], candidates: Collection[int]) -> None:
        """Captures the passes of these shapes as CUDA graphs; larger ones first, so that they share memory."""
        if not rows:
            return
        memory = torch.cuda.graph_pool_handle()
        for count in sorted(candidates, reverse=True):
            for many in sorted(rows, reverse=True):
                inputs = self._blank(many, count)
                stream = torch.cuda.Stream(self.device)
                stream.wait_stream(torch.cuda.current_stream(self.device))
                with torch.cuda.stream(stream):
                    self._forward(self._fused, inputs)  # lazy initialisations must not be captured
                torch.cuda.current_stream(self.device).wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                # A critic may be loaded by a thread, while the engine's own goes on.
                with torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
                    outputs = self._forward(self._fused, inputs)
                self._graphs[many, count] = _Graph(graph, inputs, outputs)

    def _forward(self, functions: _Functions, inputs: _Inputs) -> Tensor:
        hidden_RMD = self._hidden(functions, inputs)
        if self.critic.head.shape.kind == "Q":
            return self.critic.head.of_tokens(hidden_RMD[:, 0], inputs.asked_RK)
        return self.critic.head.at_tokens(hidden_RMD[:, 1:])

    def _hidden(self, functions: _Functions, inputs: _Inputs) -> Tensor:
        many = inputs.tokens_RM.shape[1]
        position_RM = inputs.length_R.long()[:, None].repeat(1, many)
        position_RM[:, 0] -= 1
        hidden = functions.backbone(
            input_ids=inputs.tokens_RM.reshape(1, -1),
            position_ids=position_RM.reshape(1, -1),
            use_cache=False,
            critic_pass=DecodePass(
                self.pool, self.prefix, functions.merge, self.block_size, inputs.write_R, inputs.table_RB,
                inputs.length_R,
            ),
        ).last_hidden_state[0]  # fmt: skip
        return hidden.unflatten(0, (-1, many))

    def _inputs(self, last_R: Tensor, ids_RK: Tensor, lengths: NDArray[np.int32], tables: list[list[int]]) -> _Inputs:
        places = self._places(lengths, tables, padded=len(lengths))
        return _Inputs(self._tokens(last_R, ids_RK), ids_RK, *(to_device(place, self.device) for place in places))

    def _tokens(self, last_R: Tensor, ids_RK: Tensor) -> Tensor:
        """The tokens a pass runs, `[R, M]`."""
        last_R1 = last_R[:, None]
        return last_R1 if self.critic.head.shape.kind == "Q" else torch.cat([last_R1, ids_RK], dim=1)

    def _places(
        self, lengths: NDArray[np.int32], tables: list[list[int]], padded: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """On the host: the slots of the last tokens, the block tables, the lengths; padding rows use the last block."""
        table = np.full((padded, self._width), self._scratch, dtype=np.int32)
        for row, blocks in enumerate(tables):
            table[row, : len(blocks)] = blocks
        length = np.ones(padded, dtype=np.int32)
        length[: len(lengths)] = lengths
        block, offset = np.divmod(length - 1, self.block_size)
        write = table[np.arange(padded), block].astype(np.int64) * self.block_size + offset
        return torch.from_numpy(write), torch.from_numpy(table), torch.from_numpy(length)

    def _blank(self, rows: int, candidates: int) -> _Inputs:
        many = 1 if self.critic.head.shape.kind == "Q" else 1 + candidates

        def filled(shape: tuple[int, ...], value: int, dtype: torch.dtype) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=self.device)

        return _Inputs(
            tokens_RM=filled((rows, many), 0, torch.int64),
            asked_RK=filled((rows, candidates), 0, torch.int64),
            write_R=filled((rows,), self._scratch * self.block_size, torch.int64),
            table_RB=filled((rows, self._width), self._scratch, torch.int32),
            length_R=filled((rows,), 1, torch.int32),
        )

    def _graph_for(self, rows: int, candidates: int) -> _Graph | None:
        fitting = [(r, k) for r, k in self._graphs if r >= rows and k >= candidates]
        return self._graphs[min(fitting, key=lambda s: s[0] * (1 + s[1]))] if fitting else None


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor's copy on the device, without waiting for the device."""
    return tensor if device.type == "cpu" else _pinned(tensor).to(device, non_blocking=True)


def _pinned(tensor: Tensor) -> Tensor:
    return tensor.pin_memory() if torch.cuda.is_available() else tensor
