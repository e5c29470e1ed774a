"""What our routes share, kept as `app.state.qsharp`."""

from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from server import metrics
from server.critics.catalog import Registry
from server.critics.workers import Workers
from server.errors import ConflictError
from server.request.telemetry import TelemetryReceiver
from server.settings import NOT_CONFIGURED, Settings
from server.store.rollouts import RolloutStore


@dataclass
class QSharpState:
    """Made by `server.plugin` when the engine runs."""

    settings: Settings
    workers: Workers
    telemetry: TelemetryReceiver
    tokenizer: Any
    vocabulary: int
    registry: Registry = field(default_factory=Registry)
    rollouts: RolloutStore | None = None

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
        """Brings the registry up to what the workers say."""
        gone = self.registry.refresh(await self.workers.describe())
        metrics.show_critics(self.registry.critics, gone, self.registry.active.values())


def state_of(request: Request) -> QSharpState:
    """The state of the app that serves this request."""
    state: QSharpState = request.app.state.qsharp
    return state
