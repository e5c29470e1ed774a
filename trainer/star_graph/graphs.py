"""Star graphs `G(d, l)` as text: `a,b|c,d|…/start,goal=path` (Bachmann and Nagarajan 2024; Q♯, section 4.1).

`d` arms of `l - 1` nodes each leave one start; the goal is one arm's last node. The first node after the start decides
everything, and tells nothing of where it leads: a next-token learner takes an arm at random.
"""

import random
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Shape(BaseModel):
    """`G(degree, length)` with nodes named by `labels` numbers, edges listed from the start outwards.

    Attributes:
        length: nodes of the path, start and goal among them.
        labels: nodes are named 0 … labels − 1.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    degree: int = Field(default=5, ge=1)
    length: int = Field(default=5, ge=2)
    labels: int = Field(default=25, ge=2)

    @model_validator(mode="after")
    def _enough_labels(self) -> Self:
        if self.nodes > self.labels:
            raise ValueError(f"labels must be at least {self.nodes}, the nodes of {self}; got {self.labels}")
        return self

    @property
    def nodes(self) -> int:
        """Of one graph."""
        return 1 + self.degree * (self.length - 1)

    def __str__(self) -> str:
        return f"G({self.degree},{self.length})"


@dataclass(frozen=True)
class Graph:
    """A graph: `arms[i]` is the path from the start to the end of arm `i`; the goal ends arm `right`."""

    arms: tuple[tuple[int, ...], ...]
    edges: tuple[tuple[int, int], ...]
    right: int

    @property
    def prompt(self) -> str:
        """Edges, start and goal; ends with `=`."""
        path = self.arms[self.right]
        listed = "|".join(f"{a},{b}" for a, b in self.edges)
        return f"{listed}/{path[0]},{path[-1]}="

    @property
    def path(self) -> str:
        """The answer."""
        return as_text(self.arms[self.right])


def as_text(path: tuple[int, ...]) -> str:
    """A path as the model writes it."""
    return ",".join(map(str, path))


def draw(shape: Shape, seed: str) -> Graph:
    """The graph of a seed: labels, the order of edges and the goal are uniform."""
    rng = random.Random(f"star-graph/{shape.degree}/{shape.length}/{shape.labels}/{seed}")
    names = rng.sample(range(shape.labels), shape.nodes)
    steps = shape.length - 1
    arms = tuple((names[0], *names[1 + i * steps : 1 + (i + 1) * steps]) for i in range(shape.degree))
    edges = [edge for arm in arms for edge in pairwise(arm)]
    rng.shuffle(edges)
    return Graph(arms, tuple(edges), rng.randrange(shape.degree))
