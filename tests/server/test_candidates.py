"""What is said of candidates: texts that add up, whatever the tokenizer, and no more than fits."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qsharp_core.errors import GuidanceError
from qsharp_core.vllm_plugin.params import GuidanceParams
from qsharp_core.vllm_plugin.telemetry import CandidateReport
from server.presets.known import PRESETS
from server.request.call import GuidedCall
from server.request.candidates import TokenTexts, distribution_of, limit_tokens, step_candidates
from tests.server.test_schema import catalog_of, described


def of_bytes() -> Any:
    """A tokenizer whose tokens are single bytes, as the rarest of a real one are."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def with_blanks() -> Any:
    """A tokenizer whose decoder drops the blank before the first word, as those of SentencePiece do."""
    made = Tokenizer(models.WordLevel({"\u2581one": 0, "\u2581two": 1, "s": 2, "?": 3}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def test_a_character_of_several_tokens_is_added_by_its_last() -> None:
    tokenizer = of_bytes()
    ids = tokenizer("aé€b").input_ids
    assert len(ids) == 7
    assert TokenTexts(tokenizer).pieces([], ids) == ["a", "", "é", "", "", "€", "b"]
    assert TokenTexts(tokenizer).pieces(ids[:2], ids[2:]) == ["é", "", "", "€", "b"]
    assert "".join(TokenTexts(tokenizer).pieces([], ids[:-3])) == "aé\ufffd"  # what is incomplete at the end is shown


def test_blanks_before_words_are_kept() -> None:
    texts = TokenTexts(with_blanks())
    assert texts.singles([1, 2, 1]) == [" two", "s", " two"]
    assert texts.pieces([0], [1, 2, 0]) == [" two", "s", " one"]


def test_the_commas_of_a_decoder_are_kept() -> None:
    texts = TokenTexts(AutoTokenizer.from_pretrained(PRESETS["star-graph"].model()))
    ids = texts._tokenizer("17,4=17,11,4").input_ids
    assert "".join(texts.pieces([], ids)) == "17,4=17,11,4"
    assert texts.pieces(ids[:3], ids[3:]) == ["17", ",11", ",4"]


def test_a_model_without_a_tokenizer_has_no_texts() -> None:
    assert TokenTexts(None).pieces([1], [2, 3]) == ["", ""]
    assert TokenTexts(None).singles([2]) == [""]


def call_of(card: dict[str, Any], **changes: Any) -> GuidedCall:
    critic = catalog_of(described("a", "1", **card)).critics["a@1"]
    params = GuidanceParams(eta=0.5, critic="a@1", candidates=20, report_candidates=True)
    call = GuidedCall(params, critic, "candidates", False, "prompt")
    for name, value in changes.items():
        setattr(call, name, value)
    return call


CATEGORICAL = {"distribution": {"kind": "categorical", "atoms": [0.0, 0.25, 1.0]}}


@pytest.mark.parametrize(("card", "samples", "room"), [({}, 1, 16_666), ({}, 8, 2_083), (CATEGORICAL, 1, 10_000)])
def test_a_response_has_no_more_numbers_than_fit(card: dict[str, Any], samples: int, room: int) -> None:
    call = call_of(card, samples=samples)
    assert limit_tokens(call, 5) == 5
    assert limit_tokens(call, 1_000_000) == room
    call.limit_given = True
    assert limit_tokens(call, room) == room
    with pytest.raises(GuidanceError, match=f"at most {room} ") as raised:
        limit_tokens(call, room + 1)
    assert raised.value.param == "max_tokens"


def test_so_many_samples_that_there_is_no_room_at_all_are_refused() -> None:
    with pytest.raises(GuidanceError, match="at most 0"):
        limit_tokens(call_of({}, samples=100_000), 5)


def test_what_outputs_mean_is_said() -> None:
    bernoulli, categorical = distribution_of(call_of({})), distribution_of(call_of(CATEGORICAL))
    assert bernoulli is not None
    assert categorical is not None
    assert (bernoulli.kind, bernoulli.atoms) == ("bernoulli", [0.0, 1.0])
    assert (categorical.kind, categorical.atoms) == ("categorical", [0.0, 0.25, 1.0])
    assert distribution_of(call_of({}, critic=None)) is None


def test_the_tail_has_what_candidates_leave() -> None:
    made = step_candidates(CandidateReport([0, 1], [-1.0, -2.0], [[0.5], [1.5]]), TokenTexts(with_blanks()))
    assert made is not None
    assert made.tail_mass == pytest.approx(1 - 0.36787944117144233 - 0.1353352832366127, abs=1e-15)
    assert made.texts == [" one", " two"]
    assert step_candidates(None, TokenTexts(None)) is None
    assert step_candidates(CandidateReport([], [], []), TokenTexts(None)) is None
