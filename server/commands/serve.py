"""`qsharp serve`: vLLM's own server with our parts in it.

It takes all of vLLM's flags unchanged. Ours are turned into what a plain `vllm serve` would be given by hand
(`server.launch`).
"""

import argparse
from pathlib import Path

from vllm.logger import configure_logging_from_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

from qsharp_core.vllm_plugin import processors, upstream
from qsharp_core.vllm_plugin.settings import DEFAULT_AUDIT_RATE, EngineSettings
from qsharp_core.wire.guidance import ETA_RANGE
from server import launch
from server.access.install import settle_keys
from server.access.protocol import GuardedProtocol
from server.errors import EngineDiedError
from server.plugin import QSharpEndpoints
from server.presets.known import DEFAULT, PRESETS
from server.settings import ARGUMENT, Settings
from server.store.database import ACCEPTED, parse_url
from server.upstream import cli_env_setup, make_arg_parser, validate_parsed_serve_args

DESCRIPTION = """Serve a language model, guided by critics, on an OpenAI-compatible API.
Without MODEL a small one with a critic is served, to try it out; MODEL star-graph is a still smaller one, which takes
a random path until it is guided."""


def main(argv: list[str]) -> None:
    """Runs the server until it is told to stop.

    Args:
        argv: what follows `qsharp serve`.

    Raises:
        ConfigError, CriticError: before anything heavy is started, where the error can be seen that early.
        EngineDiedError: the server ended because its engine did.
    """
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server

    cli_env_setup()
    launch.allow_plugin()
    processors.settle_runner()
    args = parse(argv)
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    uvloop.run(run_server(args, http=GuardedProtocol))
    if QSharpEndpoints.engine_client is not None and upstream.has_died(QSharpEndpoints.engine_client):
        raise EngineDiedError("the engine died; its last words are above")


def parse(argv: list[str]) -> argparse.Namespace:
    """vLLM's arguments with our parts added; where no model is named, those of the default preset.

    Raises:
        ConfigError, CriticError: a setting cannot work, or a critic's folder cannot be read.
    """
    parser, serve = _parser()
    args = parser.parse_args(["serve", *argv])
    tag = args.model_tag
    preset = PRESETS[DEFAULT] if tag is None else PRESETS.get(tag)
    if preset is None or (tag is not None and Path(tag).is_dir()):  # a folder of that name is what was meant
        args.model = args.model_tag
    else:
        serve.set_defaults(**launch.preset_defaults(preset))
        args = parser.parse_args(["serve", *argv])
        # Not a default of the flag: argparse would append to it those that are named.
        if not hasattr(args, "qsharp_critics"):
            args.qsharp_critics = [f"{preset.critic}={preset.critic_folder}"]
            args.qsharp_hint = preset.hint(args.port)
    launch.refuse_unsupported(args)
    launch.add_our_parts(args)
    settings = Settings.of(args)
    if settings.rollouts is not None:
        parse_url(settings.rollouts.get_secret_value())  # a wrong URL is refused now
    settle_keys(args)
    return args


class _ServeParser(FlexibleArgumentParser):
    """vLLM's parser. Its help names only the groups of flags; this shows our flags in full before them."""

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
        "--keys",
        type=Path,
        metavar="FILE",
        dest=ARGUMENT + "keys",
        default=argparse.SUPPRESS,
        help="named keys of users and admins, made by `qsharp keys`; each owns what it stores (or set QSHARP_KEYS)",
    )
    ours.add_argument(
        "--no-auth",
        action="store_const",
        const=False,
        dest=ARGUMENT + "auth",
        default=argparse.SUPPRESS,
        help="serve everybody who reaches this server; without it and without keys it serves this machine alone",
    )
    ours.add_argument(
        "--open",
        action="append",
        choices=["metrics", "docs"],
        dest=ARGUMENT + "open",
        default=argparse.SUPPRESS,
        help="/metrics or /docs need no key; may be repeated",
    )
    ours.add_argument(
        "--rate-limit",
        metavar="N/TIME",
        dest=ARGUMENT + "rate_limit",
        default=argparse.SUPPRESS,
        help="requests that one key may send, as 600/minute; no limit unless given",
    )
    ours.add_argument(
        "--max-concurrent",
        type=int,
        metavar="N",
        dest=ARGUMENT + "max_concurrent",
        default=argparse.SUPPRESS,
        help="requests that one key may have on their way; no limit unless given",
    )
    ours.add_argument(
        "--max-queued",
        type=int,
        metavar="N",
        dest=ARGUMENT + "max_queued",
        default=argparse.SUPPRESS,
        help="samples that run or wait; what is more is a 503 (four for each of --max-num-seqs unless given)",
    )
    ours.add_argument(
        "--max-body-mib",
        type=float,
        metavar="MIB",
        dest=ARGUMENT + "max_body_mib",
        default=argparse.SUPPRESS,
        help=f"the largest body of a request ({Settings.model_fields['max_body_mib'].default} unless given)",
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
        "--critic-root",
        action="append",
        type=Path,
        metavar="FOLDER",
        dest=ARGUMENT + "critic_root",
        default=argparse.SUPPRESS,
        help="where critics may be loaded from over HTTP; may be repeated (or set QSHARP_CRITIC_ROOT); unless given, "
        "the current folder and the critics that are named here",
    )
    ours.add_argument(
        "--critic-max-gib",
        type=float,
        metavar="GIB",
        dest="qsharp_max_gib",
        default=argparse.SUPPRESS,
        help=f"the largest critic ({EngineSettings.model_fields['max_gib'].default:g} unless given)",
    )
    ours.add_argument(
        "--critic-load-seconds",
        type=float,
        metavar="SECONDS",
        dest="qsharp_load_seconds",
        default=argparse.SUPPRESS,
        help="a load over HTTP that takes longer is given up "
        f"({EngineSettings.model_fields['load_seconds'].default:g} unless given)",
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
    make_arg_parser(serve)
    # A model's own sampling defaults (top-p, temperature) would change the reference policy behind the client's back.
    serve.set_defaults(generation_config="vllm")
    return parser, serve
