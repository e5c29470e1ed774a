"""Two of vLLM 0.32's kernels that Triton 3.9's interpreter cannot run, made to run.

A `vllm.general_plugins` entry, so that vLLM calls it in each of its processes. Where
`VLLM_PLUGINS` is set it must name `qsharp_triton_cpu`. Without it a request with `top_k`,
`top_p` or structured output ends the engine.
"""

# mypy: disable-error-code="import-untyped"

from typing import Any

import numpy as np
import vllm.v1.sample.ops.topk_topp_sampler as topk_topp
from triton import knobs
from triton.runtime.interpreter import InterpreterBuilder


def register() -> None:
    """Patch the calling process if it interprets Triton; calling again changes nothing."""
    if not knobs.runtime.interpret:
        return
    # The kernel calls a method of its loop variable, which the interpreter makes an int.
    topk_topp.HAS_TRITON = False
    # The grammar kernel's mask reaches the interpreter as int32, which its store refuses.
    InterpreterBuilder.create_masked_store = _store_with_bool_mask


_create_masked_store = InterpreterBuilder.create_masked_store


def _store_with_bool_mask(builder: InterpreterBuilder, ptrs: Any, value: Any, mask: Any, cache_policy: Any) -> Any:
    mask.data = mask.data.astype(np.bool_)
    return _create_masked_store(builder, ptrs, value, mask, cache_policy)
