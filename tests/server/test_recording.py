"""What is made of a response before it is stored: texts across a cut, messages out of a stream, the sampling law."""

from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from qsharp_core.errors import GuidanceError
from server.request.draft import Draft, joined_text, sampling_of
from server.request.messages import MessageBuilder
from server.request.recording import Recording


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A token a byte, so that cuts go through characters; `<end>` is special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")


def draft(text: str = "", **fields: Any) -> Draft:
    params = SamplingParams(**fields.pop("params", {}))
    made = Draft([], None, params, None, text=text)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_text_does_not_depend_on_the_cut(tokenizer: Any, cut: int) -> None:
    prompt, whole = tokenizer.encode("é ab"), tokenizer.encode("xé€𝔸 z")
    assert len(whole) == 12
    assert joined_text(tokenizer, prompt, whole, cut, draft(finish_reason="length")) == "xé€𝔸 z"


@pytest.mark.parametrize("include", [False, True])
def test_the_stop_token_and_the_stop_string_are_treated_as_vllm_does(tokenizer: Any, include: bool) -> None:
    prompt, parent = tokenizer.encode("p"), tokenizer.encode("a;b")
    params = {"include_stop_str_in_output": include, "skip_special_tokens": not include}
    by_token = draft(finish_reason="stop", stop_reason=None, params=params)
    tokens = [*parent, *tokenizer.encode("cd"), tokenizer.eos_token_id]
    assert joined_text(tokenizer, prompt, tokens, 3, by_token) == ("a;bcd<end>" if include else "a;bcd")
    by_text = draft(finish_reason="stop", stop_reason=";", params=params)
    tokens = [*parent, *tokenizer.encode("c;")]
    assert joined_text(tokenizer, prompt, tokens, 3, by_text) == ("a;bc;" if include else "a;bc")


def test_the_sampling_law_has_all_that_differs_from_the_default() -> None:
    plain = sampling_of(draft(params={"max_tokens": 9}))
    assert (plain.temperature, plain.top_p, plain.top_k, plain.min_p, plain.seed) == (1.0, 1.0, 0, 0.0, None)
    assert plain.other == {"max_tokens": 9}
    shaped = sampling_of(
        draft(
            params={
                "temperature": 0.5, "top_p": 0.9, "top_k": -1, "min_p": 0.1, "repetition_penalty": 1.1, "stop": ["x"],
                "logit_bias": {7: -1.0}, "bad_words": ["no"], "min_tokens": 2,
                "structured_outputs": StructuredOutputsParams(choice=["a", "b"]),
            }
        )
    )  # fmt: skip
    assert (shaped.temperature, shaped.top_p, shaped.top_k, shaped.min_p) == (0.5, 0.9, 0, 0.1)
    assert shaped.other.pop("structured_outputs")["choice"] == ["a", "b"]  # type: ignore[attr-defined]
    assert shaped.other == {
        "repetition_penalty": 1.1, "stop": ["x"], "logit_bias": {"7": -1.0}, "bad_words": ["no"], "min_tokens": 2,
        "max_tokens": 16,
    }  # fmt: skip


def test_prompts_that_cannot_be_sampled_from_again_are_refused() -> None:
    recording = Recording(SimpleNamespace(), None, "completion", None, {}, {})  # type: ignore[arg-type]
    recording.check_prompt({"type": "token", "prompt_token_ids": [1]})
    for kind in ("embeds", "multimodal"):
        with pytest.raises(GuidanceError) as raised:
            recording.check_prompt({"type": kind})
        assert raised.value.param == "store"


def chunk(index: int, finish_reason: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": delta, "finish_reason": finish_reason}]}


def test_messages_out_of_chunks() -> None:
    builder = MessageBuilder()

    def call(i: int, name: str | None, arguments: str, **more: Any) -> dict[str, Any]:
        return {"index": i, "function": {"name": name, "arguments": arguments}, **more}

    for piece in [
        chunk(0, role="assistant", content=""),
        chunk(1, role="assistant", content=None),
        chunk(0, content="a", reasoning="r"),
        chunk(1, tool_calls=[call(0, "f", "", id="c0", type="function")]),
        chunk(0, content="b", reasoning="s"),
        chunk(1, tool_calls=[call(0, None, '{"x"'), call(1, "g", "{}", id="c1", type="function")]),
        {"choices": [], "usage": {"total_tokens": 3}},
        chunk(1, "tool_calls", tool_calls=[call(0, None, ": 1}")]),
        chunk(0, "stop", content=""),
    ]:
        builder.take(piece)
    first, second = builder.pop(0), builder.pop(1)
    assert first["message"] == {"role": "assistant", "content": "ab", "reasoning": "rs"}
    assert (first["index"], first["finish_reason"]) == (0, "stop")
    assert second["message"] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c0", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
            {"id": "c1", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ],
    }
    assert second["finish_reason"] == "tool_calls"
