"""`qsharp serve`: vLLM's own server with our parts in it.

All of vLLM's flags are taken as they are; ours are turned into what a plain `vllm serve` would be given by hand: logits
processor, worker extension, additional config and `VLLM_PLUGINS`.
"""

import argparse
import os
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import vllm.envs as envs
from vllm.logger import configure_logging_from_args
from vllm.platforms import current_platform
from vllm.plugins import (
    DEFAULT_PLUGINS_GROUP,
    ENDPOINT_PLUGINS_GROUP,
    IO_PROCESSOR_PLUGINS_GROUP,
    PLATFORM_PLUGINS_GROUP,
    STAT_LOGGER_PLUGINS_GROUP,
)
from vllm.utils.argparse_utils import FlexibleArgumentParser

from qsharp_core.critic.checkpoint import read_card
from qsharp_core.errors import ConfigError
from qsharp_core.precision import fast_bfloat16
from qsharp_core.rollouts.database import ACCEPTED, parse_url
from qsharp_core.vllm_plugin import processors, upstream
from qsharp_core.vllm_plugin.params import ETA_RANGE
from qsharp_core.vllm_plugin.settings import DEFAULT_AUDIT_RATE, KEY, EngineSettings, parse_critic
from server.plugin import WORKER_EXTENSION, QSharpEndpoints
from server.presets.known import DEFAULT, PRESETS, Preset
from server.settings import ARGUMENT, Settings

DESCRIPTION = """Serve a language model, guided by critics, on an OpenAI-compatible API.
Without MODEL a small one with a critic is served, to try it out; MODEL star-graph is a still smaller one, which takes
a random path until it is guided."""


class _ServeParser(FlexibleArgumentParser):
    """vLLM's parser, whose help lists only the names of groups; ours stands before them in full."""

    def format_help(self) -> str:
        text = str(super().format_help())
        if self._subparsers is not None or self._search_keyword is not None:
            return text
        formatter = self._get_formatter()
        for group in self._action_groups:
            if group.title == "qsharp":
                formatter.start_section("Guidance")
                formatter.add_arguments(group._group_actions)
                formatter.end_section()
        head, _, groups = text.partition("Config Groups:\n")
        title = "vLLM's own flags, by group (--help=GROUP, --help=FLAG or --help=all):"
        return f"{head}{formatter.format_help()}\n{title}\n{groups}"


def main(argv: list[str]) -> None:
    """Runs the server until it is told to stop.

    Args:
        argv: what follows `qsharp serve`.

    Raises:
        ConfigError, CriticError: before anything heavy is started, where it can be seen that early.
    """
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server

    upstream.set_up_command()
    _allow_plugin()
    processors.settle_runner()
    args = parse(argv)
    configure_logging_from_args(args)
    upstream.check_serve_arguments(args)
    uvloop.run(run_server(args))


def parse(argv: list[str]) -> argparse.Namespace:
    """vLLM's arguments with our parts in them; those of the embedded default where no model is named.

    Raises:
        ConfigError, CriticError.
    """
    parser, serve = _parser()
    args = parser.parse_args(["serve", *argv])
    tag = args.model_tag
    preset = PRESETS[DEFAULT] if tag is None else PRESETS.get(tag)
    if preset is None or (tag is not None and Path(tag).is_dir()):  # a folder of that name is what was meant
        args.model = args.model_tag
    else:
        serve.set_defaults(**_defaults(preset))
        args = parser.parse_args(["serve", *argv])
        # Not a default of the flag: argparse would append to it those that are named.
        if not hasattr(args, "qsharp_critics"):
            args.qsharp_critics = [f"{preset.critic}={preset.critic_folder}"]
            args.qsharp_hint = preset.hint(args.port)
    _refuse_unsupported(args)
    _add_our_parts(args)
    settings = Settings.of(args)
    if settings.rollouts is not None:
        parse_url(settings.rollouts.get_secret_value())  # a mistyped one is told now
    _admit_admin(args, settings)
    return args


def _parser() -> tuple[FlexibleArgumentParser, FlexibleArgumentParser]:
    parser = _ServeParser(prog="qsharp")
    commands = parser.add_subparsers(dest="subparser")
    serve = commands.add_parser(
        "serve", description=DESCRIPTION, usage="qsharp serve [MODEL] [--critic [NAME=]PATH]... [vLLM's own flags]"
    )
    ours = serve.add_argument_group("qsharp", "Guidance, as above.")
    ours.add_argument(
        "--critic",
        action="append",
        metavar="[NAME=]PATH",
        dest="qsharp_critics",
        default=argparse.SUPPRESS,
        help="folder of a critic; may be repeated, the first is the default",
    )
    ours.add_argument(
        "--no-critic",
        action="store_const",
        const=[],
        dest="qsharp_critics",
        default=argparse.SUPPRESS,
        help="without MODEL: leave out its critic; one that is learned can be loaded later",
    )
    ours.add_argument(
        "--default-eta",
        type=float,
        metavar="ETA",
        dest=ARGUMENT + "default_eta",
        default=argparse.SUPPRESS,
        help=f"guide requests that send no eta, {ETA_RANGE[0]:g} to {ETA_RANGE[1]:g}: smaller is stronger; without it "
        "they are not guided",
    )
    ours.add_argument(
        "--admin-key",
        metavar="KEY",
        dest=ARGUMENT + "admin_key",
        default=argparse.SUPPRESS,
        help="allow loading, activating and unloading critics to who has this key (or set QSHARP_ADMIN_KEY)",
    )
    ours.add_argument(
        "--rollouts",
        metavar="URL",
        dest=ARGUMENT + "rollouts",
        default=argparse.SUPPRESS,
        help=f"keep what requests with `store: true` sample: {ACCEPTED} (or set QSHARP_ROLLOUTS)",
    )
    ours.add_argument(
        "--max-candidates",
        type=int,
        metavar="N",
        dest=ARGUMENT + "max_candidates",
        default=argparse.SUPPRESS,
        help=f"most candidates a request may ask for ({Settings.model_fields['max_candidates'].default} unless given)",
    )
    ours.add_argument(
        "--critic-cache-gib",
        type=float,
        metavar="GIB",
        dest="qsharp_cache_gib",
        default=argparse.SUPPRESS,
        help="key-value cache of each critic; unless given, room for max_num_seqs of the longest sequences, 2 at most",
    )
    ours.add_argument(
        "--critic-dtype",
        choices=["auto", "float32", "bfloat16"],
        dest="qsharp_dtype",
        default=argparse.SUPPRESS,
        help="of critics' weights; auto is float32 beside a reference in float32, else bfloat16",
    )
    ours.add_argument(
        "--audit-rate",
        type=float,
        metavar="SHARE",
        dest="qsharp_audit_rate",
        default=argparse.SUPPRESS,
        help=f"share of guided rows whose scores are checked by a plain forward pass ({DEFAULT_AUDIT_RATE:g} unless "
        "given); 0 turns it off",
    )
    upstream.make_serve_parser(serve)
    # A model's own sampling defaults (top-p, temperature) would change the reference policy behind the client's back.
    serve.set_defaults(generation_config="vllm")
    return parser, serve


def _defaults(preset: Preset) -> dict[str, Any]:
    """Those of an embedded model, for what the command line does not set."""
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


def _refuse_unsupported(args: argparse.Namespace) -> None:
    if args.headless or args.grpc or (args.api_server_count or 1) > 1:
        raise ConfigError("qsharp serve runs one HTTP server: leave out --headless, --grpc and --api-server-count")


def _add_our_parts(args: argparse.Namespace) -> None:
    """The flags that a plain `vllm serve` would be given by hand."""
    processor = processors.settled()
    if processor not in (args.logits_processors or []):
        args.logits_processors = [*(args.logits_processors or []), processor]
    if args.worker_extension_cls not in ("", None, WORKER_EXTENSION):
        raise ConfigError(f"--worker-extension-cls is taken by {WORKER_EXTENSION}")
    args.worker_extension_cls = WORKER_EXTENSION
    critics = []
    for argument in getattr(args, "qsharp_critics", []):
        name, path = parse_critic(argument)
        read_card(path)  # a mistyped path is told now, not after the model has loaded
        critics.append(f"{name}={path.absolute()}" if name else str(path.absolute()))
    ours = {
        "critics": critics,
        "cache_gib": getattr(args, "qsharp_cache_gib", None),
        "dtype": getattr(args, "qsharp_dtype", None),
        "audit_rate": getattr(args, "qsharp_audit_rate", None),
    }
    config = dict(args.additional_config or {})
    config[KEY] = {**config.get(KEY, {}), **{name: value for name, value in ours.items() if value not in (None, [])}}
    args.additional_config = config
    EngineSettings.of(argparse.Namespace(additional_config=config))


def _admit_admin(args: argparse.Namespace, settings: Settings) -> None:
    """vLLM's own API keys guard `/v1` with the same header: whoever has the admin key may pass there, too."""
    keys = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
    if keys and settings.admin_key is not None:
        args.api_key = [*keys, settings.admin_key.get_secret_value()]


def _allow_plugin() -> None:
    """Names our endpoint plugin in `VLLM_PLUGINS`, and keeps those that load without being named.

    Raises:
        ConfigError: vLLM would not find it, or log an error and go on without it.
    """
    found = entry_points(group=ENDPOINT_PLUGINS_GROUP, name=QSharpEndpoints.name)
    if not found or next(iter(found)).load() is not QSharpEndpoints:
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
