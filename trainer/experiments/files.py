"""Recipe files: how they are found, read, changed by `--set`, and checked.

A recipe is TOML. Its `kind` says which fields it has; its first line is a comment that says what it is.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from qsharp_core.errors import QSharpError
from trainer.experiments.kinds import KINDS, RecipeKind, kind_of

FOLDER = Path(__file__).parent / "recipes"
"""The recipes that come with the package."""


class RecipeError(QSharpError):
    """A recipe that cannot be found, read or used; names the file and the field."""


@dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Attributes:
        name: the file's name, without its suffix.
        kind_name: the name of its kind, as the file has it.
        kind: its kind.
        settings: its fields, an instance of `kind.fields`.
    """

    name: str
    kind_name: str
    kind: RecipeKind
    settings: BaseModel

    @property
    def identity(self) -> dict[str, Any]:
        """What tells a folder's work from that of other recipes: all fields but those that a kind lists in `FREE`."""
        free = getattr(self.settings, "FREE", None)
        return {"kind": self.kind_name, **self.settings.model_dump(mode="json", exclude=free)}


def built_in() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}


def headline(path: Path) -> tuple[str, str]:
    """The kind of the recipe in a file, and what the file's first line says of it."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return str(_table(path).get("kind", "?")), first.removeprefix("#").strip()


def load(name: str, changes: Sequence[str] = ()) -> Recipe:
    """The recipe of that name, or in that file, with changes.

    Args:
        name: the name of a built-in recipe, or a path.
        changes: `key=value`, as `--set` takes them; keys of nested tables are joined by dots.

    Raises:
        RecipeError
    """
    path = built_in().get(name, Path(name))
    table = _table(path)
    for change in changes:
        _set(table, change)
    kind_name = table.get("kind")
    if not isinstance(kind_name, str) or kind_name not in KINDS:
        raise RecipeError(f"{path}: kind: must be one of {', '.join(KINDS)}; got {kind_name!r}")
    kind = kind_of(kind_name)
    if "kind" not in kind.fields.model_fields:
        del table["kind"]
    try:
        return Recipe(path.stem, kind_name, kind, kind.fields.model_validate(table))
    except ValidationError as error:
        wrong = "; ".join(_said(one) for one in error.errors()[:3])
        raise RecipeError(f"{path}{' with --set' if changes else ''}: {wrong}") from error


def _table(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"no recipe {str(path)!r}: give a file, or one of {', '.join(built_in())}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is not TOML: {error}") from error


def _set(table: dict[str, Any], change: str) -> None:
    """Puts `a.b=value` into a table; a value that is not TOML is taken as a string."""
    key, equals, text = change.partition("=")
    *parents, last = key.split(".")
    if not equals or not all([*parents, last]):
        raise RecipeError(f"--set {change}: must be KEY=VALUE, as --set sampling.temperature=0.8")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise RecipeError(f"--set {change}: {parent} is not a table")
    try:
        table[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[last] = text


def _said(error: Any) -> str:
    field = ".".join(map(str, error["loc"])) or "the recipe"
    if error["type"] == "extra_forbidden":
        return f"{field}: there is no such field"
    message = error["msg"].removeprefix("Value error, ")
    return f"{field}: {message}" + ("" if error["type"] == "missing" else f"; got {error['input']!r:.80}")
