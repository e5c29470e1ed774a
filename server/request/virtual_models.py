"""Virtual models: a model's name that says how to guide, for clients that can send no fields of ours.

    NAME@eta=0.1        NAME@critic=sums@2        NAME@eta=0.1@critic=sums        NAME@eta=null

`NAME` is a name that the model is served under. What such a name says means what `eta` and `guidance.critic` mean.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList, ModelPermission

from qsharp_core.errors import GuidanceError
from qsharp_core.wire.guidance import ETA_RANGE
from server.critics.catalog import CriticCatalog, CriticInfo

SETTING = re.compile(r"@(?=(?:eta|critic)=)")  # a critic's own name@version has an @, too
USUAL_ETA = 0.1  # of a critic that recommends none
AROUND = (10**-0.5, 1, 10**0.5)  # times the recommended eta: what is listed of a critic

# The name that the request in this context asked for; None if it named no virtual model.
_ASKED: ContextVar[str | None] = ContextVar("qsharp_asked_model", default=None)


@dataclass(frozen=True)
class VirtualModel:
    """What one such name says.

    Attributes:
        asked: the whole name, which the response repeats.
        served: the name of the model that is served, which rollouts carry.
        says_eta: whether the name has an eta.
        eta: that eta; None for `null`, which is not guided.
        critic: `name` or `name@version`; None if the name has none.
    """

    asked: str
    served: str
    says_eta: bool = False
    eta: float | None = None
    critic: str | None = None


class VirtualModels:
    """Reads virtual names, and has vLLM's handlers take them and list them.

    Args:
        names: those that the model is served under.
        catalog: the critics that are loaded.
        etas: what is listed of each critic; None: the eta that it recommends and two around it.
    """

    def __init__(self, names: Sequence[str], catalog: CriticCatalog, etas: Sequence[float] | None = None) -> None:
        self._names = names
        self._catalog = catalog
        self._etas = etas

    def find(self, name: object) -> VirtualModel | None:
        """What a request's `model` says; None if it is not the name of a virtual model.

        Raises:
            GuidanceError: it is one, and what it says is wrong.
        """
        if not isinstance(name, str) or name in self._names:
            return None
        base, *settings = SETTING.split(name)
        if base not in self._names or not settings:
            return None  # the handler says that there is no such model
        said = dict[str, str]()
        for key, _, value in (setting.partition("=") for setting in settings):
            if key in said:
                raise _wrong(name, f"has two {key}s")
            said[key] = value
        if said.get("critic") == "":
            raise _wrong(name, "names no critic: critic must be name or name@version")
        eta = _eta(name, said["eta"]) if "eta" in said else None
        return VirtualModel(name, self._names[0], "eta" in said, eta, said.get("critic"))

    def install(self, serving_models: Any) -> None:
        """Has vLLM's handlers take virtual names for the model, answer with them, and list some of them.

        Args:
            serving_models: vLLM's `OpenAIServingModels`, which all handlers share.
        """
        model_name, show = serving_models.model_name, serving_models.show_available_models

        def is_base_model(name: str) -> bool:
            return name in self._names or self.find(name) is not None

        def answered_name(lora_request: Any = None) -> str:
            name: str = _ASKED.get() or model_name(lora_request)
            return name

        async def listed() -> ModelList:
            models: ModelList = await show()
            models.data += self._cards(models.data[0])
            return models

        serving_models.registry.is_base_model = is_base_model
        serving_models.model_name = answered_name
        serving_models.show_available_models = listed

    def _cards(self, base: ModelCard) -> Iterator[ModelCard]:
        """What is listed besides the served model: of each critic, its active version under some etas."""
        for name, key in self._catalog.active.items():
            suffix = "" if name == self._catalog.default else f"@critic={name}"
            etas = _around(self._catalog.critics[key]) if self._etas is None else self._etas
            for eta in etas:
                yield ModelCard(
                    id=f"{base.id}@eta={eta:g}{suffix}",
                    root=base.root,
                    parent=base.id,
                    max_model_len=base.max_model_len,
                    permission=[ModelPermission()],
                )


@contextmanager
def answering_as(model: VirtualModel | None) -> Iterator[None]:
    """Within it, vLLM's handlers answer under the name that was asked for."""
    token = _ASKED.set(None if model is None else model.asked)
    try:
        yield
    finally:
        _ASKED.reset(token)


def _around(critic: CriticInfo) -> list[float]:
    """The eta that a critic recommends between two others, each to one digit if it is not the recommended one."""
    said = critic.status.card.get("recommended_eta")
    recommended = said if isinstance(said, int | float) else USUAL_ETA
    low, high = ETA_RANGE
    return sorted(
        {min(max(recommended if factor == 1 else float(f"{recommended * factor:.0e}"), low), high) for factor in AROUND}
    )


def _eta(name: str, text: str) -> float | None:
    if text == "null":
        return None
    low, high = ETA_RANGE
    try:
        eta = float(text)
    except ValueError:
        eta = low / 2
    if not low <= eta <= high:
        raise _wrong(name, f"has a wrong eta: it must be a number from {low:g} to {high:g}, or null")
    return eta


def _wrong(name: str, what: str) -> GuidanceError:
    return GuidanceError(f"model {name[:200]!r} {what}", "model")
