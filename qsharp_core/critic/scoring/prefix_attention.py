"""Attention for steps in fixed shapes: to the blocks of a row's prefix, and, merged with it, of a candidate to itself.

Shapes: R rows, M = 1 + K tokens per row (the last token and K candidates), B blocks per row, H query heads, G key
heads, D head width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# An attention kernel with the arguments and the results of `gathered`, its definition.
PrefixAttention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, float], tuple[Tensor, Tensor]]
# `with_self`, as it is or compiled.
MergeWithSelf = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]


def gathered(
    query_RMHD: Tensor,
    keys: Tensor,
    values: Tensor,
    table_RB: Tensor,
    length_R: Tensor,
    block_size: int,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Attention of each row's queries to the first `length_R` positions of its blocks, in plain torch.

    Args:
        query_RMHD: M queries per row; all of a row's queries see the same positions.
        keys, values: pool of one layer, `[slots, G, D]`.
        table_RB: block tables, int32.
        length_R: number of positions that a row's queries see, int32, at least 1.
        block_size: slots per block.
        scaling: factor of the scores.

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
    """Merges each candidate's attention to its prefix with its attention to itself, by log-sum-exp.

    A row's token 0 is its last token so far, which the prefix holds already: its output stays.

    Args:
        output_RMHD, lse_RMH: attention to the prefix, as `PrefixAttention` returns it.
        query_RMHD, key_RMGD, value_RMGD: of the row's tokens.
        scaling: factor of the scores.

    Returns:
        The output `[R, M, H, D]` in the dtype of `output_RMHD`.
    """
    per_group = query_RMHD.shape[2] // key_RMGD.shape[2]
    own_RMH = (query_RMHD * key_RMGD.repeat_interleave(per_group, dim=2)).sum(-1).float() * scaling
    weight_RMH1 = torch.sigmoid(own_RMH - lse_RMH)[..., None]
    weight_RMH1[:, 0] = 0.0
    value_RMHD = value_RMGD.repeat_interleave(per_group, dim=2).float()
    return torch.lerp(output_RMHD.float(), value_RMHD, weight_RMH1).to(output_RMHD.dtype)
