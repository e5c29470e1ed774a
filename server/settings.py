"""Settings of the API process, from the flags of `qsharp serve` or from environment variables `QSHARP_…`."""

from argparse import Namespace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from qsharp_core.critic.fetching import default_cache
from qsharp_core.errors import ConfigError
from qsharp_core.locations import LocationField, split_locations
from qsharp_core.secret_files import secret
from qsharp_core.wire.guidance import BUDGET_RANGE, ETA_RANGE, MAX_CANDIDATES

# Flags of `qsharp serve` arrive in vLLM's own namespace under this prefix.
ARGUMENT = "qsharp_"
Eta = Annotated[float, Field(ge=ETA_RANGE[0], le=ETA_RANGE[1], allow_inf_nan=False)]
SECRETS = ("admin_key", "rollouts")  # may be files, too
NOT_CONFIGURED = "this server has no rollout store: start it with --rollouts URL or QSHARP_ROLLOUTS"


class Settings(BaseSettings):
    """Settings of the API process; a flag has precedence over the environment, and that over a secret's file."""

    model_config = SettingsConfigDict(env_prefix="QSHARP_", env_ignore_empty=True, frozen=True)

    admin_key: SecretStr | None = Field(default=None, description="guards loading, activating and unloading critics")
    api_keys: tuple[SecretStr, ...] = Field(
        default=(), description="users' keys that have no name; what they store belongs to one owner"
    )
    keys: Path | None = Field(default=None, description="the file of named keys, of `qsharp keys`")
    auth: bool = Field(default=True, description="false: everybody may use this server, from wherever they reach it")
    open: tuple[Literal["metrics", "docs"], ...] = Field(default=(), description="routes that need no key")
    playground: bool | None = Field(
        default=None, description="serve the page /playground; default: where the server listens to this machine alone"
    )
    rate_limit: str | None = Field(default=None, description="requests that one key may send, as 600/minute")
    max_concurrent: int | None = Field(default=None, ge=1, description="requests at once that one key may have")
    max_queued: int | None = Field(
        default=None, ge=1, description="samples that run or wait; default: four for each that the engine runs at once"
    )
    max_body_mib: float = Field(default=2, gt=0, description="the largest body of a request, in MiB")
    max_import_mib: float = Field(default=1024, gt=0, description="the largest file of rollouts to import, in MiB")
    default_eta: Eta | None = Field(
        default=None, description="eta of requests that send none; without it they are not guided"
    )
    model_etas: Annotated[tuple[Eta, ...] | None, NoDecode] = Field(
        default=None,
        description="etas under which the model is listed; default: around the one that a critic recommends",
    )
    max_candidates: int = Field(
        default=64, ge=1, le=MAX_CANDIDATES, description="the largest guidance.candidates a request may ask for"
    )
    max_kl_total: float | None = Field(
        default=None,
        ge=BUDGET_RANGE[0],
        le=BUDGET_RANGE[1],
        description="the largest guidance.kl_total, and that of requests that send none",
    )
    max_kl_token: float | None = Field(
        default=None,
        ge=BUDGET_RANGE[0],
        le=BUDGET_RANGE[1],
        description="the largest guidance.kl_token, and that of requests that send none",
    )
    max_search: int = Field(default=16, ge=1, description="the largest guidance.search.n a request may ask for")
    rollouts: SecretStr | None = Field(
        default=None, min_length=1, description="URL of the rollout store; without it `store: true` is refused"
    )
    share_critics: bool = Field(
        default=True, description="which critics are loaded and active is one truth for all servers of the store"
    )
    critic_root: Annotated[tuple[LocationField, ...], NoDecode] = Field(
        default=(),
        description="folders, or URLs of such, under which critics may be loaded over HTTP; in the environment parted "
        "by colons",
    )
    critic_cache_folder: Path = Field(
        default_factory=default_cache, description="where critics from object stores are kept on this machine's disk"
    )
    telemetry_timeout: float = Field(
        default=30, gt=0, description="seconds to wait at the end of a choice for the worker's last report"
    )
    rpc_timeout: float = Field(default=10, gt=0, description="seconds that the worker may take to answer /liveness")

    @field_validator("critic_root", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(split_locations(value)) if isinstance(value, str) else value

    @field_validator("model_etas", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        return () if value == "none" else value.split(",") if isinstance(value, str) else value

    @classmethod
    def of(cls, args: Namespace) -> Self:
        """The settings from vLLM's parsed arguments, which include ours if `qsharp serve` parsed them.

        Raises:
            ConfigError: names the wrong setting.
        """
        flags = {name: getattr(args, ARGUMENT + name, None) for name in cls.model_fields}
        secrets: dict[str, Any] = {name: secret(f"QSHARP_{name.upper()}") for name in SECRETS}
        try:
            return cls(**{name: value for name, value in [*secrets.items(), *flags.items()] if value is not None})
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise ConfigError(f"--{name.replace('_', '-')} (QSHARP_{name.upper()}): {first['msg']}") from error
