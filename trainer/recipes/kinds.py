"""The kinds of recipes, by name. They are imported when one of them runs: most of them load PyTorch."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console

# Kind -> (model of its fields, what runs it), each as `module:object`.
KINDS = {
    "ablation": ("trainer.recipes.ablation:Ablation", "trainer.recipes.ablation:run"),
    "cross_model": ("trainer.recipes.cross_model:CrossModel", "trainer.recipes.cross_model:run"),
    "experiment": ("trainer.recipes.experiment:Experiment", "trainer.recipes.experiment:run"),
    "star_graph": ("trainer.star_graph.settings:StarGraphRecipe", "trainer.star_graph.recipe:run"),
    "tree_mdp": ("trainer.recipes.tree_mdp:TreeRecipe", "trainer.recipes.tree_mdp:run"),
}


@dataclass(frozen=True)
class Kind:
    """A kind; `run` gets a checked recipe, the folder it works in, and where its table goes; returns the report."""

    fields: type[BaseModel]
    run: Callable[[Any, Path, Console], Awaitable[dict[str, Any]]]


def kind_of(name: str) -> Kind:
    """The kind of that name, which is one of `KINDS`."""
    fields, run = (_object(path) for path in KINDS[name])
    return Kind(fields, run)


def _object(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
