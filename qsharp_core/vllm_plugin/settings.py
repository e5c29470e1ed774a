"""What the engine is started with: `--additional-config '{"qsharp": {"critics": ["path"]}}'`.

The worker reads it from `vllm_config.additional_config`. Offline it is an argument,
`vllm.LLM(…, additional_config={"qsharp": {…}})`.
"""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qsharp_core.critic.folder import DEFAULT_MAX_BYTES
from qsharp_core.errors import ConfigError
from qsharp_core.locations import Location, parse_location
from qsharp_core.wire.critics import critic_name
from qsharp_core.wire.guidance import MAX_CANDIDATES

KEY = "qsharp"
DEFAULT_AUDIT_RATE = 5e-4  # what it costs is in docs/decisions.md


class EngineSettings(BaseModel):
    """Settings of the critics in a worker; each field describes itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    critics: list[str] = Field(default=[], description="[NAME=]PATH of each critic; the first is the default")
    cache_gib: float | None = Field(
        default=None,
        gt=0,
        description="keys and values of one critic, GiB; default: room for max_num_seqs sequences of the greatest "
        "length, 2 GiB at most, and one such sequence at least",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="dtype of the critics' weights; auto: float32 beside a reference in float32, else bfloat16",
    )
    beside: bool | None = Field(
        default=None,
        description="whether critics run beside the reference, on a core that vLLM leaves over, where there is one; "
        "default: those that gain by it",
    )
    audit_rate: float = Field(
        default=DEFAULT_AUDIT_RATE,
        ge=0,
        le=1,
        description="the share of guided rows that are scored again without the critic's cache, and compared",
    )
    max_gib: float = Field(
        default=DEFAULT_MAX_BYTES / 2**30,
        gt=0,
        allow_inf_nan=False,
        description="the files of one critic, and the table of tokens of a native one, GiB",
    )
    load_seconds: float = Field(
        default=600.0,
        gt=0,
        allow_inf_nan=False,
        description="after so many seconds a critic that is loaded into the running engine is given up",
    )
    scratch_tokens: int | None = Field(
        default=None,
        ge=MAX_CANDIDATES,
        description="candidates of one critic that are run together; default: 32 for each of max_num_seqs",
    )

    @property
    def max_bytes(self) -> int:
        """`max_gib` in bytes."""
        return int(self.max_gib * 2**30)

    @classmethod
    def of(cls, vllm_config: Any) -> Self:
        """Reads the settings from vLLM's configuration.

        Raises:
            ConfigError: a field is wrong; the message names it.
        """
        additional = vllm_config.additional_config
        try:
            return cls.model_validate(additional.get(KEY, {}) if isinstance(additional, dict) else {})
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, ("additional_config", KEY, *first["loc"])))
            raise ConfigError(f"{field}: {first['msg']}") from error


def parse_critic(argument: str) -> tuple[str | None, Location]:
    """Splits `[NAME=]PATH` into name and path, or URL. One that contains `=` must be given with a NAME.

    Raises:
        ConfigError: NAME cannot be a critic's name, or the URL is none of a folder.
    """
    name, equals, path = argument.partition("=")
    try:
        known_as = critic_name(name) if equals else None
    except ValueError as error:
        raise ConfigError(f"--critic: NAME {error}; a path with '=' in it needs a NAME") from error
    try:
        return known_as, parse_location(path if equals else argument)
    except ValueError as error:
        raise ConfigError(f"--critic: {error}") from error


def refuse_unsupported(vllm_config: Any) -> None:
    """Refuses, when an engine starts, what guidance does not support.

    Raises:
        ConfigError: the message says what to change.
    """
    if vllm_config.speculative_config is not None:
        raise ConfigError("guidance cannot be combined with speculative decoding: start without --speculative-config")
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise ConfigError(
            "guidance does not work with pipeline or prefill context parallelism: use --tensor-parallel-size or "
            "--data-parallel-size instead"
        )
    if parallel.enable_batch_sharded_sampling:  # each rank then has the logits of some requests only
        raise ConfigError("guidance does not work with --enable-batch-sharded-sampling: start without it")
