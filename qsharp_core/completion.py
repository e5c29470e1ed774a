"""`qsharp completion`: prints a shell's completion of all commands and their flags.

    qsharp completion bash > ~/.local/share/bash-completion/completions/qsharp
    qsharp completion zsh > ~/.zfunc/_qsharp          # a folder of $fpath
    qsharp completion tcsh > ~/.qsharp-completion.csh # then: source it

It is made once, from the parsers that the commands themselves use: `qsharp serve` alone has hundreds of flags, vLLM's
among them, and takes seconds to import, which is too long for a key that is pressed twice.
"""

import argparse
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any

import shtab

from qsharp_core.cli import COMMANDS


def main(argv: list[str]) -> None:
    """Runs `qsharp completion`."""
    parser = argparse.ArgumentParser(
        prog="qsharp completion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
    shell = parser.parse_args(argv).shell
    with redirect_stdout(sys.stderr):  # vLLM may log while it is imported, and logs to where this is printed
        commands = {name: (parser_of(name), line) for name, (_, line) in COMMANDS.items()}
    print(shtab.complete(_whole(commands), shell))


def _whole(commands: Mapping[str, tuple[argparse.ArgumentParser, str]]) -> argparse.ArgumentParser:
    """One parser of all commands."""
    whole = argparse.ArgumentParser(prog="qsharp")
    whole.add_argument("--version", action="store_true", help="say which version this is")
    parts = whole.add_subparsers()
    for name, (parser, line) in commands.items():
        parts.add_parser(name, help=line)
        parts.choices[name] = parser
    return whole


class _Found(Exception):
    """Carries a parser from where it is asked for help."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser that a command parses its arguments with: the one that is asked for help by `--help`."""
    parsers: Any = argparse.ArgumentParser
    print_help = parsers.print_help
    parsers.print_help = _find
    try:
        import_module(COMMANDS[command][0]).main(["--help"])
    except _Found as found:
        return found.parser
    finally:
        parsers.print_help = print_help
    raise AssertionError(f"qsharp {command} --help shows no help")


def _find(parser: argparse.ArgumentParser, *_: object) -> None:
    raise _Found(parser)
