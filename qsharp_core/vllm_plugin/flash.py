"""FlashAttention as vLLM ships it, for critics' steps in fixed shapes (CUDA, 16-bit)."""

from typing import Any

import torch
from torch import Tensor

from qsharp_core.critic.scoring.prefix_attention import PrefixAttention, gathered

# Numbers of candidates that are captured: the paper's, and the default. Requests for more run without a graph.
GRAPH_CANDIDATES = (8, 20)


def kernel_for(vllm_config: Any, device: torch.device, dtype: torch.dtype) -> PrefixAttention | None:
    """The attention kernel for critics of this dtype in this engine; None where steps do not run in fixed shapes.

    The V1 runner keeps histories on the host, where fixed shapes gain nothing.
    """
    if not vllm_config.use_v2_model_runner:
        return None
    if device.type == "cpu":  # the V2 runner is on CPU for tests alone
        return gathered
    return flash if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) else None


def graph_shapes(vllm_config: Any, device: torch.device) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Numbers of rows (powers of two, and the most there can be) and of candidates to capture as CUDA graphs."""
    if device.type != "cuda" or vllm_config.model_config.enforce_eager:
        return (), ()
    most = vllm_config.scheduler_config.max_num_seqs
    return (*(2**i for i in range(most.bit_length()) if 2**i < most), most), GRAPH_CANDIDATES


def flash(
    query_RMHD: Tensor,
    keys: Tensor,
    values: Tensor,
    table_RB: Tensor,
    length_R: Tensor,
    block_size: int,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """A `PrefixAttention` kernel by vLLM's `flash_attn_varlen_func`, whose own log-sum-exp is `[H, R·M]`.

    Arguments and results are those of `gathered`, in float16 or bfloat16.
    """
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    rows, per_row = query_RMHD.shape[:2]
    output, lse = flash_attn_varlen_func(
        q=query_RMHD.flatten(0, 1),
        k=keys.unflatten(0, (-1, block_size)),
        v=values.unflatten(0, (-1, block_size)),
        max_seqlen_q=per_row,
        cu_seqlens_q=torch.arange(0, (rows + 1) * per_row, per_row, dtype=torch.int32, device=query_RMHD.device),
        max_seqlen_k=table_RB.shape[1] * block_size,
        seqused_k=length_R,
        softmax_scale=scaling,
        causal=False,
        block_table=table_RB,
        return_softmax_lse=True,
        fa_version=get_flash_attn_version(head_size=query_RMHD.shape[-1]),
    )
    return output.unflatten(0, (rows, per_row)), lse.transpose(0, 1).unflatten(0, (rows, per_row))
