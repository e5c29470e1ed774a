"""What of vLLM the server reaches into, or finds at a place that depends on vLLM's version.

`qsharp_core.vllm_plugin.upstream` has the rest.
"""

from typing import Any

from vllm.sampling_params import SamplingParams

try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
except ImportError:  # from 0.33 on
    from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.common.startup import cli_env_setup

__all__ = ["cli_env_setup", "make_arg_parser", "settled_by_engine", "validate_parsed_serve_args"]


def settled_by_engine(engine_client: Any, params: SamplingParams) -> SamplingParams:
    """A copy of a request's parameters with what vLLM's input processor adds: the tokens of bad words, and all that end
    a completion.

    Args:
        engine_client: vLLM's `AsyncLLM`.
        params: as a handler passes them to `generate`.
    """
    processor = engine_client.input_processor
    settled = params.clone()
    settled.update_from_generation_config(processor.generation_config_fields, processor.renderer.get_eos_token_id())
    if processor.tokenizer is not None:
        settled.update_from_tokenizer(processor.tokenizer)
    return settled
