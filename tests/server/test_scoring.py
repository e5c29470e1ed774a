"""Text to score: tokenised whole, parted by offsets."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from qsharp_core.errors import GuidanceError
from qsharp_core.wire.critics import ScoreRequest
from server.api.scoring import MAX_SEQUENCES, sequences


def tokenizer() -> PreTrainedTokenizerFast:
    """`ab` is one token; a start and an end token are added."""
    vocabulary = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4, "c": 5}
    tokens = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    tokens.pre_tokenizer = pre_tokenizers.Split("|", "isolated")
    tokens.post_processor = processors.TemplateProcessing("<s> $0 </s>", None, [("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<s>", eos_token="</s>")


def tokens_of(prompt: object, completion: object) -> list[tuple[list[int], list[int]]]:
    return sequences(ScoreRequest.model_validate({"prompt": prompt, "completion": completion}), tokenizer(), 6, 100)


def test_text_is_parted_at_the_boundary() -> None:
    assert tokens_of("ab", "c") == [([0, 4], [5])]
    assert tokens_of("", "ab") == [([0], [4])]
    assert tokens_of("ab", "") == [([0, 4], [])]


def test_a_token_across_the_boundary_is_the_completions() -> None:
    assert tokens_of("ca", "bc") == [([0, 5], [4, 5])]


def test_batches_and_one_prompt_for_many() -> None:
    assert tokens_of([2, 3], [5]) == [([2, 3], [5])]
    assert tokens_of([[2], [3, 3]], [[5], []]) == [([2], [5]), ([3, 3], [])]
    assert tokens_of("a", ["c", "cc"]) == [([0, 2], [5]), ([0, 2], [5, 5])]


@pytest.mark.parametrize(
    ("prompt", "completion", "param"),
    [("a", [5], "completion"), ([2], [6], "completion"), ([9], [2], "prompt"), (["a", "b"], ["c"], "completion")],
)
def test_what_does_not_fit_together_is_refused(prompt: object, completion: object, param: str) -> None:
    with pytest.raises(GuidanceError) as raised:
        tokens_of(prompt, completion)
    assert raised.value.param == param


def test_the_most_completions_of_a_request() -> None:
    assert len(tokens_of("a", ["c"] * MAX_SEQUENCES)) == MAX_SEQUENCES
    with pytest.raises(GuidanceError, match="at most 1024"):
        tokens_of("a", ["c"] * (MAX_SEQUENCES + 1))


@pytest.mark.parametrize("most", [1, 2, 7])
def test_text_that_cannot_fit_is_not_tokenised(most: int) -> None:
    class Counting:
        is_fast = True
        calls = 0

        def get_vocab(self) -> dict[str, int]:
            return {"ab": 0, "abc": 1}

        def __call__(self, text: str, **_: object) -> dict[str, list[object]]:
            self.calls += 1
            return {"input_ids": [0] * len(text), "offset_mapping": [(i, i + 1) for i in range(len(text))]}

    counting = Counting()
    sequences(ScoreRequest(prompt="", completion="a" * 3 * most), counting, 6, most)
    assert counting.calls == 1
    with pytest.raises(GuidanceError, match=f"more than {most} tokens"):
        sequences(ScoreRequest(prompt="a", completion=["a", "a" * 3 * most]), counting, 6, most)
    assert counting.calls == 1
