"""`qsharp serve`: vLLM's own server with our parts in it.

It takes all of vLLM's flags unchanged. Ours are turned into what a plain `vllm serve` would be given by hand
(`server.launch`).
"""

import argparse
import os
from pathlib import Path
from typing import Any

from vllm.logger import configure_logging_from_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

from qsharp_core.vllm_plugin import processors
from qsharp_core.vllm_plugin.settings import DEFAULT_AUDIT_RATE, EngineSettings
from qsharp_core.wire.guidance import ETA_RANGE
from server import launch
from server.access.install import settle_keys
from server.access.protocol import GuardedProtocol
from server.api import playground
from server.errors import EngineDiedError
from server.plugin import QSharpEndpoints
from server.presets.known import DEFAULT, PRESETS
from server.settings import ARGUMENT, Settings
from server.store.database import ACCEPTED, parse_url
from server.upstream import cli_env_setup, make_arg_parser, run_engines_alone, validate_parsed_serve_args

DESCRIPTION = """Serve a language model, guided by critics, on an OpenAI-compatible API.
Without MODEL a small one with a critic is served, to try it out; MODEL star-graph is a still smaller one, which takes
a random path until it is guided."""


KEEP_ALIVE_SECONDS = 65
"""How long a connection may be idle between two requests. Clients and load balancers keep theirs for 60 s at most. Who
keeps one for longer than the server does sends a request into a connection that is being closed, and gets no answer."""


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
    os.environ.setdefault("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", str(KEEP_ALIVE_SECONDS))
    args = parse(argv)
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    if args.headless:
        run_engines_alone(args)
        return
    uvloop.run(run_server(args, http=GuardedProtocol))
    if QSharpEndpoints.engine is not None and not QSharpEndpoints.engine.told_to_stop:
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
    settings = Settings.of(args)
    launch.add_our_parts(args, settings)
    if settings.rollouts is not None:
        parse_url(settings.rollouts.get_secret_value())  # a wrong URL is refused now
    settle_keys(args)
    if not hasattr(args, "qsharp_hint"):
        args.qsharp_hint = f"\nReady: requests go to port {args.port}, under /v1.\n"
    if playground.is_shown(settings, args):
        args.qsharp_hint += f"See what it does, token by token: http://localhost:{args.port}/\n"
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

    def add(flag: str, name: str = "", **how: Any) -> None:
        """Adds a flag of ours, which stands in the namespace only if it is given; `name` is its setting's."""
        setting = name or flag.removeprefix("--").replace("-", "_")
        ours.add_argument(flag, dest=ARGUMENT + setting, default=argparse.SUPPRESS, **how)

    add(
        "--critic",
        "critics",
        action="append",
        metavar="[NAME=]PATH",
        help="folder of a critic, or its URL, as s3://BUCKET/FOLDER; may be repeated, the first is the default",
    )
    add(
        "--no-critic",
        "critics",
        action="store_const",
        const=[],
        help="without MODEL: leave out its critic; one that is learned can be loaded later",
    )
    add(
        "--default-eta",
        type=float,
        metavar="ETA",
        help=f"guide requests that send no eta, {ETA_RANGE[0]:g} to {ETA_RANGE[1]:g}: smaller is stronger; without it "
        "they are not guided",
    )
    add(
        "--model-etas",
        metavar="ETA,…",
        help="list the model as MODEL@eta=ETA for these, besides its own name, for clients that cannot send eta; none: "
        "list none. Unless given, the eta that a critic recommends and two around it",
    )
    add(
        "--admin-key",
        metavar="KEY",
        help="allow loading, activating and unloading critics to who has this key (or set QSHARP_ADMIN_KEY)",
    )
    add(
        "--keys",
        type=Path,
        metavar="FILE",
        help="named keys of users and admins, made by `qsharp keys`; each owns what it stores (or set QSHARP_KEYS)",
    )
    add(
        "--no-auth",
        "auth",
        action="store_const",
        const=False,
        help="serve everybody who reaches this server; without it and without keys it serves this machine alone",
    )
    add(
        "--open",
        action="append",
        choices=["metrics", "docs"],
        help="/metrics or /docs need no key; may be repeated",
    )
    add(
        "--playground",
        action="store_const",
        const=True,
        help="serve the page /playground, to see what guidance does; unless given, where the server listens to this "
        "machine alone",
    )
    add("--no-playground", "playground", action="store_const", const=False, help="do not")
    add(
        "--rate-limit",
        metavar="N/TIME",
        help="requests that one key may send, as 600/minute; no limit unless given",
    )
    add(
        "--max-concurrent",
        type=int,
        metavar="N",
        help="requests that one key may have on their way; no limit unless given",
    )
    add(
        "--max-queued",
        type=int,
        metavar="N",
        help="samples that run or wait; what is more is a 503 (four for each of --max-num-seqs unless given)",
    )
    add(
        "--max-body-mib",
        type=float,
        metavar="MIB",
        help=f"the largest body of a request ({Settings.model_fields['max_body_mib'].default} unless given)",
    )
    add(
        "--rollouts",
        metavar="URL",
        help=f"keep what requests with `store: true` sample: {ACCEPTED} (or set QSHARP_ROLLOUTS)",
    )
    add(
        "--max-candidates",
        type=int,
        metavar="N",
        help=f"most candidates a request may ask for ({Settings.model_fields['max_candidates'].default} unless given)",
    )
    add(
        "--max-search",
        type=int,
        metavar="N",
        help=f"most samples of a search for one prompt ({Settings.model_fields['max_search'].default} unless given)",
    )
    add(
        "--max-kl-total",
        type=float,
        metavar="NATS",
        help="most KL divergence from the model that a guided choice may spend, whatever its request says",
    )
    add("--max-kl-token", type=float, metavar="NATS", help="the same of each token")
    add(
        "--no-share-critics",
        "share_critics",
        action="store_const",
        const=False,
        help="with --rollouts: do not take over which critics the store's other servers have",
    )
    add(
        "--critic-root",
        action="append",
        metavar="FOLDER",
        help="where critics may be loaded from over HTTP, a folder or a URL as s3://BUCKET/FOLDER; may be repeated "
        "(or set QSHARP_CRITIC_ROOT); unless given, the current folder and the critics that are named here",
    )
    add(
        "--critic-cache-folder",
        type=Path,
        metavar="FOLDER",
        help="where critics from URLs are kept on this machine's disk (or set QSHARP_CRITIC_CACHE_FOLDER); unless "
        "given, in the user's cache",
    )
    add(
        "--critic-max-gib",
        "max_gib",
        type=float,
        metavar="GIB",
        help=f"the largest critic ({EngineSettings.model_fields['max_gib'].default:g} unless given)",
    )
    add(
        "--critic-load-seconds",
        "load_seconds",
        type=float,
        metavar="SECONDS",
        help="a load over HTTP that takes longer is given up "
        f"({EngineSettings.model_fields['load_seconds'].default:g} unless given)",
    )
    add(
        "--critic-cache-gib",
        "cache_gib",
        type=float,
        metavar="GIB",
        help="key-value cache of each critic; unless given, room for max_num_seqs of the longest sequences, 2 at most",
    )
    add(
        "--critic-dtype",
        "dtype",
        choices=["auto", "float32", "bfloat16"],
        help="of critics' weights; auto is float32 beside a reference in float32, else bfloat16",
    )
    add(
        "--audit-rate",
        type=float,
        metavar="SHARE",
        help=f"share of guided rows whose scores are checked by a plain forward pass ({DEFAULT_AUDIT_RATE:g} unless "
        "given); 0 turns it off",
    )
    make_arg_parser(serve)
    # A model's own sampling defaults (top-p, temperature) would change the reference policy behind the client's back.
    serve.set_defaults(generation_config="vllm")
    return parser, serve
