"""Star graphs as a task: `a,b|c,d|…/start,goal=path` (Bachmann and Nagarajan 2024; Q♯, section 4.1).

`d` arms of `l - 1` nodes each leave one start; the goal is one arm's last node. The first node after the start decides
everything, and tells nothing of where it leads: a next-token learner takes an arm at random.

The task `star_graph` has `G(5,5)` with 25 labels; `star_graph_task` makes a task of another size. Graphs are drawn by
seed, and no two splits share a seed. Pre-training and a critic's rollouts draw from seeds of their own
(`trainer.experiments.star_graph`), so both splits are new to a model that was made there.
"""

import random
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trainer.tasks.base import Problem, SamplingDefaults, Task

SPLITS = ("train", "held_out")


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
        """The number of nodes of one graph."""
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
        """The graph's edges, start and goal, ending with `=`."""
        path = self.arms[self.right]
        listed = "|".join(f"{a},{b}" for a, b in self.edges)
        return f"{listed}/{path[0]},{path[-1]}="

    @property
    def path(self) -> str:
        """The path from start to goal: the problem's answer."""
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


def solves(question: str, completion: str) -> float | None:
    """1 if the completion is a path from start to goal in the graph that ends the question, with no node twice.

    Args:
        question: ends with `a,b|c,d|…/start,goal=`: edges and then the path's ends.
        completion: its first line is the path.

    Returns:
        1 or 0; None if the question ends with no graph.
    """
    graph = _graph(question)
    if graph is None:
        return None
    edges, start, goal = graph
    path = [node.strip() for node in completion.strip().partition("\n")[0].split(",")]
    return float(
        path[0] == start
        and path[-1] == goal
        and len(set(path)) == len(path)
        and all(frozenset(step) in edges for step in pairwise(path))
    )


def _graph(text: str) -> tuple[set[frozenset[str]], str, str] | None:
    """Edges, start and goal of the graph that a text ends with; None if it ends with none."""
    words = text.rstrip().removesuffix("=").split()
    if not words or not text.rstrip().endswith("="):
        return None
    listed, slash, ends = words[-1].rpartition("/")
    edges, between = [edge.split(",") for edge in listed.split("|")], ends.split(",")
    if not slash or len(between) != 2 or any(len(edge) != 2 for edge in edges):
        return None
    return {frozenset(edge) for edge in edges}, between[0], between[1]


def star_graph_task(shape: Shape, problems: int = 2000) -> Task:
    """The task of finding paths in graphs of one shape.

    Args:
        shape: of all graphs.
        problems: the number of problems of each split.
    """

    @cache
    def drawn(split: str) -> list[Problem]:
        graphs = [(name := f"{split}-{i}", draw(shape, name)) for i in range(problems)]
        return [Problem(id=name, prompt=graph.prompt, answer=graph.path) for name, graph in graphs]

    return Task(
        name="star_graph",
        splits=SPLITS,
        problems=drawn,
        # A node and its comma are two or three of GPT-2's tokens, and one of a tokenizer with a token a node.
        sampling=SamplingDefaults(max_tokens=3 * shape.length + 1),
        reward=_reward,
    )


def _reward(problem: Problem, text: str) -> float | None:
    return solves(problem.prompt if isinstance(problem.prompt, str) else "", text)


TASK = star_graph_task(Shape())
