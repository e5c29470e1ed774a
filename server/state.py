"""What the routes share; it is kept as `app.state.qsharp`."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from server import metrics
from server.critics.catalog import CriticCatalog
from server.critics.roots import CriticRoots
from server.critics.workers import Workers
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
        roots: where critics may be loaded from over HTTP.
        rollouts: the rollout store; None where the server was started without one.
        slots: bounds how many samples are on their way.
        changing: held while a version is activated or unloaded: what was checked must still hold then.
        models: reads the names of virtual models.
    """

    settings: Settings
    workers: Workers
    telemetry: TelemetryReceiver
    tokenizer: Any
    vocabulary: int
    roots: CriticRoots
    catalog: CriticCatalog = field(default_factory=CriticCatalog)
    rollouts: RolloutStore | None = None
    slots: Slots = field(default_factory=lambda: Slots(1))
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    models: VirtualModels = field(default_factory=lambda: VirtualModels((), CriticCatalog()))

    @property
    def store(self) -> RolloutStore:
        """The rollout store.

        Raises:
            ConflictError: this server has none.
        """
        if self.rollouts is None:
            raise ConflictError(NOT_CONFIGURED)
        return self.rollouts

    async def refresh(self) -> None:
        """Asks the workers which critics are loaded, and updates the catalog and the metrics."""
        gone = self.catalog.refresh(await self.workers.describe())
        metrics.show_critics(self.catalog.critics, gone, self.catalog.active.values())


def state_of(request: Request) -> QSharpState:
    """The state of the app that serves this request."""
    state: QSharpState = request.app.state.qsharp
    return state
