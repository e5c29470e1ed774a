"""One prefix for all rows: every prompt of the task opens with the same eight solved examples.

They are run once, and their keys and values serve every row, in sampling and in training, with the same result as
running each row in full.
"""

from typing import cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

ATTENTION = "shared_prefix"
PrefixKeysValues = list[tuple[Tensor, Tensor]]
"""Per layer, keys and values of the shared prefix, each [kv_heads, prefix, head_dim]."""


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    prefix: PrefixKeysValues | None = None,
    visible: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention of rows that all continue one prefix, whose keys and values exist once.

    `query` is [rows, heads, new, head_dim], `key` and `value` are [rows, kv_heads, own, head_dim]: a row's own tokens
    without the prefix. Among these it is causal, or as `visible` [rows, 1, new, own] says. Returns
    [rows, new, heads, head_dim]. One softmax runs over prefix and own scores together, so this equals attention over
    the whole row.
    """
    rows, heads, new, dim = query.shape
    kv_heads, own = key.shape[1], key.shape[2]
    grouped = query.reshape(rows, kv_heads, -1, dim) * scaling  # [rows, kv_heads, group*new, dim]
    if visible is None:
        visible = torch.ones(new, own, dtype=torch.bool).tril(own - new)
    scores = (grouped @ key.mT).view(rows, heads, new, own).masked_fill(~visible, float("-inf"))
    if prefix is None:
        mixed = scores.softmax(-1).view(rows, kv_heads, -1, own) @ value
    else:
        prefix_key, prefix_value = prefix[cast(int, module.layer_idx)]
        # The rows' queries meet the prefix in one large product a head, not one a row.
        packed = grouped.transpose(0, 1).reshape(kv_heads, -1, dim)
        length = prefix_key.shape[1]
        prefix_scores = (packed @ prefix_key.mT).view(kv_heads, rows, -1, length).transpose(0, 1)
        weights = torch.cat([prefix_scores, scores.view(rows, kv_heads, -1, own)], dim=-1).softmax(-1)
        weights = weights.to(value.dtype)  # autocast leaves a softmax in float32
        prefix_weights, own_weights = weights[..., :length], weights[..., length:]
        from_prefix = prefix_weights.transpose(0, 1).reshape(kv_heads, -1, length) @ prefix_value
        mixed = own_weights @ value + from_prefix.view(kv_heads, rows, -1, dim).transpose(0, 1)
    return mixed.view(rows, heads, new, dim).transpose(1, 2), None


AttentionInterface.register(ATTENTION, shared_prefix_attention)


@torch.no_grad()
def prefix_keys_values(backbone: PreTrainedModel, prefix_ids: list[int]) -> PrefixKeysValues:
    """Run the shared prefix once and keep each layer's keys and values, without gradient."""
    cache = DynamicCache(config=backbone.config)
    backbone(input_ids=torch.tensor([prefix_ids]), past_key_values=cache, use_cache=True)
    layers = cast(list[DynamicLayer], cache.layers)
    return [(cast(Tensor, x.keys)[0], cast(Tensor, x.values)[0]) for x in layers]


def common_prefix(rows: list[list[int]]) -> list[int]:
    """The longest prefix that all rows share, leaving each at least one token of its own."""
    shortest = min(len(row) for row in rows) - 1
    length = next((i for i in range(shortest) if len({row[i] for row in rows}) > 1), shortest)
    return rows[0][:length]
