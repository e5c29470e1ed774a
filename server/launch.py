"""Turns a parsed command line into what a plain `vllm serve` would be given by hand.

That is our logits processor, our worker extension, our part of the additional config, and our plugin in `VLLM_PLUGINS`.
"""

import argparse
import asyncio
import os
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import vllm.envs as envs
from vllm.platforms import current_platform
from vllm.plugins import (
    DEFAULT_PLUGINS_GROUP,
    ENDPOINT_PLUGINS_GROUP,
    IO_PROCESSOR_PLUGINS_GROUP,
    PLATFORM_PLUGINS_GROUP,
    STAT_LOGGER_PLUGINS_GROUP,
)

from qsharp_core.critic.checkpoint import read_card
from qsharp_core.critic.fetching import FetchOrder, fetched_apart
from qsharp_core.errors import ConfigError
from qsharp_core.locations import Location
from qsharp_core.precision import fast_bfloat16
from qsharp_core.vllm_plugin import processors
from qsharp_core.vllm_plugin.settings import KEY, EngineSettings, parse_critic
from server.plugin import WORKER_EXTENSION, QSharpEndpoints
from server.presets.known import Preset
from server.settings import Settings


def preset_defaults(preset: Preset) -> Mapping[str, Any]:
    """The arguments that a preset is served with, where the command line does not set them; but for its critic."""
    defaults: dict[str, Any] = {
        "model": str(preset.model()),
        "served_model_name": [preset.name],
        "max_model_len": preset.max_model_len,
        "max_num_seqs": preset.max_num_seqs,
    }
    if current_platform.is_cpu():
        # Compiling takes minutes and gains nothing at this size. Small blocks: few-shot prompts that differ in their
        # last tokens share all blocks but the last.
        dtype = "bfloat16" if preset.bfloat16 and fast_bfloat16() else "float32"
        defaults |= {"dtype": dtype, "qsharp_dtype": dtype, "enforce_eager": True, "block_size": 32}
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    return defaults


def refuse_unsupported(args: argparse.Namespace) -> None:
    """Refuses vLLM's ways to run several HTTP servers, or another kind, and one model on several hosts.

    Raises:
        ConfigError
    """
    if args.grpc or (args.api_server_count or 1) > 1:
        raise ConfigError("qsharp serve runs one HTTP server: leave out --grpc and --api-server-count")
    if args.nnodes > 1:
        raise ConfigError(
            "one engine cannot be spread over hosts (--nnodes): run whole engines on each "
            "(--data-parallel-size-local, --headless)"
        )


def add_our_parts(args: argparse.Namespace, settings: Settings) -> None:
    """Sets the arguments that a plain `vllm serve` would be given by hand, from our flags; fetches critics from URLs.

    Raises:
        ConfigError, CriticError: a setting cannot work, or a critic's folder cannot be read.
    """
    processor = processors.settled()
    if processor not in (args.logits_processors or []):
        args.logits_processors = [*(args.logits_processors or []), processor]
    if args.worker_extension_cls not in ("", None, WORKER_EXTENSION):
        raise ConfigError(f"--worker-extension-cls is taken by {WORKER_EXTENSION}")
    args.worker_extension_cls = WORKER_EXTENSION
    ours = {
        "cache_gib": getattr(args, "qsharp_cache_gib", None),
        "dtype": getattr(args, "qsharp_dtype", None),
        "audit_rate": getattr(args, "qsharp_audit_rate", None),
        "max_gib": getattr(args, "qsharp_max_gib", None),
        "load_seconds": getattr(args, "qsharp_load_seconds", None),
    }
    config = dict(args.additional_config or {})
    config[KEY] = {**config.get(KEY, {}), **{name: value for name, value in ours.items() if value not in (None, [])}}
    args.additional_config = config
    engine = EngineSettings.of(argparse.Namespace(additional_config=config))
    critics, args.qsharp_fetched = [], {}
    for argument in getattr(args, "qsharp_critics", []):
        name, location = parse_critic(argument)
        path = _on_disk(location, settings, engine)
        if not isinstance(location, Path):
            args.qsharp_fetched[str(path)] = str(location)
        read_card(path)  # a wrong path is refused now, and not after the model has loaded
        critics.append(f"{name}={path}" if name else str(path))
    if critics:
        config[KEY]["critics"] = critics


def _on_disk(location: Location, settings: Settings, engine: EngineSettings) -> Path:
    """The critic's folder on this machine's disk. A download has a process and an event loop of its own."""
    if isinstance(location, Path):
        return location.resolve()
    order = FetchOrder(url=str(location), cache=settings.critic_cache_folder, max_bytes=engine.max_bytes)
    return asyncio.run(fetched_apart(order, engine.load_seconds))


def allow_plugin() -> None:
    """Names our endpoint plugin in `VLLM_PLUGINS`, beside the plugins that vLLM loads without being told.

    Raises:
        ConfigError: vLLM would not find it, or would log an error and go on without it.
    """
    installed = entry_points(group=ENDPOINT_PLUGINS_GROUP, name=QSharpEndpoints.name)
    if not installed or next(iter(installed)).load() is not QSharpEndpoints:
        raise ConfigError("vLLM does not find our endpoint plugin: install this package (pip install -e .)")
    allowed = envs.VLLM_PLUGINS
    if allowed is None:
        groups = (
            DEFAULT_PLUGINS_GROUP,
            IO_PROCESSOR_PLUGINS_GROUP,
            PLATFORM_PLUGINS_GROUP,
            STAT_LOGGER_PLUGINS_GROUP,
        )
        allowed = [plugin.name for group in groups for plugin in entry_points(group=group)]
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*allowed, QSharpEndpoints.name]))
