"""Settings of the API process: flags of `qsharp serve`, environment variables `QSHARP_…`, or files named like these."""

from argparse import Namespace
from typing import Any, Self

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from qsharp_core.errors import ConfigError
from qsharp_core.secret_files import secret
from qsharp_core.wire.guidance import ETA_RANGE, MAX_CANDIDATES

# Flags of `qsharp serve` arrive in vLLM's own namespace under this prefix.
ARGUMENT = "qsharp_"
NOT_CONFIGURED = "this server has no rollout store: start it with --rollouts URL or QSHARP_ROLLOUTS"


class Settings(BaseSettings):
    """Settings of the API process; a flag has precedence over the environment, and that over a secret file."""

    model_config = SettingsConfigDict(env_prefix="QSHARP_", env_ignore_empty=True, frozen=True)

    admin_key: SecretStr | None = Field(default=None, description="guards loading, activating and unloading critics")
    default_eta: float | None = Field(
        default=None,
        ge=ETA_RANGE[0],
        le=ETA_RANGE[1],
        allow_inf_nan=False,
        description="eta of requests that send none; without it they are not guided",
    )
    max_candidates: int = Field(
        default=64, ge=1, le=MAX_CANDIDATES, description="the largest guidance.candidates a request may ask for"
    )
    rollouts: SecretStr | None = Field(
        default=None, min_length=1, description="URL of the rollout store; without it `store: true` is refused"
    )
    telemetry_timeout: float = Field(
        default=30, gt=0, description="seconds to wait at the end of a choice for the worker's last report"
    )
    rpc_timeout: float = Field(default=10, gt=0, description="seconds that the worker may take to answer /liveness")

    @classmethod
    def of(cls, args: Namespace) -> Self:
        """The settings from vLLM's parsed arguments, which include ours if `qsharp serve` parsed them.

        Raises:
            ConfigError: names the wrong setting.
        """
        flags = {name: getattr(args, ARGUMENT + name, None) for name in cls.model_fields}
        secrets: dict[str, Any] = {name: secret(f"QSHARP_{name.upper()}") for name in cls.model_fields}
        try:
            return cls(**{name: value for name, value in [*secrets.items(), *flags.items()] if value is not None})
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise ConfigError(f"--{name.replace('_', '-')} (QSHARP_{name.upper()}): {first['msg']}") from error
