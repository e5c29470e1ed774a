"""Coroutines run from plain code. In a notebook a loop is running already: there they run in a thread of their own."""

import asyncio
import inspect
from argparse import Namespace
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


def run(work: Coroutine[Any, Any, Result]) -> Result:
    """Runs a coroutine to its end, and returns its result."""
    if not _loop_runs():
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def _loop_runs() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def by_flags(function: Callable[..., Result], *given: Any, args: Namespace, **more: Any) -> Result:
    """Calls a function with those of a command's flags that are its parameters.

    Args:
        function: its parameters have the flags' names.
        given: positional arguments.
        args: the parsed flags.
        more: arguments that win over flags.
    """
    names = list(inspect.signature(function).parameters)[len(given) :]
    flags = {name: value for name, value in vars(args).items() if name in names}
    return function(*given, **(flags | more))
