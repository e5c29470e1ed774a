"""In which precision this machine is fast."""

import torch


def fast_bfloat16() -> bool:
    """Whether the hardware multiplies matrices in bfloat16; if not, bfloat16 is slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = torch.cpu.get_capabilities()
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
