"""What our routes share, kept as `app.state.qsharp`."""

from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from server import metrics
from server.registry import Registry
from server.settings import Settings
from server.telemetry import TelemetryReceiver
from server.workers import Workers


@dataclass
class QSharpState:
    """Made by `server.plugin` when the engine runs."""

    settings: Settings
    workers: Workers
    telemetry: TelemetryReceiver
    tokenizer: Any
    vocabulary: int
    registry: Registry = field(default_factory=Registry)

    async def refresh(self) -> None:
        """Brings the registry up to what the workers say."""
        gone = self.registry.refresh(await self.workers.describe())
        metrics.show_critics(self.registry.critics, gone)


def state_of(request: Request) -> QSharpState:
    """The state of the app that serves this request."""
    state: QSharpState = request.app.state.qsharp
    return state
