"""Star-Graph as a task: `G(5,5)` with 25 labels under the name `star_graph`, other sizes by `star_graph_task`.

Graphs are drawn by seed: those of one split have seeds that no other split has. Pre-training and a critic's rollouts
draw from seeds of their own (`trainer.star_graph`), so both splits here are new to a model that was made there.
"""

from functools import cache

from trainer.rewards.base import Case
from trainer.rewards.builtin import star_graph as verify
from trainer.star_graph.graphs import Shape, draw
from trainer.tasks.base import Problem, SamplingDefaults, Task

SPLITS = ("train", "held_out")


def star_graph_task(shape: Shape, problems: int = 2000) -> Task:
    """The task of one size.

    Args:
        problems: of each split.
    """

    @cache
    def drawn(split: str) -> list[Problem]:
        made = [(name := f"{split}-{i}", draw(shape, name)) for i in range(problems)]
        return [Problem(id=name, prompt=graph.prompt, answer=graph.path) for name, graph in made]

    return Task(
        name="star_graph",
        splits=SPLITS,
        problems=drawn,
        # A node and its comma are two or three of GPT-2's tokens, and one of a tokenizer with a token a node.
        sampling=SamplingDefaults(max_tokens=3 * shape.length + 1),
        reward=_reward,
    )


def _reward(problem: Problem, text: str) -> float | None:
    prompt = problem.prompt if isinstance(problem.prompt, str) else None
    return verify(Case(completion=text, problem=problem, prompt=prompt))


TASK = star_graph_task(Shape())
