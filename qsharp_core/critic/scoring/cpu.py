"""Kernels for CPUs that torch offers to its own compiler only: ops below its public functions."""

import torch
from torch import Tensor, nn

# Smaller weights stay in the CPU's cache whatever their layout, and a call of oneDNN costs more than it saves.
PACKED_ELEMENTS = 1 << 16


def attention_with_lse(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """The kernel that `scaled_dot_product_attention` runs on CPUs, with the log-sum-exp that it does not return.

    Shapes: R rows, G key heads, X queries per key head, L slots, D head width.

    Args:
        query: `[R, G, X, D]`.
        keys, values: `[R, G, L, D]`.
        bias: added to the scaled scores, `[R, 1, X, L]`.
        scaling: factor of the scores.

    Returns:
        The output `[R, G, X, D]`, and the log of the sum of the exponentiated scores, `[R, G, X]`, float32 or float64.
    """
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, attn_mask=bias, scale=scaling
    )
    return output, lse


def pack_linears(module: nn.Module) -> None:
    """Gives the large linear layers of a module a copy of their weights in oneDNN's layout, and has them use it.

    Without it torch converts the weights to that layout in every call (bfloat16), or calls a library that does not use
    all of the CPU (float32). The weights themselves must not change afterwards. Packed are layers on CPUs in bfloat16
    or float32 with at least `PACKED_ELEMENTS` weights, and none where torch was built without oneDNN.
    """
    if not torch.backends.mkldnn.is_available():
        return
    for layer in module.modules():
        if type(layer) is nn.Linear and layer.weight.numel() >= PACKED_ELEMENTS and _packable(layer.weight):
            layer.forward = _Packed(layer)  # type: ignore[method-assign, assignment]


def _packable(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float32)


class _Packed:
    """The forward function of a packed linear layer."""

    def __init__(self, layer: nn.Linear) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        self.bias = layer.bias

    def __call__(self, hidden: Tensor) -> Tensor:
        output: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, self.weight, self.bias, "none", [], "")
        return output
