"""What of vLLM the server reaches into, or finds at a place that depends on vLLM's version.

`qsharp_core.vllm_plugin.upstream` has the rest.
"""

import argparse
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from vllm.sampling_params import SamplingParams
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
except ImportError:  # from 0.33 on
    from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.common.startup import cli_env_setup

__all__ = [
    "Decoded",
    "cli_env_setup",
    "decoded",
    "make_arg_parser",
    "run_engines_alone",
    "settled_by_engine",
    "shared_address",
    "validate_parsed_serve_args",
]


def run_engines_alone(args: argparse.Namespace) -> None:
    """Runs engines for a server on another host (`--headless`) until they are told to stop, or one of them dies."""
    from vllm.entrypoints.cli.serve import run_headless

    args.api_server_count = 0
    run_headless(args)


def shared_address(parallel: Any) -> str | None:
    """This host's address for the engines that run on others; None if there are none.

    Args:
        parallel: vLLM's `ParallelConfig`.
    """
    elsewhere = parallel.data_parallel_size_local < parallel.data_parallel_size and not parallel.local_engines_only
    return parallel.data_parallel_master_ip if elsewhere else None


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


class Decoded(NamedTuple):
    """The text of tokens.

    Attributes:
        text: without the stop string, unless that is to stay.
        tokens: up to and with the one that completes a stop string; all of them if there is none.
        stop: the stop string that was found.
    """

    text: str
    tokens: int
    stop: str | None


def decoded(
    tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int], params: SamplingParams, *, ends_by_token: bool
) -> Decoded:
    """The text of tokens as vLLM makes it when it samples them one by one after the prompt.

    Args:
        tokenizer: the model's; None where there is none, and then the text is empty.
        prompt: token ids before these tokens.
        tokens: token ids of a completion.
        params: as a handler passes them to `generate`.
        ends_by_token: whether the last token is one that ended the completion.
    """
    request: Any = SimpleNamespace(
        request_id="", prompt_token_ids=list(prompt), prompt_embeds=None, sampling_params=params
    )
    detokenizer = IncrementalDetokenizer.from_new_request(tokenizer if params.detokenize else None, request)
    count, stop = 0, None
    for count, token in enumerate(tokens, start=1):
        stop = detokenizer.update([token], ends_by_token and count == len(tokens))
        if stop is not None:
            break
    return Decoded(detokenizer.get_next_output_text(finished=True, delta=False), count, stop)
