"""`qsharp critics`: lists and changes the critics of a running server, through `/v1/critics`."""

import argparse
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qsharp_core.wire.critics import (
    ActivateRequest,
    CriticList,
    CriticScores,
    CriticVersion,
    CriticVersions,
    LoadRequest,
    ScoreRequest,
    critic_name,
)
from server.commands.admin import AdminClient, add_server_arguments

PATH = "/v1/critics"


def main(argv: list[str]) -> None:
    """Runs one of the sub-commands.

    Raises:
        AdminError
    """
    args = _parser().parse_args(argv)
    with AdminClient(args.url, args.admin_key) as client:
        _run(args, client, Console())


def _run(args: argparse.Namespace, client: AdminClient, console: Console) -> None:
    match args.command:
        case "load":
            path = str(Path(args.path).absolute()) if Path(args.path).exists() else args.path
            load = LoadRequest(path=path, name=args.name, activate=args.activate)
            loaded = client.call(CriticVersion, "POST", PATH, body=load)
            _print(console, "loaded", loaded)
            if not loaded.default:
                console.print("requests that name no critic do not get it; `activate --default` changes that")
        case "activate":
            activate = ActivateRequest(version=args.version, default=args.default, share=args.share, why=args.why)
            _print(
                console, "activated", client.call(CriticVersion, "POST", f"{PATH}/{args.name}/activate", body=activate)
            )
        case "rollback":
            _print(console, "activated", client.call(CriticVersion, "POST", f"{PATH}/{args.name}/rollback"))
        case "unload":
            version = client.call(CriticVersion, "DELETE", f"{PATH}/{args.name}/{args.version}")
            when = ", as soon as its requests have ended" if version.loaded else ""
            console.print(f"unloaded [bold]{version.id}[/bold]{when}")
        case "score":
            texts = ScoreRequest(prompt=args.prompt, completion=args.completion)
            for score in client.call(CriticScores, "POST", f"{PATH}/{args.name}/score", body=texts).data:
                for token, value in zip(_texts(client, score.token_ids), score.values, strict=True):
                    console.print(f"{value:.4f}  {token!r}", markup=False, highlight=False)
        case "history":
            console.print(_history(client.call(CriticVersions, "GET", f"{PATH}/{args.name}")))
        case _:
            critics = client.call(CriticList, "GET", PATH)
            console.print(_table(critics))
            for key, problem in critics.wanted.problems.items() if critics.wanted else ():
                console.print(f"[red]{key} is wanted, and this server does not have it:[/red] {escape(problem)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qsharp critics", description="The critics of a running server.")
    add_server_arguments(parser)
    commands = parser.add_subparsers(dest="command", metavar="list|load|activate|rollback|history|unload|score")
    commands.add_parser("list", help="show what is loaded (the default)")
    load = commands.add_parser("load", help="load a critic's folder")
    load.add_argument("path", help="on the server's machine, or a URL as s3://BUCKET/FOLDER")
    load.add_argument("--name", type=_name, help="call it so, whatever its card says")
    load.add_argument("--activate", action="store_true", help="make it the version that its name means")
    for name, text in (("activate", "make a version the one that its name means"), ("unload", "free a version")):
        command = commands.add_parser(name, help=text)
        command.add_argument("name", type=_name)
        command.add_argument("version", type=_name)
        if name == "activate":
            command.add_argument("--default", action="store_true", help="also for requests that name no critic")
            command.add_argument(
                "--share",
                type=_share,
                default=1.0,
                metavar="0..1",
                help="only for this share of the requests that name no version, as a trial beside the active one; 0 "
                "ends it",
            )
            command.add_argument("--why", metavar="TEXT", help="is kept in the history")
    commands.add_parser("rollback", help="activate the version active before").add_argument("name", type=_name)
    history = commands.add_parser("history", help="which versions a name was said to mean, of servers with a store")
    history.add_argument("name", type=_name)
    score = commands.add_parser("score", help="expected reward after each token of a completion")
    score.add_argument("name", help="NAME or NAME@VERSION")
    score.add_argument("prompt")
    score.add_argument("completion")
    for command in commands.choices.values():  # the same flags, after the sub-command
        add_server_arguments(command, again=True)
    return parser


def _texts(client: AdminClient, token_ids: Sequence[int]) -> list[str]:
    """The text of each token, or its number where the server does not tell."""
    return [client.text(token) or str(token) for token in token_ids]


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1; got {text}")
    return share


def _name(text: str) -> str:
    try:
        return critic_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _print(console: Console, done: str, version: CriticVersion) -> None:
    console.print(f"{done} [bold]{version.id}[/bold] ({'active' if version.active else 'not active'})")


def _table(critics: CriticList) -> Table:
    table = Table("critic", "version", "state", "users", "cache blocks", "longest", "path")
    for critic in critics.data:
        table.add_row(
            critic.name + (" (default)" if critic.default else ""),
            critic.version,
            _state(critic),
            str(critic.users),
            "none" if critic.kv_blocks is None else f"{critic.kv_blocks_used} / {critic.kv_blocks}",
            str(critic.max_length),
            critic.path,
        )
    return table


def _state(critic: CriticVersion) -> str:
    if critic.leaving:
        return "leaving"
    share = f" ({critic.share:.3g} of requests)" if 0 < critic.share < 1 else ""
    return ("active" if critic.active else "trial" if share else "") + share


def _history(critic: CriticVersions) -> Table:
    table = Table("when", "version", "", "by", "why")
    for decision in critic.decisions:
        trial = f"trial: {decision.share:.3g} of requests" if decision.share else "trial ended"
        told = {trial: decision.share < 1, "rolled back": decision.rolled_back, "default": decision.default}
        about = [text for text, holds in told.items() if holds]
        when = datetime.fromtimestamp(decision.created).astimezone().isoformat(" ", "seconds")
        table.add_row(when, decision.version, ", ".join(about), escape(decision.given_by), escape(decision.why or ""))
    return table
