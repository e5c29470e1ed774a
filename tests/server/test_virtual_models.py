"""Names of virtual models: what they say, what contradicts them, and which are listed."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIModelRegistry

from qsharp_core.errors import ConfigError, GuidanceError, NoCriticError
from qsharp_core.wire.critics import CriticStatus
from server.critics.catalog import CriticCatalog
from server.errors import UnknownModelError
from server.request.admission import admit
from server.request.schema import GuidedCompletionRequest
from server.request.virtual_models import VirtualModel, VirtualModels
from server.settings import ARGUMENT, Settings


def loaded(name: str, version: str = "1", recommended: float | None = None) -> CriticStatus:
    return CriticStatus(
        name=name, version=version, path="/x", active=True, leaving=False, users=0, max_length=64, native=False,
        reward_range=(0.0, 1.0), kv_blocks=4, kv_blocks_used=0, card={"recommended_eta": recommended},
    )  # fmt: skip


def catalog_of(*statuses: CriticStatus) -> CriticCatalog:
    catalog = CriticCatalog()
    catalog.refresh(statuses)
    return catalog


MODELS = VirtualModels(["tiny", "al@ias"], catalog_of(loaded("a"), loaded("b")))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tiny@eta=0.1", VirtualModel("tiny@eta=0.1", "tiny", True, 0.1)),
        ("tiny@eta=1e-1", VirtualModel("tiny@eta=1e-1", "tiny", True, 0.1)),
        ("tiny@eta=null", VirtualModel("tiny@eta=null", "tiny", True, None)),
        ("tiny@critic=a", VirtualModel("tiny@critic=a", "tiny", critic="a")),
        ("tiny@critic=a@1@eta=2", VirtualModel("tiny@critic=a@1@eta=2", "tiny", True, 2.0, "a@1")),
        ("al@ias@eta=2@critic=a", VirtualModel("al@ias@eta=2@critic=a", "tiny", True, 2.0, "a")),
        *((name, None) for name in ("tiny", "al@ias", "other@eta=0.1", "tiny@", "tiny@eta", "tiny@tail=drop", "")),
        (None, None),
        (3, None),
    ],
)
def test_a_name_says_eta_and_critic(name: object, expected: VirtualModel | None) -> None:
    assert MODELS.find(name) == expected


@pytest.mark.parametrize(
    "settings",
    [
        "eta=",
        "eta=x",
        "eta=0",
        "eta=-1",
        "eta=nan",
        "eta=inf",
        "eta=1e9",
        "eta=0.1@tail=drop",
        "eta=1@eta=1",
        "critic=",
    ],
)
def test_a_wrong_name_is_a_400_that_names_the_model(settings: str) -> None:
    with pytest.raises(GuidanceError) as raised:
        MODELS.find(f"tiny@{settings}")
    assert raised.value.param == "model"


def settled(name: str, settings: Settings | None = None, catalog: CriticCatalog | None = None, **fields: Any) -> Any:
    catalog = catalog or catalog_of(loaded("a"), loaded("b"))
    request = GuidedCompletionRequest.model_validate({"prompt": "ab", "max_tokens": 3, **fields})
    return admit(request, settings or Settings(), catalog, VirtualModels(["tiny"], catalog).find(name))


def test_a_name_guides_as_the_fields_do() -> None:
    assert settled("tiny@eta=0.1").params.eta == 0.1
    assert settled("tiny@eta=0.1").params.critic == "a@1"
    assert settled("tiny@eta=0.1@critic=b").params.critic == "b@1"
    assert settled("tiny@critic=b", eta=0.3).params.critic == "b@1"
    assert settled("tiny@critic=b", Settings(default_eta=2)).params == settled("tiny@eta=2@critic=b").params
    assert settled("tiny@eta=0.1", guidance={"candidates": 5}).params.candidates == 5
    assert settled("tiny@eta=null", Settings(default_eta=2)).params is None
    assert settled("tiny@critic=b", Settings(default_eta=2), eta=None).params is None


def test_the_same_twice_is_taken() -> None:
    call = settled("tiny@eta=0.1@critic=b", eta=0.1, guidance={"critic": "b"})
    assert (call.params.eta, call.params.critic) == (0.1, "b@1")
    assert settled("tiny@eta=null", eta=None).params is None


@pytest.mark.parametrize(
    ("name", "fields", "param"),
    [
        ("tiny@eta=0.1", {"eta": 0.2}, "eta"),
        ("tiny@eta=0.1", {"eta": None}, "eta"),
        ("tiny@eta=null", {"eta": 0.1}, "eta"),
        ("tiny@critic=a", {"eta": 1, "guidance": {"critic": "b"}}, "guidance.critic"),
        ("tiny@critic=a", {}, "model"),
        ("tiny@eta=0.1", {"use_beam_search": True}, "use_beam_search"),
        ("tiny@eta=0.1", {"guidance": {"critic": "c"}}, "guidance.critic"),
    ],
)
def test_what_contradicts_or_cannot_be_heeded_is_refused(name: str, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(GuidanceError) as raised:
        settled(name, **fields)
    assert raised.value.param == param


def test_a_critic_that_is_not_loaded_is_a_404() -> None:
    with pytest.raises(UnknownModelError, match="'c' is not loaded; loaded are a") as raised:
        settled("tiny@eta=0.1@critic=c")
    assert (raised.value.status, raised.value.param) == (404, "model")
    with pytest.raises(NoCriticError) as none:
        settled("tiny@eta=0.1", catalog=CriticCatalog())
    assert none.value.param == "model"


@pytest.mark.parametrize("most", [0, 1])
@pytest.mark.parametrize("name", ["tiny", "tiny@eta=0.1", "tiny@critic=a"])
def test_log_likelihoods_are_the_references(name: str, most: int) -> None:
    for settings in (Settings(), Settings(default_eta=0.1)):
        assert settled(name, settings, echo=True, max_tokens=most, logprobs=1) is None


def test_what_is_asked_for_beside_log_likelihoods_is_done() -> None:
    assert settled("tiny", eta=0.1, echo=True, max_tokens=1, logprobs=1).params.eta == 0.1
    assert settled("tiny@eta=0.1", echo=True, max_tokens=1).params.eta == 0.1
    assert settled("tiny@eta=0.1", echo=True, max_tokens=2, logprobs=1).params.eta == 0.1


def listed(catalog: CriticCatalog, etas: tuple[float, ...] | None = None) -> list[str]:
    registry = OpenAIModelRegistry(
        SimpleNamespace(max_model_len=64),
        [BaseModelPath("tiny", "/x"), BaseModelPath("alias", "/x")],
    )
    serving = SimpleNamespace(
        registry=registry, model_name=registry.model_name, show_available_models=registry.show_available_models
    )
    VirtualModels(["tiny", "alias"], catalog, etas).install(serving)
    cards = asyncio.run(serving.show_available_models()).data
    assert all(card.parent == "tiny" and card.max_model_len == 64 and card.root == "/x" for card in cards[2:])
    assert [card.parent for card in cards[:2]] == [None, None]
    for card in cards:
        assert registry.is_base_model(card.id)
    return [card.id for card in cards]


def test_some_etas_of_each_critic_are_listed() -> None:
    assert listed(CriticCatalog()) == ["tiny", "alias"]
    assert listed(catalog_of(loaded("a", recommended=0.1))) == [
        "tiny", "alias", "tiny@eta=0.03", "tiny@eta=0.1", "tiny@eta=0.3",
    ]  # fmt: skip
    assert listed(catalog_of(loaded("a", recommended=0.25), loaded("b")))[2:] == [
        "tiny@eta=0.08", "tiny@eta=0.25", "tiny@eta=0.8",
        "tiny@eta=0.03@critic=b", "tiny@eta=0.1@critic=b", "tiny@eta=0.3@critic=b",
    ]  # fmt: skip
    assert listed(catalog_of(loaded("a", recommended=1e-6)))[2:] == ["tiny@eta=1e-06", "tiny@eta=3e-06"]


def test_the_server_says_which_are_listed() -> None:
    settings = Settings.of(SimpleNamespace(**{ARGUMENT + "model_etas": "0.5,2"}))  # type: ignore[arg-type]
    assert settings.model_etas == (0.5, 2.0)
    assert listed(catalog_of(loaded("a")), settings.model_etas)[2:] == ["tiny@eta=0.5", "tiny@eta=2"]
    none = Settings.of(SimpleNamespace(**{ARGUMENT + "model_etas": "none"}))  # type: ignore[arg-type]
    assert listed(catalog_of(loaded("a")), none.model_etas) == ["tiny", "alias"]
    with pytest.raises(ConfigError, match="--model-etas"):
        Settings.of(SimpleNamespace(**{ARGUMENT + "model_etas": "0.1,x"}))  # type: ignore[arg-type]


def test_the_environment_may_say_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSHARP_MODEL_ETAS", "0.5,2")
    assert Settings().model_etas == (0.5, 2.0)
