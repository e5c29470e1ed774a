"""The kinds of recipes, by name. A kind is imported when a recipe of it is loaded, because most kinds load PyTorch."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console

from trainer.experiments.report import Outcome

# Kind -> (model of its fields, what runs it), each as `module:object`.
KINDS = {
    "ablation": ("trainer.experiments.ablation.settings:Ablation", "trainer.experiments.ablation.recipe:run"),
    "cross_model": ("trainer.experiments.cross_model:CrossModel", "trainer.experiments.cross_model:run"),
    "experiment": ("trainer.experiments.experiment:Experiment", "trainer.experiments.experiment:run"),
    "star_graph": (
        "trainer.experiments.star_graph.settings:StarGraphRecipe",
        "trainer.experiments.star_graph.recipe:run",
    ),
    "tree_mdp": ("trainer.experiments.tree_mdp.recipe:TreeRecipe", "trainer.experiments.tree_mdp.recipe:run"),
}


@dataclass(frozen=True)
class RecipeKind:
    """A kind of recipe.

    Attributes:
        fields: the model of its fields.
        run: does it, given a checked recipe, the folder to work in, and the console that the table goes to.
    """

    fields: type[BaseModel]
    run: Callable[[Any, Path, Console], Awaitable[Outcome]]


def kind_of(name: str) -> RecipeKind:
    """The kind of a name in `KINDS`; its modules are imported now."""
    fields, run = (_object(path) for path in KINDS[name])
    return RecipeKind(fields, run)


def _object(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
