"""A decode step in fixed shapes, for accelerators: nothing in it waits for the device.

Every row runs its last token, whose keys and values are written to the pool, and behind it its candidates, which attend
to the row's prefix and to themselves (a Q head runs the last token alone). Which candidate was chosen in the step
before need not be known: its token is run again, as one more beside the candidates, and the host knows lengths only.

On CUDA a step is compiled, so that few kernels lie between the matrix products, and captured as a graph for certain
numbers of rows and candidates. A step then costs its arithmetic, not its launches.

Shapes: R rows, M = 1 + K tokens per row, B blocks per row, N = R · M, H query heads, G key heads, D head width.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qsharp_core.critic.model import Critic
from qsharp_core.critic.scoring.kv_pool import KVPool
from qsharp_core.critic.scoring.prefix_attention import MergeWithSelf, PrefixAttention, with_self
from qsharp_core.errors import CriticError
from qsharp_core.transfer import pinned, to_device


@dataclass
class DecodePass:
    """A pass over `[R, M]` tokens, packed row by row.

    Attributes:
        pool: keys and values of all blocks.
        kernel: attention to the blocks of a row.
        merge: `with_self`.
        block_size: slots per block.
        write_R: pool slot of each row's last token, int64.
        table_RB: block tables, int32.
        length_R: number of tokens of each row, the last one included, int32.
    """

    pool: KVPool
    kernel: PrefixAttention
    merge: MergeWithSelf
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
        output, lse = self.kernel(query, keys, values, self.table_RB, self.length_R, self.block_size, scaling)
        return self.merge(output, lse, query, key, value, scaling).flatten(0, 1)


@dataclass
class _Inputs:
    """The tensors that a pass reads; those of a captured pass are static memory."""

    tokens_RM: Tensor
    asked_RK: Tensor
    write_R: Tensor
    table_RB: Tensor
    length_R: Tensor


@dataclass(frozen=True)
class _Functions:
    """The functions that a pass calls."""

    backbone: Callable[..., Any]
    merge: MergeWithSelf

    def compiled(self) -> "_Functions":
        """The same functions, compiled at their first calls for all layers and shapes; a size of 1 is compiled apart.

        Critics of equal shapes share what was compiled. In a process that loads critics of very many shapes torch
        reaches its limit of variants per function; it then says so and runs further ones without compiling.
        """
        return _Functions(*(torch.compile(part, dynamic=True) for part in (self.backbone, self.merge)))


@dataclass
class _Graph:
    """A captured pass: fill `inputs`, replay `graph`, read `outputs`."""

    graph: "torch.cuda.CUDAGraph"
    inputs: _Inputs
    outputs: Tensor


class Decoder:
    """Runs the decode steps of one critic.

    Args:
        critic: its backbone's attention is the paged one.
        pool: keys and values. Padding rows write to its last block, which no sequence may hold.
        block_size: slots per block.
        longest: number of positions that a row may have.
        kernel: attention to the blocks of a row.
        compiled: whether passes to be captured are compiled. Other passes never are: their callers would wait for it.
    """

    def __init__(
        self,
        critic: Critic,
        pool: KVPool,
        block_size: int,
        longest: int,
        kernel: PrefixAttention,
        compiled: bool = False,
    ) -> None:
        self.critic, self.pool, self.kernel, self.block_size = critic, pool, kernel, block_size
        self._plain = _Functions(critic.backbone, with_self)
        self._fused = self._plain.compiled() if compiled else self._plain
        self.device = pool.keys[0].device
        self._width = -(-longest // block_size)
        self._scratch = len(pool.keys[0]) // block_size - 1
        self._graphs: dict[tuple[int, int], _Graph] = {}

    def score(self, last_R: Tensor, ids_RK: Tensor, lengths: NDArray[np.int32], tables: list[list[int]]) -> Tensor:
        """The head's outputs `[R, K, n_out]` of every candidate, on the device.

        Args:
            last_R: each row's last token, int64, on the device; the pool holds all tokens before it.
            ids_RK: candidates, int64, on the device.
            lengths: number of tokens of each row, the last one included.
            tables: blocks of each row, for so many positions.
        """
        rows, candidates = ids_RK.shape
        graph = self._graph_for(rows, candidates)
        if graph is None:
            return self._forward(self._plain, self._inputs(last_R, ids_RK, lengths, tables))
        fixed = graph.inputs
        fixed.tokens_RM[:rows, : 1 + candidates] = self._tokens(last_R, ids_RK)
        fixed.asked_RK[:rows, :candidates] = ids_RK
        places = self._places(lengths, tables, padded=len(fixed.length_R))
        for static, place in zip((fixed.write_R, fixed.table_RB, fixed.length_R), places, strict=True):
            static.copy_(pinned(place), non_blocking=True)
        graph.graph.replay()
        return graph.outputs[:rows, :candidates].clone()

    def hidden(self, last_R: Tensor, ids_RK: Tensor, lengths: NDArray[np.int32], tables: list[list[int]]) -> Tensor:
        """The backbone's last hidden states `[R, M, D]`, by the functions of passes to be captured, without a graph.

        Args:
            last_R, ids_RK, lengths, tables: as in `score`.
        """
        return self._hidden(self._fused, self._inputs(last_R, ids_RK, lengths, tables))

    @torch.inference_mode()
    def capture(self, rows: Collection[int], candidates: Collection[int]) -> None:
        """Captures passes as CUDA graphs, one for each number of rows with each number of candidates.

        Larger ones come first, so that all share the memory of the largest.
        """
        if not rows:
            return
        memory = torch.cuda.graph_pool_handle()
        for candidate_count in sorted(candidates, reverse=True):
            for row_count in sorted(rows, reverse=True):
                inputs = self._blank(row_count, candidate_count)
                stream = torch.cuda.Stream(self.device)
                stream.wait_stream(torch.cuda.current_stream(self.device))
                with torch.cuda.stream(stream):
                    self._forward(self._fused, inputs)  # lazy initialisations must not be captured
                torch.cuda.current_stream(self.device).wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                # A critic may be loaded in a thread of its own, while requests are served in another.
                with torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
                    outputs = self._forward(self._fused, inputs)
                self._graphs[row_count, candidate_count] = _Graph(graph, inputs, outputs)

    def _forward(self, functions: _Functions, inputs: _Inputs) -> Tensor:
        hidden_RMD = self._hidden(functions, inputs)
        if self.critic.head.shape.kind == "Q":
            return self.critic.head.of_tokens(hidden_RMD[:, 0], inputs.asked_RK)
        return self.critic.head.at_tokens(hidden_RMD[:, 1:])

    def _hidden(self, functions: _Functions, inputs: _Inputs) -> Tensor:
        per_row = inputs.tokens_RM.shape[1]
        position_RM = inputs.length_R.long()[:, None].repeat(1, per_row)
        position_RM[:, 0] -= 1
        hidden = functions.backbone(
            input_ids=inputs.tokens_RM.reshape(1, -1),
            position_ids=position_RM.reshape(1, -1),
            use_cache=False,
            critic_pass=DecodePass(
                self.pool, self.kernel, functions.merge, self.block_size, inputs.write_R, inputs.table_RB,
                inputs.length_R,
            ),
        ).last_hidden_state[0]  # fmt: skip
        return hidden.unflatten(0, (-1, per_row))

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
        """`write_R`, `table_RB` and `length_R` of a pass, on the host; rows up to `padded` use the last block."""
        table = np.full((padded, self._width), self._scratch, dtype=np.int32)
        for row, blocks in enumerate(tables):
            table[row, : len(blocks)] = blocks
        length = np.ones(padded, dtype=np.int32)
        length[: len(lengths)] = lengths
        block, offset = np.divmod(length - 1, self.block_size)
        write = table[np.arange(padded), block].astype(np.int64) * self.block_size + offset
        return torch.from_numpy(write), torch.from_numpy(table), torch.from_numpy(length)

    def _blank(self, rows: int, candidates: int) -> _Inputs:
        """Inputs of padding rows only."""
        per_row = 1 if self.critic.head.shape.kind == "Q" else 1 + candidates

        def filled(shape: tuple[int, ...], value: int, dtype: torch.dtype) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=self.device)

        return _Inputs(
            tokens_RM=filled((rows, per_row), 0, torch.int64),
            asked_RK=filled((rows, candidates), 0, torch.int64),
            write_R=filled((rows,), self._scratch * self.block_size, torch.int64),
            table_RB=filled((rows, self._width), self._scratch, torch.int32),
            length_R=filled((rows,), 1, torch.int32),
        )

    def _graph_for(self, rows: int, candidates: int) -> _Graph | None:
        """The cheapest captured pass that is large enough."""
        fitting = [(r, k) for r, k in self._graphs if r >= rows and k >= candidates]
        return self._graphs[min(fitting, key=lambda s: s[0] * (1 + s[1]))] if fitting else None
