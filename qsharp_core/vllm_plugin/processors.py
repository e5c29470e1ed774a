"""Which logits processor fits an engine: each of vLLM's model runners rejects the class made for the other."""

import os
from typing import Any

V1 = "qsharp_core.vllm_plugin.v1:QSharpLogitsProcessor"
V2 = "qsharp_core.vllm_plugin.v2:QSharpLogitsProcessor"


def settle_runner() -> None:
    """Chooses vLLM's model runner before vLLM starts: V2 on GPUs, else V1.

    It sets `VLLM_USE_V2_MODEL_RUNNER`, unless it is set already. vLLM then fails instead of falling back silently to
    the runner that our processor is not made for.
    """
    import vllm.envs as envs
    from vllm.platforms import current_platform

    if envs.VLLM_USE_V2_MODEL_RUNNER is None:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if current_platform.is_cuda_alike() else "0"


def settled() -> str:
    """The value for `--logits-processors` after `settle_runner`, before vLLM has started."""
    import vllm.envs as envs

    return V2 if envs.VLLM_USE_V2_MODEL_RUNNER else V1


def processor_name(vllm_config: Any) -> str:
    """The value for `--logits-processors` that fits a running engine."""
    return V2 if vllm_config.use_v2_model_runner else V1


def processor_class(vllm_config: Any) -> type:
    """The class of the logits processor that fits a running engine."""
    if vllm_config.use_v2_model_runner:
        from qsharp_core.vllm_plugin import v2

        return v2.QSharpLogitsProcessor
    from qsharp_core.vllm_plugin import v1

    return v1.QSharpLogitsProcessor
