"""Attention over the paged pool, for any backbone of transformers.

Registered with transformers' `AttentionInterface` under `PAGED`; the running pass reaches it as the keyword argument
`critic_pass`, which every decoder hands down to its attention layers. A backbone that does something here that these
functions do not know (score capping, attention sinks) is refused, and `CriticEngine` compares the cached path with a
plain forward pass before it serves any backbone at all.

Shapes: N packed tokens of all rows, R rows, M most tokens of a row, B most blocks of a row, L slots of these, H query
heads, G key heads, D head width.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from qsharp_core.critic.cpu import attention_with_lse
from qsharp_core.errors import CriticError

PAGED = "qsharp_paged"


@dataclass
class Pool:
    """Keys and values of every layer: `[slots, G, D]` each; slot = block · block_size + offset.

    Attributes:
        stacked: the same memory, all that have one shape together: `[…, slots, G, D]`.
    """

    keys: list[Tensor]
    values: list[Tensor]
    stacked: list[Tensor]

    @classmethod
    def zeros(cls, slots: int, shapes: list[tuple[torch.Size, torch.Size]], like: Tensor) -> "Pool":
        """An empty one; `shapes` are `(G, D)` of each layer's keys and of its values."""
        every = [shape for layer in shapes for shape in layer]
        stacked = {shape: like.new_zeros(every.count(shape), slots, *shape) for shape in dict.fromkeys(every)}
        parts = {shape: iter(tensor) for shape, tensor in stacked.items()}
        tensors = [next(parts[shape]) for shape in every]
        return cls(tensors[::2], tensors[1::2], [*stacked.values()])

    def move(self, source_N: Tensor, to_N: Tensor) -> None:
        """Copies slots to other ones, in every layer."""
        for tensor in self.stacked:
            tensor.index_copy_(1, to_N, tensor.index_select(1, source_N))

    def wipe(self, slots_N: Tensor) -> None:
        """Sets slots to zero, in every layer."""
        for tensor in self.stacked:
            tensor.index_fill_(1, slots_N, 0)


class Pass(Protocol):
    """One forward pass over packed tokens."""

    def attend(
        self, layer: int, query_NHD: Tensor, key_NGD: Tensor, value_NGD: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """The attention output of one layer, `[N, H, D]`."""


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    *,
    critic_pass: Pass,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: `query [1, H, N, D]`, `key`, `value [1, G, N, D]` -> `[1, N, H, D]`."""
    if softcap is not None or s_aux is not None:
        raise CriticError(f"{type(module).__name__} uses score capping or sinks, which critics cannot")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = critic_pass.attend(
        module.layer_idx,  # type: ignore[arg-type]
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scaling,
        sliding_window,
    )
    return output[None], None


# Which pass runs, and which layer, is no matter for a compiler: one compiled layer then serves all.
AttentionInterface.register(PAGED, torch.compiler.disable(paged_attention))


@dataclass
class ProbePass:
    """Learns what each layer stores, and whether it sees a window only, by letting one token attend to itself."""

    shapes: dict[int, tuple[torch.Size, torch.Size]] = field(default_factory=dict)
    windowed: bool = False

    def attend(
        self, layer: int, query_NHD: Tensor, key_NGD: Tensor, value_NGD: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        self.shapes[layer] = (key_NGD.shape[1:], value_NGD.shape[1:])
        self.windowed |= window is not None
        return value_NGD.repeat_interleave(query_NHD.shape[1] // key_NGD.shape[1], dim=1)


@dataclass
class PlainPass:
    """One row without a cache: a history, and behind all of it candidates, each of which sees itself besides.

    Args:
        history: how many of the tokens are the history's.
    """

    history: int

    def attend(
        self, layer: int, query_NHD: Tensor, key_NGD: Tensor, value_NGD: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        index_N = torch.arange(len(query_NHD), device=query_NHD.device)
        position_N = index_N.clamp(max=self.history)
        behind_NN = position_N[:, None] - position_N
        seen_NN = (behind_NN >= 0) & (index_N < self.history)
        if window is not None:
            seen_NN &= behind_NN < window
        seen_NN |= index_N[:, None] == index_N
        per_group = query_NHD.shape[1] // key_NGD.shape[1]
        key, value = (t.repeat_interleave(per_group, dim=1).transpose(0, 1) for t in (key_NGD, value_NGD))
        output = F.scaled_dot_product_attention(query_NHD.transpose(0, 1), key, value, attn_mask=seen_NN, scale=scaling)
        return output.transpose(0, 1)


@dataclass
class Layout:
    """Where packed tokens and their keys lie.

    Attributes:
        valid_RM: which entries are tokens; None where every row has M.
        packed_RM: index of a row's `m`-th token among the packed ones; padding points at token 0. None as `valid_RM`.
        position_RM: each token's position in its sequence.
        write_N: pool slots of the tokens' own keys and values.
        shared_B: the blocks with which all rows begin and whose positions every token sees; may be none.
        table_RB: blocks behind these whose slots a row's tokens may see; padding is block 0.
        start: the position of the first slot of `table_RB`.
        key_length_R: how many positions of a row's sequence its blocks hold, the shared ones' among them.
        own: where the candidates' slots begin, counted in the slots of `table_RB`; a candidate sees its own alone of
            these. None where all tokens are the sequence's.
        listed_R: how many of a row's tokens, the first ones, are the sequence's; the others are candidates.
    """

    valid_RM: Tensor | None
    packed_RM: Tensor | None
    position_RM: Tensor
    write_N: Tensor
    shared_B: Tensor
    table_RB: Tensor
    start: int
    key_length_R: Tensor
    own: int | None = None
    listed_R: Tensor | None = None

    def bias_RML(self, slots: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """0 where a token sees a slot, -inf elsewhere: its row's positions up to its own, within the window."""
        if self.own is None or self.listed_R is None:
            return _bias(self._seen_RML(slice(None), slots, window), dtype)
        bias = self._bias_of_candidates(self.own, slots, window, dtype)
        mixed = self.listed_R.nonzero()[:, 0]
        if len(mixed):
            bias[mixed] = _bias(self._seen_RML(mixed, slots, window), dtype)
        return bias

    def _seen_RML(self, rows: Tensor | slice, slots: int, window: int | None) -> Tensor:
        """Which slots these rows' tokens see: the definition."""
        slot_L = torch.arange(slots, device=self.table_RB.device)
        position_L = self.start + slot_L
        position_RM = self.position_RM[rows]
        seen = (position_L <= position_RM[..., None]) & (position_L < self.key_length_R[rows][:, None, None])
        if window is not None:
            seen &= position_L > position_RM[..., None] - window
        if self.own is not None and self.listed_R is not None:
            rank_RM = torch.arange(position_RM.shape[1], device=seen.device) - self.listed_R[rows][:, None]
            seen |= (rank_RM >= 0)[..., None] & (slot_L == self.own + rank_RM[..., None])
        if self.valid_RM is not None:
            seen[..., 0] |= ~self.valid_RM[rows]  # a padded query must see something: a row without a key is NaN
        return seen

    def _bias_of_candidates(self, own: int, slots: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """The bias of rows all of whose tokens are candidates, which most are: those of a row see the same prefix."""
        rows, most = self.position_RM.shape
        position_L = self.start + torch.arange(own, device=self.table_RB.device)
        hidden_RL = position_L >= self.key_length_R[:, None]
        if window is not None:
            hidden_RL |= position_L <= self.position_RM[:, :1] - window
        bias = torch.full((rows, most, slots), float("-inf"), dtype=dtype, device=hidden_RL.device)
        bias[..., :own] = _bias(~hidden_RL, dtype)[:, None]
        bias[..., own : own + most].diagonal(dim1=1, dim2=2).zero_()
        bias[:, slots - own :, 0] = 0  # more tokens than slots of their own: such are padding
        return bias


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


@dataclass
class PagedPass:
    """Runs packed tokens: writes their keys and values to the pool, then attends to whole blocks of it, masked.

    Rows may share blocks that this very pass writes: all are written before any is read. Blocks with which all rows
    begin are attended to by all tokens as one product, without a copy of them for each row, and the rest of each row
    is merged with them by log-sum-exp (Hydragen, arXiv 2402.05099).
    """

    pool: Pool
    block_size: int
    layout: Layout
    _bias: dict[int | None, Tensor] = field(default_factory=dict)

    def attend(
        self, layer: int, query_NHD: Tensor, key_NGD: Tensor, value_NGD: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        at = self.layout
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        keys[at.write_N] = key_NGD
        values[at.write_N] = value_NGD
        rows, most = at.position_RM.shape
        groups = key_NGD.shape[1]
        # All query heads of a key head as one: its keys are read once.
        query_RMHD = query_NHD.unflatten(0, (rows, most)) if at.packed_RM is None else query_NHD[at.packed_RM]
        query_RGXD = query_RMHD.unflatten(2, (groups, -1)).transpose(1, 2).flatten(2, 3)
        keys_RGLD, values_RGLD = self._gathered(keys, at.table_RB), self._gathered(values, at.table_RB)
        if window not in self._bias:
            bias_RML = at.bias_RML(keys_RGLD.shape[2], window, query_NHD.dtype)
            self._bias[window] = bias_RML.repeat_interleave(query_RGXD.shape[2] // most, dim=1)[:, None]
        bias = self._bias[window]
        if len(at.shared_B):
            keys_1GSD, values_1GSD = (self._gathered(slots, at.shared_B[None]) for slots in (keys, values))
            output_RGXD = _with_shared(query_RGXD, keys_1GSD, values_1GSD, keys_RGLD, values_RGLD, bias, scaling)
        else:
            output_RGXD = F.scaled_dot_product_attention(
                query_RGXD, keys_RGLD, values_RGLD, attn_mask=bias, scale=scaling
            )
        output_RMHD = output_RGXD.unflatten(2, (most, -1)).transpose(1, 2).flatten(2, 3)
        return output_RMHD.flatten(0, 1) if at.valid_RM is None else output_RMHD[at.valid_RM]

    def _gathered(self, slots: Tensor, table_RB: Tensor) -> Tensor:
        """All rows' blocks, `[R, G, L, D]`."""
        blocks = slots.view(-1, self.block_size * slots.shape[1] * slots.shape[2])
        gathered = blocks.index_select(0, table_RB.flatten())
        return gathered.view(len(table_RB), -1, *slots.shape[1:]).transpose(1, 2)


def _with_shared(
    query_RGXD: Tensor,
    keys_1GSD: Tensor,
    values_1GSD: Tensor,
    keys_RGLD: Tensor,
    values_RGLD: Tensor,
    bias_R1XL: Tensor,
    scaling: float,
) -> Tensor:
    """Attention to S positions that all rows share, all of them seen, and to each row's own L: `[R, G, X, D]`."""
    rows = len(query_RGXD)
    query_1GYD = query_RGXD.transpose(0, 1).flatten(1, 2)[None]
    shared_1GYD, shared_lse_1GY = attention_with_lse(query_1GYD, keys_1GSD, values_1GSD, None, scaling)
    own_RGXD, own_lse_RGX = attention_with_lse(query_RGXD, keys_RGLD, values_RGLD, bias_R1XL, scaling)
    shared_RGXD = shared_1GYD[0].unflatten(1, (rows, -1)).transpose(0, 1)
    shared_lse_RGX = shared_lse_1GY[0].unflatten(1, (rows, -1)).transpose(0, 1)
    weight_RGX1 = torch.sigmoid(shared_lse_RGX - own_lse_RGX)[..., None].to(own_RGXD.dtype)
    return torch.lerp(own_RGXD, shared_RGXD, weight_RGX1)
