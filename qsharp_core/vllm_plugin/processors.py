"""Which logits processor fits an engine: each of vLLM's model runners rejects the other's classes."""

from typing import Any

V1 = "qsharp_core.vllm_plugin.v1:QSharpLogitsProcessor"
V2 = "qsharp_core.vllm_plugin.v2:QSharpLogitsProcessor"


def processor_name(vllm_config: Any) -> str:
    """For `--logits-processors`, after vLLM has settled which runner it will use."""
    return V2 if vllm_config.use_v2_model_runner else V1


def processor_class(vllm_config: Any) -> type:
    """The class of `processor_name`."""
    if vllm_config.use_v2_model_runner:
        from qsharp_core.vllm_plugin import v2

        return v2.QSharpLogitsProcessor
    from qsharp_core.vllm_plugin import v1

    return v1.QSharpLogitsProcessor
