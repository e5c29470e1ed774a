"""The attention functions that a critic's backbone runs: with the paged cache, and without a cache.

`paged_attention` is registered with transformers' `AttentionInterface` under the name `PAGED`. The running pass reaches
it as the keyword argument `critic_pass`, which every decoder of transformers hands down to its attention layers. A
backbone whose attention does something that these functions do not know (score capping, attention sinks) is refused,
and every backbone's cached pass is compared with a plain one before it serves (`check`).

Shapes: N packed tokens of all rows, R rows, M most tokens of a row, B most blocks of a row, L slots of these blocks,
H query heads, G key heads, D head width.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from qsharp_core.critic.scoring.cpu import attention_with_lse
from qsharp_core.critic.scoring.kv_pool import KVPool
from qsharp_core.critic.scoring.layout import Layout
from qsharp_core.errors import CriticError

PAGED = "qsharp_paged"


class AttentionPass(Protocol):
    """One forward pass over packed tokens."""

    def attend(
        self, layer: int, query_NHD: Tensor, key_NGD: Tensor, value_NGD: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """The attention output of one layer, `[N, H, D]`.

        Args:
            layer: index of the layer.
            query_NHD, key_NGD, value_NGD: of the packed tokens.
            scaling: factor of the scores.
            window: how many positions back a token sees, itself included; None without a limit.
        """


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
    critic_pass: AttentionPass,
    **_: Any,
) -> tuple[Tensor, None]:
    """Hands a layer's attention to the running pass. The signature is transformers'.

    Args:
        module: the attention layer.
        query: `[1, H, N, D]`.
        key, value: `[1, G, N, D]`.
        critic_pass: the running pass.

    Returns:
        The output `[1, N, H, D]`, and no weights.

    Raises:
        CriticError: the layer caps its scores or has attention sinks.
    """
    if softcap is not None or s_aux is not None:
        raise CriticError(f"{type(module).__name__} uses score capping or sinks, which a critic's backbone cannot have")
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


# Hidden from the compiler, so that one compiled layer serves every pass and every layer.
AttentionInterface.register(PAGED, torch.compiler.disable(paged_attention))


@dataclass
class ProbePass:
    """A pass of one token, from which the shape of the cache is learned.

    Attributes:
        shapes: by layer, the shapes `(G, D)` of its keys and of its values.
        windowed: whether some layer sees a window only.
    """

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
    """A pass over one row without a cache: a history, then candidates. Each candidate sees the history and itself.

    Args:
        history: number of tokens, the first ones, that are the history.
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
class PagedPass:
    """A pass over packed tokens: it writes their keys and values to the pool, then attends to whole blocks, masked.

    Rows may share blocks that this very pass writes: all are written before any is read. Blocks with which all rows
    begin (`Layout.shared_B`) are attended to by all tokens in one product, without a copy for each row; the result is
    merged with the attention to the rest of each row by log-sum-exp (Hydragen, arXiv 2402.05099).
    """

    pool: KVPool
    block_size: int
    layout: Layout
    _bias: dict[int | None, Tensor] = field(default_factory=dict)

    def attend(
        self, layer: int, query_NHD: Tensor, key_NGD: Tensor, value_NGD: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        layout = self.layout
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        keys[layout.write_N] = key_NGD
        values[layout.write_N] = value_NGD
        rows, most = layout.position_RM.shape
        groups = key_NGD.shape[1]
        # All query heads of a key head as one: its keys are read once.
        query_RMHD = query_NHD.unflatten(0, (rows, most)) if layout.packed_RM is None else query_NHD[layout.packed_RM]
        query_RGXD = query_RMHD.unflatten(2, (groups, -1)).transpose(1, 2).flatten(2, 3)
        keys_RGLD, values_RGLD = self._gathered(keys, layout.table_RB), self._gathered(values, layout.table_RB)
        if window not in self._bias:
            bias_RML = layout.bias_RML(keys_RGLD.shape[2], window, query_NHD.dtype)
            self._bias[window] = bias_RML.repeat_interleave(query_RGXD.shape[2] // most, dim=1)[:, None]
        bias = self._bias[window]
        if len(layout.shared_B):
            keys_1GSD, values_1GSD = (self._gathered(slots, layout.shared_B[None]) for slots in (keys, values))
            output_RGXD = _with_shared(query_RGXD, keys_1GSD, values_1GSD, keys_RGLD, values_RGLD, bias, scaling)
        else:
            output_RGXD = F.scaled_dot_product_attention(
                query_RGXD, keys_RGLD, values_RGLD, attn_mask=bias, scale=scaling
            )
        output_RMHD = output_RGXD.unflatten(2, (most, -1)).transpose(1, 2).flatten(2, 3)
        return output_RMHD.flatten(0, 1) if layout.valid_RM is None else output_RMHD[layout.valid_RM]

    def _gathered(self, slots: Tensor, table_RB: Tensor) -> Tensor:
        """The keys or the values of all rows' blocks, `[R, G, L, D]`."""
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
    """Attention `[R, G, X, D]` to S positions that all rows share, all of them seen, and to each row's own L slots."""
    rows = len(query_RGXD)
    query_1GYD = query_RGXD.transpose(0, 1).flatten(1, 2)[None]
    shared_1GYD, shared_lse_1GY = attention_with_lse(query_1GYD, keys_1GSD, values_1GSD, None, scaling)
    own_RGXD, own_lse_RGX = attention_with_lse(query_RGXD, keys_RGLD, values_RGLD, bias_R1XL, scaling)
    shared_RGXD = shared_1GYD[0].unflatten(1, (rows, -1)).transpose(0, 1)
    shared_lse_RGX = shared_lse_1GY[0].unflatten(1, (rows, -1)).transpose(0, 1)
    weight_RGX1 = torch.sigmoid(shared_lse_RGX - own_lse_RGX)[..., None].to(own_RGXD.dtype)
    return torch.lerp(own_RGXD, shared_RGXD, weight_RGX1)
