"""Requests' own fields: what is refused, and how it is said."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from qsharp_core.errors import GuidanceError, NoCriticError, UnknownCriticError
from qsharp_core.wire.critics import CriticStatus
from qsharp_core.wire.guidance import BUDGETS
from qsharp_core.wire.reports import ChoiceGuidance, TokenGuidance
from server.critics.catalog import CriticCatalog
from server.request.admission import admit
from server.request.schema import GuidedChatCompletionRequest, GuidedCompletionRequest, explain
from server.settings import Settings

EXAMPLES = Path(__file__).parents[2] / "examples"
PLAIN: dict[str, Any] = {"prompt": "ab", "max_tokens": 3}


def described(name: str, version: str, *, active: bool = True, **card: Any) -> CriticStatus:
    return CriticStatus(
        name=name, version=version, path="/x", active=active, leaving=False, users=0, max_length=64, native=False,
        reward_range=(0.0, 1.0), kv_blocks=4, kv_blocks_used=0, card=card,
    )  # fmt: skip


def catalog_of(*entries: CriticStatus) -> CriticCatalog:
    catalog = CriticCatalog()
    catalog.refresh(list(entries))
    return catalog


def explained(body: str) -> GuidanceError:
    """The error for a body, parsed as FastAPI does (Python's JSON knows NaN)."""
    with pytest.raises(ValidationError) as raised:
        GuidedCompletionRequest.model_validate({**PLAIN, **json.loads(body)})
    errors = [{**error, "loc": ("body", *error["loc"])} for error in raised.value.errors()]
    error = explain(errors, max_candidates=64, max_search=16)
    assert error is not None
    return error


@pytest.mark.parametrize(
    "value", ["0", "-1", "NaN", "Infinity", "-Infinity", '"0.1"', "true", "[0.1]", "{}", "1e-9", "1e9"]
)
def test_bad_eta_is_named_with_what_it_accepts(value: str) -> None:
    error = explained(f'{{"eta": {value}}}')
    assert error.param == "eta"
    assert "a number from 1e-06 to 1e+06, or null" in str(error)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("candidates", value) for value in ["0", "257", "2.5", '"3"', "true", "Infinity", "[1]"]),
        *(("min_prob", value) for value in ["NaN", "-0.1", "1.1", '"0"', "false"]),
        *(("tail", value) for value in ['"x"', "1"]),
        *(("method", value) for value in ['"beam"', "true"]),
        *(("detail", value) for value in ['"all"', "0"]),
        *(("critic", value) for value in ["3", '["a"]']),
        *((budget, value) for budget in BUDGETS for value in ["0", "-1", "1e-7", "1e7", "NaN", '"2"', "true", "[1]"]),
        ("strength", "1"),
    ],
)
def test_bad_options_are_named(option: str, value: str) -> None:
    assert explained(f'{{"eta": 1, "guidance": {{"{option}": {value}}}}}').param == f"guidance.{option}"


@pytest.mark.parametrize("value", ["[]", '"x"', "true", "1"])
def test_guidance_must_be_an_object(value: str) -> None:
    assert explained(f'{{"guidance": {value}}}').param == "guidance"


def test_errors_of_other_fields_are_left_to_vllm() -> None:
    assert explain([{"loc": ("body", "messages", 0, "metadata"), "type": "x", "input": 1}], 64, 16) is None


@pytest.mark.parametrize("request_type", [GuidedCompletionRequest, GuidedChatCompletionRequest])
def test_whole_numbers_and_nulls_pass(request_type: Any) -> None:
    body = {**PLAIN, "messages": [{"role": "user", "content": "hi"}], "eta": 1, "guidance": {"min_prob": None}}
    request = request_type.model_validate(body)
    assert request.eta == 1.0


@pytest.mark.parametrize("name", ["sums", "sums-guided", "sums-budget"])
def test_examples_are_requests(name: str) -> None:
    body = json.loads((EXAMPLES / f"{name}.json").read_text())
    assert GuidedCompletionRequest.model_validate(body).model_extra == {}


def settle(catalog: CriticCatalog, settings: Settings | None = None, **fields: Any) -> Any:
    return admit(GuidedCompletionRequest.model_validate({**PLAIN, **fields}), settings or Settings(), catalog)


def test_absent_eta_is_the_servers_default_and_null_is_unguided() -> None:
    catalog, settings = catalog_of(described("a", "1")), Settings(default_eta=0.5)
    assert settle(catalog, settings).params.eta == 0.5
    assert settle(catalog, settings, eta=None).params is None
    assert settle(catalog).params is None


def test_names_are_resolved_to_exact_versions() -> None:
    catalog = catalog_of(described("a", "1", active=False), described("b", "1"), described("a", "2"))
    assert settle(catalog, eta=1, guidance={"critic": "a"}).params.critic == "a@2"
    assert settle(catalog, eta=1, guidance={"critic": "a@1"}).params.critic == "a@1"
    with pytest.raises(UnknownCriticError, match="'c' is not loaded; loaded are b") as raised:
        settle(catalog, eta=1, guidance={"critic": "c"})
    assert raised.value.param == "guidance.critic"


def test_guidance_without_any_critic() -> None:
    with pytest.raises(NoCriticError):
        settle(CriticCatalog(), eta=1)
    assert settle(CriticCatalog()).params is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"eta": 1, "guidance": {"candidates": 65}}, "guidance.candidates"),
        ({"guidance": {"candidates": 5}}, "eta"),
        ({"store": True}, "store"),
        ({"vllm_xargs": {"qsharp_eta": 0.1}}, "vllm_xargs"),
        ({"eta": 1, "use_beam_search": True}, "use_beam_search"),
        ({"eta": 1, "echo": True, "max_tokens": 0}, "max_tokens"),
        ({"guidance": {"kl_total": 2.0}}, "eta"),  # this critic recommends none
        ({"guidance": {"kl_token": 2.0}, "use_beam_search": True}, "use_beam_search"),
    ],
)
def test_combinations_that_cannot_be_heeded_are_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(GuidanceError) as raised:
        settle(catalog_of(described("a", "1")), **fields)
    assert raised.value.param == param


def test_a_budget_without_eta_takes_the_critics() -> None:
    catalog = catalog_of(described("a", "1", recommended_eta=0.3))
    call = settle(catalog, guidance={"kl_total": 2.0})
    assert (call.params.eta, call.params.kl_total, call.params.kl_token) == (0.3, 2.0, None)
    assert call.budget.model_dump() == {"total": 2.0, "token": None}
    assert settle(catalog, Settings(default_eta=0.5), guidance={"kl_total": 2.0}).params.eta == 0.5
    assert settle(catalog, eta=None, guidance={"kl_total": 2.0}).params is None
    with pytest.raises(NoCriticError):
        settle(CriticCatalog(), guidance={"kl_total": 2.0})


def test_the_server_limits_what_requests_may_spend() -> None:
    catalog, limited = catalog_of(described("a", "1")), Settings(max_kl_total=2.0, max_kl_token=0.5)
    params = settle(catalog, limited, eta=1, guidance={"kl_total": 1.5}).params
    assert (params.kl_total, params.kl_token) == (1.5, 0.5)
    with pytest.raises(GuidanceError, match="kl_total must be a number from 1e-06 to 2, in nats") as raised:
        settle(catalog, limited, eta=1, guidance={"kl_total": 2.5})
    assert raised.value.param == "guidance.kl_total"
    assert settle(catalog, eta=1).budget is None


def test_a_server_with_fewer_candidates_than_the_default() -> None:
    call = settle(catalog_of(described("a", "1")), Settings(max_candidates=8), eta=1)
    assert call.params.candidates == 8


def test_tokens_are_dumped_only_where_asked_for() -> None:
    token = TokenGuidance(token_id=1, kl=0.0, ref_logprob=-1.0, logprob=-1.0, value=None)
    assert "tokens" not in ChoiceGuidance(tokens_total=1).dump()
    assert ChoiceGuidance(tokens_total=1, tokens=[token]).dump()["tokens"][0]["value"] is None
