"""What the engine is started with: `--additional-config '{"qsharp": {"critics": ["path"]}}'`.

The worker reads it from `vllm_config.additional_config`. Offline it is an argument,
`vllm.LLM(…, additional_config={"qsharp": {…}})`.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qsharp_core.errors import ConfigError
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
    scratch_tokens: int | None = Field(
        default=None,
        ge=MAX_CANDIDATES,
        description="candidates of one critic that are run together; default: 32 for each of max_num_seqs",
    )

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


def parse_critic(argument: str) -> tuple[str | None, Path]:
    """Splits `[NAME=]PATH` into name and path. A path that contains `=` must be given with a NAME."""
    name, equals, path = argument.partition("=")
    return (name, Path(path)) if equals else (None, Path(argument))


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
