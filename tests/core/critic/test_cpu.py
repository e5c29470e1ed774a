"""torch's kernels for CPUs are what we take them for: a torch that moved them tells here."""

import pytest
import torch
from torch import nn

from qsharp_core.critic.scoring.cpu import PACKED_ELEMENTS, attention_with_lse, pack_linears


@pytest.mark.parametrize("biased", [False, True])
def test_attention_and_its_log_sum_exp_are_the_definition(biased: bool) -> None:
    torch.manual_seed(0)
    query, keys, values = (torch.randn(3, 2, n, 8, dtype=torch.float64) for n in (5, 70, 70))
    bias = torch.zeros(3, 1, 5, 70, dtype=torch.float64) if biased else None
    if bias is not None:
        bias[torch.rand(bias.shape) < 0.5] = float("-inf")
    scores = query @ keys.transpose(-1, -2) * 0.3
    scores = scores if bias is None else scores + bias
    output, lse = attention_with_lse(query, keys, values, bias, 0.3)
    torch.testing.assert_close(output, scores.softmax(-1) @ values)
    torch.testing.assert_close(lse, scores.logsumexp(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_layers_give_what_they_gave(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    large, small = nn.Linear(256, PACKED_ELEMENTS // 256, bias=bias), nn.Linear(16, 16, bias=bias)
    layers = nn.ModuleList([large, small]).to(dtype)
    hidden = torch.randn(1, 7, 256).to(dtype)
    with torch.inference_mode():
        before = large(hidden)
        pack_linears(layers)
        torch.testing.assert_close(large(hidden), before)
    assert "forward" in vars(large)
    assert "forward" not in vars(small)


def test_layers_of_other_types_are_left() -> None:
    layer = nn.Linear(256, PACKED_ELEMENTS // 256).double()
    pack_linears(layer)
    assert "forward" not in vars(layer)
