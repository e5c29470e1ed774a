"""Flags that several commands share, and what they become."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from qsharp_core.critic.fetching import local_folder
from qsharp_core.locations import Location, parse_location
from qsharp_core.suggestions import did_you_mean
from qsharp_core.wire.guidance import BUDGET_RANGE, TAILS
from trainer.evaluation.searches import search_named
from trainer.rewards.verifiers import MEMORY_GIB, TIMEOUT
from trainer.rollouts.address import default_key, default_url
from trainer.rollouts.retrying import FIRST_PATIENCE, PATIENCE
from trainer.tasks.base import DEFAULT_MAX_TOKENS
from trainer.trust import Trust


def say(text: str) -> None:
    """Prints a line for people, above a progress bar if there is one."""
    tqdm.write(text, file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """A parser that says which flag may have been meant by one that there is not."""

    def error(self, message: str) -> NoReturn:
        unknown = message.partition("unrecognized arguments: ")[2].split()
        flags = [flag for action in self._actions for flag in action.option_strings]
        meant = did_you_mean(unknown[0].partition("=")[0], flags) if unknown else ""
        super().error(message + meant)


def parser(command: str, description: str | None, usage: str | None = None) -> argparse.ArgumentParser:
    """The parser of `qsharp COMMAND`; its description is the command's module docstring, printed as it stands."""
    return Parser(
        prog=f"qsharp {command}",
        usage=usage,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def positive(text: str) -> int:
    """Parses a whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def nats(text: str) -> float | None:
    """Parses an amount of KL divergence, or `none`."""
    value = None if text == "none" else float(text)
    if value is not None and not BUDGET_RANGE[0] <= value <= BUDGET_RANGE[1]:
        raise argparse.ArgumentTypeError(f"must be {BUDGET_RANGE[0]:g} to {BUDGET_RANGE[1]:g}, or none; got {text}")
    return value


def search(text: str) -> str | None:
    """Parses a search, or `none`."""
    try:
        return search_named(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def names(text: str) -> list[str]:
    """Parses names with commas between them."""
    listed = [name.strip() for name in text.split(",")]
    if not all(listed):
        raise argparse.ArgumentTypeError(f"must be NAME or NAME,NAME; got {text!r}")
    return listed


def location(text: str) -> Location:
    """Parses a folder, or the URL of one in an object store."""
    try:
        return parse_location(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def critic(text: str) -> Path:
    """Parses the folder of a critic; one at a URL is fetched.

    Raises:
        CriticError: it cannot be fetched.
    """
    return local_folder(location(text))


def key_value(text: str) -> tuple[str, str]:
    """Parses `KEY=VALUE`."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE; got {text!r}")
    return key, value


def add_server_arguments(parser: argparse.ArgumentParser, concurrency: int | None = 16, patience: bool = True) -> None:
    """Adds the flags of every command that talks to a server.

    Args:
        parser: of the command.
        concurrency: default of `--concurrency`; None leaves that flag out.
        patience: whether there is a flag `--patience`.
    """
    group = parser.add_argument_group("server")
    group.add_argument("--url", default=default_url(), help="of the server (default: QSHARP_URL, or %(default)s)")
    group.add_argument(
        "--api-key", default=default_key(), help="if it wants one (default: QSHARP_API_KEY, or VLLM_API_KEY)"
    )
    if patience:
        group.add_argument(
            "--patience",
            type=float,
            help=f"seconds a request is tried for (default: {PATIENCE:g}, and {FIRST_PATIENCE:g} until the server has "
            "answered once)",
        )
    if concurrency is not None:
        group.add_argument("--concurrency", type=positive, default=concurrency, help="requests at once (%(default)s)")


def add_filter_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of every command that reads stored rollouts: which rollouts."""
    group = parser.add_argument_group("rollouts")
    group.add_argument("--metadata", action="append", type=key_value, default=[], metavar="KEY=VALUE", help="they have")
    group.add_argument("--critic", help="guided by this one: NAME or NAME@VERSION")
    group.add_argument("--guided", choices=["true", "false"], help="throughout, by any critic")


def add_launcher_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that names what starts the processes of a training."""
    parser.add_argument(
        "--launcher",
        metavar="COMMAND",
        help='what starts the training\'s processes, as "accelerate launch --num_processes 8" (default: one process)',
    )


def add_trust_arguments(group: argparse._ArgumentGroup) -> None:
    """Adds the flags of every command that learns: from whose rollouts, and from whose rewards."""
    group.add_argument(
        "--owner", type=names, action="extend", default=[], metavar="NAME", help="of these holders of keys alone"
    )
    group.add_argument(
        "--rewards-by", type=names, action="extend", default=[], metavar="NAME", help="rewards of others do not count"
    )


def trust_of(args: argparse.Namespace) -> Trust:
    """What the flags of `add_trust_arguments` say."""
    return Trust(tuple(args.owner), tuple(args.rewards_by))


def add_task_arguments(parser: argparse.ArgumentParser, split: str) -> None:
    """Adds the flags of every command that samples: which problems, and how they are sampled.

    Args:
        split: default of `--split`.
    """
    group = parser.add_argument_group("problems")
    group.add_argument("--task", help="a name, or module:object")
    group.add_argument(
        "--prompts",
        metavar="FILE",
        help='JSON lines, {"id", "prompt" | "messages", …}; or a data set for the package datasets, NAME[:CONFIG]',
    )
    group.add_argument("--split", default=split, help="default: %(default)s")
    group.add_argument("--limit", type=positive, help="only the first so many problems")
    group = parser.add_argument_group("sampling")
    group.add_argument("--model", help="default: the one that is served")
    group.add_argument("--temperature", type=float, default=1.0, help="default: %(default)s")
    group.add_argument("--top-p", type=float, default=1.0, help="default: %(default)s")
    group.add_argument("--top-k", type=int, default=0, help="0 is all tokens (the default)")
    group.add_argument(
        "--max-tokens", type=positive, help=f"default: the task's; {DEFAULT_MAX_TOKENS} of prompts in a file"
    )
    group.add_argument("--stop", action="append", help="may be repeated; default: the task's")
    group.add_argument("--seed", type=int, default=0, help="another one makes other samples (default: %(default)s)")


def add_guidance_arguments(parser: argparse.ArgumentParser, critic: bool = True) -> argparse._ArgumentGroup:
    """Adds the flags for the fields of a request's `guidance`, except its method.

    Args:
        critic: whether there is a flag `--critic`.

    Returns:
        The group, for further flags.
    """
    group = parser.add_argument_group("guidance")
    if critic:
        group.add_argument("--critic", help="NAME or NAME@VERSION; default: the server's first")
    group.add_argument("--candidates", type=positive, help="tokens weighed at each step")
    group.add_argument("--min-prob", type=float, help="least probability of a candidate")
    group.add_argument("--tail", choices=TAILS, help="what happens to other tokens")
    return group


def guidance_options_of(args: argparse.Namespace) -> tuple[tuple[str, float | int | str], ...]:
    """The options of `guidance` that the flags of `add_guidance_arguments` give; the server decides the others."""
    options = {name: getattr(args, name) for name in ("candidates", "min_prob", "tail")}
    return tuple((name, value) for name, value in options.items() if value is not None)


def add_verifier_arguments(parser: argparse.ArgumentParser, default: list[str] | None) -> None:
    """Adds the flags of every command that judges completions: who judges, and within which limits.

    Args:
        default: verifiers to use where none is named, for the help text; None makes `--verifier` required.
    """
    group = parser.add_argument_group("verifiers")
    group.add_argument(
        "--verifier",
        action="append",
        metavar="NAME[=WEIGHT]",
        required=default is None,
        help="may be repeated" + (f"; default: {' '.join(default)}" if default else ""),
    )
    group.add_argument("--workers", type=positive, default=2, help="processes they run in (%(default)s)")
    group.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds for a completion (%(default)s)")
    group.add_argument(
        "--verifier-memory",
        type=float,
        default=MEMORY_GIB,
        help="GiB that a process may have, 0 is no limit (%(default)s)",
    )
