"""Attention over the paged pool, for any backbone of transformers.

Registered with transformers' `AttentionInterface` under `PAGED`; the running pass reaches it as the keyword argument
`critic_pass`, which every decoder hands down to its attention layers. A backbone that does something here that these
functions do not know (score capping, attention sinks) is refused, and `CriticEngine` compares the cached path with a
plain forward pass before it serves any backbone at all.

Shapes: N packed tokens of all rows, R rows, M most tokens of a row, L longest key sequence, H query heads, G key heads,
D head width.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from qsharp_core.errors import CriticError

PAGED = "qsharp_paged"


@dataclass
class Pool:
    """Keys and values of every layer: `[slots, G, D]` each; slot = block · block_size + offset."""

    keys: list[Tensor]
    values: list[Tensor]


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


AttentionInterface.register(PAGED, paged_attention)


@dataclass
class ProbePass:
    """Learns what each layer stores, by letting one token attend to itself."""

    shapes: dict[int, tuple[torch.Size, torch.Size]]

    def attend(
        self, layer: int, query_NHD: Tensor, key_NGD: Tensor, value_NGD: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        self.shapes[layer] = (key_NGD.shape[1:], value_NGD.shape[1:])
        return value_NGD.repeat_interleave(query_NHD.shape[1] // key_NGD.shape[1], dim=1)


@dataclass
class Layout:
    """Where packed tokens and their keys lie.

    Attributes:
        packed_RM: index of a row's `m`-th token among the packed ones; padding points at token 0.
        valid_RM: which entries are tokens.
        key_slots_RL: pool slots of each row's positions 0, 1, …; padding points at slot 0.
        key_length_R: how many positions of the pool a row has.
        position_RM: each token's position in its sequence.
    """

    packed_RM: Tensor
    valid_RM: Tensor
    key_slots_RL: Tensor
    key_length_R: Tensor
    position_RM: Tensor

    def visible_RML(self, window: int | None) -> Tensor:
        """Which pool positions each token sees: those of its row, up to its own, within the window."""
        position_L = torch.arange(self.key_slots_RL.shape[1], device=self.key_slots_RL.device)
        seen = position_L <= self.position_RM[..., None]
        seen &= position_L < self.key_length_R[:, None, None]
        if window is not None:
            seen &= position_L > self.position_RM[..., None] - window
        return seen


@dataclass
class PrefillPass:
    """Runs missing tokens: writes their keys and values, then attends causally to all of the row's.

    Rows may share blocks that this very pass writes: all are written before any is read.
    """

    pool: Pool
    write_slots_N: Tensor
    layout: Layout

    def attend(
        self, layer: int, query_NHD: Tensor, key_NGD: Tensor, value_NGD: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        keys[self.write_slots_N] = key_NGD
        values[self.write_slots_N] = value_NGD
        at = self.layout
        output_RHMD = F.scaled_dot_product_attention(
            query_NHD[at.packed_RM].transpose(1, 2),
            keys[at.key_slots_RL].transpose(1, 2),
            values[at.key_slots_RL].transpose(1, 2),
            # A padded query must see something: a row without a key is NaN.
            attn_mask=(at.visible_RML(window) | ~at.valid_RM[..., None])[:, None],
            scale=scaling,
            enable_gqa=True,
        )
        return output_RHMD.transpose(1, 2)[at.valid_RM]


@dataclass
class CandidatePass:
    """Runs candidates: each attends to its row's prefix in the pool and to itself, and to no other candidate.

    Nothing is written; the candidates' own keys and values stay in `keys` and `values`, one entry per layer.
    """

    pool: Pool
    layout: Layout
    keys: dict[int, Tensor]
    values: dict[int, Tensor]

    def attend(
        self, layer: int, query_NHD: Tensor, key_NGD: Tensor, value_NGD: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        self.keys[layer], self.values[layer] = key_NGD, value_NGD
        at = self.layout
        rows, most = at.packed_RM.shape
        heads, groups = query_NHD.shape[1], key_NGD.shape[1]
        per_group = heads // groups
        length = at.key_slots_RL.shape[1]

        # Prefix part for all candidates of a row as one matrix product per key head.
        query_RGXD = (
            query_NHD[at.packed_RM].unflatten(2, (groups, per_group)).transpose(1, 2).flatten(2, 3)
        )  # X = M candidates x query heads of the group
        prefix_keys = self.pool.keys[layer][at.key_slots_RL].permute(0, 2, 3, 1)
        scores = (query_RGXD @ prefix_keys).float() * scaling
        hidden = ~at.visible_RML(window).repeat_interleave(per_group, dim=1)
        scores.masked_fill_(hidden[:, None], float("-inf"))

        own_keys = key_NGD[at.packed_RM].repeat_interleave(per_group, dim=2)  # [R, M, H, D]
        own = (query_NHD[at.packed_RM] * own_keys).sum(-1).float() * scaling
        own = own.unflatten(2, (groups, per_group)).transpose(1, 2).flatten(2, 3)

        weights = torch.cat([scores, own[..., None]], dim=-1).softmax(-1).to(value_NGD.dtype)
        prefix_values = self.pool.values[layer][at.key_slots_RL].transpose(1, 2)
        own_values = value_NGD[at.packed_RM].transpose(1, 2).repeat_interleave(per_group, dim=2)
        output = weights[..., :length] @ prefix_values + weights[..., length:] * own_values
        output_RMHD = output.unflatten(2, (most, per_group)).transpose(1, 2).flatten(2, 3)
        return output_RMHD.reshape(rows, most, heads, -1)[at.valid_RM]
