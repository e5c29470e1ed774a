"""The command line, `qsharp`. Commands are imported when they run: the server and the trainer never see each other."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from qsharp_core.errors import QSharpError
from qsharp_core.suggestions import did_you_mean

# Command -> (module with `main(argv)`, one line of help).
COMMANDS = {
    "serve": ("server.commands.serve", "serve a model, guided by critics, on an OpenAI-compatible API"),
    "keys": ("server.commands.keys", "who may use a server: add, list, revoke"),
    "critics": (
        "server.commands.critics",
        "the critics of a running server: list, load, activate, roll back, unload, score",
    ),
    "rollouts": ("server.commands.rollouts", "stored rollouts of a running server: delete old ones"),
    "collect": ("trainer.commands.collect", "sample a task's problems through a server, which stores the rollouts"),
    "reward": ("trainer.commands.reward", "have verifiers judge stored rollouts"),
    "train": ("trainer.commands.train", "make the next version of a critic from logged rollouts"),
    "evaluate": ("trainer.commands.evaluate", "measure a task's accuracy against KL, over eta and methods"),
    "loop": ("trainer.commands.loop", "round after round: rollouts become the next critic of a running server"),
    "run": ("trainer.commands.run", "run an experiment that a recipe describes, and report on it"),
    "export": ("trainer.commands.export", "write stored rollouts to a Parquet file"),
    "completion": ("qsharp_core.completion", "print what makes a shell complete these commands and their flags"),
}
RESUMABLE = ("collect", "reward", "evaluate")
"""Commands that go on where they were stopped, without a flag."""
ANYWHERE = ("--url", "--api-key")
"""Flags with a value that may stand before the command, too."""
INTERRUPTED = 128 + 2
"""The exit status of a command that Ctrl-C stopped, as shells have it."""


def usage() -> str:
    """What `qsharp --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  qsharp {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: qsharp COMMAND …, or qsharp --version",
            "",
            "Value-guided decoding (Q-sharp) on vLLM.",
            "",
            *lines,
            "",
            "qsharp COMMAND --help tells more of each. With no model, `qsharp serve` serves one to try it out.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; 0 if it went well, 1 if not, 2 if there is no such command, 130 if Ctrl-C stopped it."""
    given = _command_first(list(sys.argv[1:] if argv is None else argv))
    name = given[0] if given else "--help"
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"qsharp-serve {version('qsharp-serve')}")
        return 0
    if name not in COMMANDS:
        print(f"qsharp: no command {name!r}{did_you_mean(name, COMMANDS)}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        import_module(COMMANDS[name][0]).main(given[1:])
    except QSharpError as error:
        print(f"qsharp {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        how = str(stopped) or ("stopped; the same command goes on from here" if name in RESUMABLE else "stopped")
        print(f"\nqsharp {name}: {how}", file=sys.stderr)
        return INTERRUPTED
    return 0


def _command_first(given: list[str]) -> list[str]:
    """Moves flags that stand before the command (`qsharp --url URL collect …`) behind it."""
    flags: list[str] = []
    while given and given[0].partition("=")[0] in ANYWHERE:
        taken = 1 if "=" in given[0] else 2
        flags, given = flags + given[:taken], given[taken:]
    return [*given[:1], *flags, *given[1:]]
