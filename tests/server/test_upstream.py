"""vLLM's inner workings that the server builds on. A failure here says what to look at after an upgrade."""

import asyncio
import inspect
import os
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from vllm import SamplingParams
from vllm.entrypoints.launchers import launcher
from vllm.entrypoints.openai.chat_completion import api_router as chat_router
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion import api_router as completion_router
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import AsyncMPClient, DPLBAsyncMPClient, MPClient
from vllm.v1.engine.parallel_sampling import ParentRequest

from server import upstream


def test_handlers_ask_their_engine_client_prompt_by_prompt() -> None:
    for handler, method in (
        (OpenAIServingCompletion, "_create_completion"),
        (OpenAIServingChat, "_create_chat_completion"),
    ):
        source = inspect.getsource(getattr(handler, method))
        assert "for i, engine_input in enumerate(engine_inputs)" in source
        assert "self.engine_client.generate(" in source


def test_a_completions_choices_are_numbered_over_prompts() -> None:
    assert "i = output.index + prompt_idx * num_choices" in inspect.getsource(
        OpenAIServingCompletion.completion_stream_generator
    )


def test_routes_call_the_handlers_kept_in_the_apps_state() -> None:
    assert "handler.create_completion(request, raw_request)" in inspect.getsource(completion_router.create_completion)
    assert "handler.create_chat_completion(request, raw_request)" in inspect.getsource(
        chat_router.create_chat_completion
    )


def test_all_handlers_ask_one_object_about_a_models_name() -> None:
    """`server.request.virtual_models` puts its own answers there."""
    assert "self.registry.is_base_model(model_name)" in inspect.getsource(OpenAIServingModels.is_base_model)
    assert "self.models.is_base_model(model_name)" in inspect.getsource(BaseServing._is_model_supported)
    for handler in (OpenAIServingCompletion, OpenAIServingChat, OpenAIServingResponses, ServingTokens):
        assert "self.models.model_name(lora_request)" in inspect.getsource(handler)


def test_collective_rpc_answers_for_the_first_engine_alone() -> None:
    """So `server.critics.workers` calls each engine itself."""
    assert "[0]" in inspect.getsource(DPLBAsyncMPClient.call_utility_async)
    assert "engine" in inspect.signature(AsyncMPClient._call_utility_async).parameters
    assert "self.core_engines" in inspect.getsource(AsyncMPClient.call_utility_all_async)


def test_the_first_sign_of_a_shutdown_is_the_clients_finalizer() -> None:
    """`upstream.is_stopping` asks it; nothing else tells before the engines are gone."""
    body = inspect.getsource(MPClient.shutdown)
    assert body.index("self._finalizer.detach()") < body.index("engine_manager.shutdown")


def test_samples_of_a_seeded_request_count_up() -> None:
    assert "child_sampling_params.seed = seed + index" in inspect.getsource(ParentRequest)


def test_abandoned_samples_are_aborted() -> None:
    source = inspect.getsource(AsyncLLM.generate)
    assert "except (asyncio.CancelledError, GeneratorExit):" in source


def test_streams_report_a_generation_error_without_a_stack_trace() -> None:
    for method in (
        OpenAIServingCompletion.completion_stream_generator,
        OpenAIServingChat.chat_completion_stream_generator,
    ):
        assert "except GenerationError as e:" in inspect.getsource(method)


def test_the_arguments_of_vllm_serve_are_made_and_checked() -> None:
    parser = upstream.make_arg_parser(FlexibleArgumentParser())
    args = parser.parse_args(["model", "--port", "1234"])
    assert (args.model_tag, args.port) == ("model", 1234)
    upstream.validate_parsed_serve_args(args)
    args = parser.parse_args(["model", "--enable-auto-tool-choice"])
    with pytest.raises(TypeError, match="--tool-call-parser"):
        upstream.validate_parsed_serve_args(args)


def test_a_command_sets_up_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD", raising=False)
    upstream.cli_env_setup()
    assert os.environ.pop("VLLM_WORKER_MULTIPROC_METHOD") == "spawn"


def test_a_signal_stops_the_engine_by_the_apps_own_client() -> None:
    source = inspect.getsource(launcher.serve_http)
    assert "engine_client = app.state.engine_client" in source
    assert "partial(engine_client.shutdown, timeout=timeout)" in source


def test_the_middleware_stack_is_built_by_a_method_that_can_be_wrapped() -> None:
    app = FastAPI()
    built = []
    build = app.build_middleware_stack
    app.build_middleware_stack = lambda: built.append(1) or build()  # type: ignore[func-returns-value, method-assign]
    asyncio.run(app({"type": "lifespan", "asgi": {"version": "3.0"}}, _startup(), _ignore))
    assert built == [1]


def _startup() -> Any:
    messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

    async def receive() -> Any:
        return next(messages)

    return receive


async def _ignore(message: Any) -> None:
    pass


@pytest.fixture(scope="module")
def of_bytes() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are bytes, after an end token."""
    names = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens = Tokenizer(BPE({name: i for i, name in enumerate(names)}, []))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<end>")


@given(st.text(min_size=1, max_size=12), st.text(max_size=4), st.integers(0, 60))
def test_tokens_are_decoded_as_vllm_does_it(
    of_bytes: PreTrainedTokenizerFast, text: str, before: str, length: int
) -> None:
    """Whatever characters the tokens are parts of; those of an unfinished one are no text yet."""
    prompt, tokens = (of_bytes.encode(part, add_special_tokens=False) for part in (before, text))
    whole = upstream.decoded(of_bytes, prompt, tokens, SamplingParams(), ends_by_token=False)
    assert whole == (text, len(tokens), None)
    part = upstream.decoded(of_bytes, prompt, tokens[:length], SamplingParams(), ends_by_token=False)
    assert part.text == text.encode()[:length].decode(errors="ignore")
    ended = upstream.decoded(of_bytes, prompt, [*tokens, 0], SamplingParams(), ends_by_token=True)
    assert ended == (text, len(tokens) + 1, None)


@given(st.text("aé€😀", min_size=3, max_size=12), st.integers(0, 11), st.booleans())
def test_stop_strings_are_found_where_they_end(
    of_bytes: PreTrainedTokenizerFast, text: str, start: int, kept: bool
) -> None:
    stop = text[start % len(text) :][:2]
    params = SamplingParams(stop=[stop], include_stop_str_in_output=kept)
    tokens = of_bytes.encode(text, add_special_tokens=False)
    at = text.index(stop)
    found = upstream.decoded(of_bytes, [], tokens, params, ends_by_token=False)
    assert found == (text[: at + len(stop)] if kept else text[:at], len(text[: at + len(stop)].encode()), stop)


def test_a_model_without_a_tokenizer_has_no_text() -> None:
    assert upstream.decoded(None, [1], [2, 3], SamplingParams(), ends_by_token=False) == ("", 2, None)
