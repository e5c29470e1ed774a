"""Finds tasks and other objects by name: built-in ones, those of installed packages (entry points), `module:object`."""

import os
import sys
from collections.abc import Mapping
from functools import reduce
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from qsharp_core.suggestions import did_you_mean
from trainer.tasks.base import Task, TaskError

GROUP = "qsharp.tasks"
BUILT_IN = {
    "sums": "trainer.tasks.sums:TASK",
    "tree_mdp": "trainer.tasks.tree_mdp:TASK",
    "gsm8k": "trainer.tasks.gsm8k:TASK",
    "gsm8k-short": "trainer.tasks.gsm8k:SHORT",
    "svamp": "trainer.tasks.svamp:TASK",
    "math": "trainer.tasks.competition_math:TASK",
    "star_graph": "trainer.tasks.star_graph:TASK",
    "sentence": "trainer.tasks.sentence:TASK",
    "tone": "trainer.tasks.tone:TASK",
    "extraction": "trainer.tasks.extraction:TASK",
}


def find_task(spec: str) -> Task:
    """The task that a name, or `module:object`, means.

    Raises:
        TaskError: there is no such task.
    """
    task = find(spec, BUILT_IN, GROUP, "task")
    if not isinstance(task, Task):
        raise TaskError(f"{spec} is a {type(task).__name__}, not a trainer.tasks.base.Task")
    return task


def is_registered(name: str) -> bool:
    """Whether a name is built in or an entry point's. Other names could import anything, so data must not name them."""
    return name in BUILT_IN or name in entry_points(group=GROUP).names


def find(spec: str, built_in: Mapping[str, str], group: str, noun: str) -> Any:
    """The object that a name, or `module:object`, means.

    Args:
        spec: a name, or `module:object`.
        built_in: `module:object` by name.
        group: the group of entry points that is searched as well.
        noun: what the object is, for messages.

    Raises:
        TaskError: it cannot be found, or its module cannot be imported.
    """
    registered = {point.name: point.value for point in entry_points(group=group)}
    path = built_in.get(spec) or registered.get(spec) or spec
    module, colon, attribute = path.partition(":")
    if not colon or not module or not attribute:
        known = sorted({*built_in, *registered})
        listed = ", ".join(known)
        raise TaskError(f"no {noun} {spec!r}; known are {listed}, or module:object{did_you_mean(spec, known)}")
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # a script's own folder is on the path, not where it is called
    try:
        return reduce(getattr, attribute.split("."), import_module(module))
    except (ImportError, AttributeError) as error:
        raise TaskError(f"{noun} {spec!r} cannot be loaded: {error}") from error
