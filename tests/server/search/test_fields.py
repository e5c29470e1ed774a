"""A search's fields: what is refused, and how it is said."""

import json
from pathlib import Path
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from qsharp_core.errors import GuidanceError
from server.request.search.checks import check
from server.request.search.fields import BestOfSearch, ParticleSearch, StopSearch
from server.settings import Settings
from tests.server.test_schema import catalog_of, described, explained, settle

BEST, PARTICLES, STOP = {"kind": "best_of", "n": 4}, {"kind": "particles", "n": 4}, {"kind": "stop", "below": 0.2}


@pytest.mark.parametrize(
    ("search", "param", "says"),
    [
        (5, "", "an object whose kind is one of stop, best_of, particles, or null; got 5"),
        ({}, ".kind", "one of stop, best_of, particles; got null"),
        ({"kind": "beam"}, ".kind", 'got "beam"'),
        ({"kind": ["stop"]}, ".kind", 'got ["stop"]'),
        ({"kind": "best_of"}, ".n", "is missing: it must be a whole number from 1 to 16"),
        ({"kind": "stop"}, ".below", "is missing"),
        *(({**BEST, "n": n}, ".n", "a whole number from 1 to 16") for n in (0, -1, 2.5, "4", True, None)),
        *(({**PARTICLES, "n": n}, ".n", "a whole number from 1 to 16") for n in (0, "4")),
        ({**BEST, "by": "sample"}, ".by", "one of value, majority, weighted"),
        ({**PARTICLES, "by": "best"}, ".by", "and with particles sample"),
        ({**BEST, "vote": "regex"}, ".vote", "one of text, number, boxed"),
        ({**BEST, "reject": 3}, ".reject", "an object with every and keep, or null"),
        ({**BEST, "reject": {"every": 16}}, ".reject.keep", "is missing"),
        ({**BEST, "reject": {"every": 0, "keep": 0.5}}, ".reject.every", "at least 1; got 0"),
        *(({**BEST, "reject": {"every": 1, "keep": k}}, ".reject.keep", "above 0 and below 1") for k in (0, 1, "x")),
        ({**BEST, "reject": {"every": 1, "keep": 0.5, "by": 1}}, ".reject.by", "takes every, keep"),
        *(({**PARTICLES, "every": every}, ".every", "a whole number, at least 1") for every in (0, 1.5, "2")),
        *(({**PARTICLES, "resample_below": x}, ".resample_below", "above 0 and at most 1") for x in (0, 1.1, "a")),
        *(({"kind": "stop", "below": x}, ".below", "a number, in units of reward") for x in ("a", True, None)),
        ({**STOP, "n": 3}, ".n", "is not known; guidance.search of the kind stop takes kind, below"),
        ({**PARTICLES, "reject": None}, ".reject", "of the kind particles takes kind, n, every"),
    ],
)  # fmt: skip
def test_wrong_values_are_named(search: Any, param: str, says: str) -> None:
    error = explained(json.dumps({"eta": 1, "guidance": {"search": search}}))
    assert error.param == f"guidance.search{param}"
    assert says in str(error)
    assert str(error).startswith(f"guidance.search{param} ")


def test_numbers_that_json_does_not_have() -> None:
    error = explained('{"eta": 1, "guidance": {"search": {"kind": "stop", "below": NaN}}}')
    assert error.param == "guidance.search.below"


@pytest.mark.parametrize("search", [BEST, PARTICLES, STOP, None])
def test_what_is_right_is_taken(search: Any) -> None:
    call = settle(catalog_of(described("a", "1")), eta=1, guidance={"search": search})
    assert (call.search and call.search.kind) == (search and search["kind"])


def test_no_more_samples_than_the_server_allows() -> None:
    catalog = catalog_of(described("a", "1"))
    for search in (BEST, PARTICLES):
        with pytest.raises(GuidanceError, match="a whole number from 1 to 3; got 4") as raised:
            settle(catalog, Settings(max_search=3), eta=1, guidance={"search": search})
        assert raised.value.param == "guidance.search.n"
        assert settle(catalog, Settings(max_search=4), eta=1, guidance={"search": search}).search.n == 4


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "eta"),
        ({"eta": None}, "eta"),
        ({"eta": 1, "seed": 2**63 - 2}, "seed"),
        ({"eta": 1, "use_beam_search": True}, "use_beam_search"),
        ({"eta": 1, "echo": True, "max_tokens": 0}, "max_tokens"),
    ],
)  # fmt: skip
def test_what_a_search_needs(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(GuidanceError) as raised:
        settle(catalog_of(described("a", "1")), **fields, guidance={"search": BEST})
    assert raised.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_p": 0.9}, "top_p"), ({"top_k": 5}, "top_k"), ({"min_p": 0.1}, "min_p"),
        ({"temperature": 0}, "temperature"),
        ({"presence_penalty": -0.5}, "presence_penalty"), ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"), ({"min_tokens": 3}, "min_tokens"),
        ({"structured_outputs": StructuredOutputsParams(regex="a")}, "structured_outputs"),
        ({"bad_words": ["a"]}, "bad_words"), ({"logprobs": 0}, "logprobs"), ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"n": 5}, "guidance.search.n"),
    ],
)  # fmt: skip
def test_what_particles_cannot_be_combined_with(fields: dict[str, Any], param: str) -> None:
    params = SamplingParams(**fields)
    with pytest.raises(GuidanceError) as raised:
        check(ParticleSearch(kind="particles", n=4), params)
    assert raised.value.param == param
    if param in ("temperature", "guidance.search.n"):
        with pytest.raises(GuidanceError):
            check(BestOfSearch(kind="best_of", n=4), params)
    else:
        check(BestOfSearch(kind="best_of", n=4), params)
    check(StopSearch(kind="stop", below=0), params)


@pytest.mark.parametrize(
    "fields", [{}, {"top_k": -1}, {"top_k": 0}, {"n": 4}, {"logit_bias": {3: 1.0}}, {"stop": ["x"]}, {"temperature": 2}]
)
def test_what_particles_can_be_combined_with(fields: dict[str, Any]) -> None:
    check(ParticleSearch(kind="particles", n=4), SamplingParams(**fields))


def test_the_references_examples_are_taken() -> None:
    page = (Path(__file__).parents[3] / "docs" / "reference.md").read_text()
    examples = [json.loads(line) for line in page.splitlines() if line.startswith('{"guidance": {"search"')]
    kinds = {settle(catalog_of(described("a", "1")), eta=0.1, **example).search.kind for example in examples}
    assert kinds == {"stop", "best_of", "particles"}
