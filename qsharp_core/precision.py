"""What precision a machine is fast in."""

import torch


def fast_bfloat16() -> bool:
    """Whether this machine multiplies matrices in bfloat16 in hardware; without, that would be slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
