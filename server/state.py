"""What the routes share; it is kept as `app.state.qsharp`."""

from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from server.critics.catalog import CriticCatalog
from server.critics.decisions import Decisions
from server.critics.following import Follower
from server.critics.loaded import LoadedCritics
from server.errors import ConflictError
from server.request.slots import Slots
from server.request.telemetry import TelemetryReceiver
from server.request.virtual_models import VirtualModels
from server.settings import NOT_CONFIGURED, Settings
from server.store.rollouts import RolloutStore


@dataclass
class QSharpState:
    """The parts of the running server; `server.plugin` makes it when the engine runs.

    Attributes:
        telemetry: receives the workers' step reports.
        tokenizer: the reference's; None where it has none.
        vocabulary: how many token ids the reference has.
        critics: what this server has loaded.
        decisions: about critics, for this server or for all of its store.
        follower: has this server have what its store says; None where it decides alone.
        rollouts: the rollout store; None where the server was started without one.
        slots: bounds how many samples are on their way.
        models: reads the names of virtual models.
    """

    settings: Settings
    critics: LoadedCritics
    decisions: Decisions
    telemetry: TelemetryReceiver
    tokenizer: Any
    vocabulary: int
    rollouts: RolloutStore | None = None
    follower: Follower | None = None
    slots: Slots = field(default_factory=lambda: Slots(1))
    models: VirtualModels = field(default_factory=lambda: VirtualModels((), CriticCatalog()))

    async def meet(self, critic: str | None) -> None:
        """Looks into the store for a critic that a request names and this server lacks, by `name` or `name@version`.

        Raises:
            StoreError: the store cannot be read.
        """
        if critic and self.follower is not None:
            await self.follower.meet(critic)

    @property
    def store(self) -> RolloutStore:
        """The rollout store.

        Raises:
            ConflictError: this server has none.
        """
        if self.rollouts is None:
            raise ConflictError(NOT_CONFIGURED)
        return self.rollouts


def state_of(request: Request) -> QSharpState:
    """The state of the app that serves this request."""
    state: QSharpState = request.app.state.qsharp
    return state
