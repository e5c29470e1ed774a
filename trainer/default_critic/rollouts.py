"""What the sampler writes and the trainer reads: scored completions, one JSON line each."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from trainer.tasks import sums


@dataclass(frozen=True)
class Rollout:
    """One completion drawn from the reference at T = 1, up to and including its stop token.

    The first `given` tokens are not its own choice, the rest are. So the reward is a label of the prefixes that hold
    all of them, and of no shorter one.
    """

    problem: sums.Problem
    prompt: list[int]
    completion: list[int]
    text: str
    reward: float
    given: int = 0


def read_rollouts(path: Path) -> list[Rollout]:
    """The rollouts of a JSON-lines file; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [_from_json(json.loads(line)) for line in lines]


def to_lines(rollouts: Iterable[Rollout]) -> str:
    """The rollouts as JSON lines."""
    return "".join(json.dumps(asdict(rollout)) + "\n" for rollout in rollouts)


def _from_json(fields: Mapping[str, object]) -> Rollout:
    a, b, c = cast(list[int], fields["problem"])
    return Rollout(**{**fields, "problem": (a, b, c)})  # type: ignore[arg-type]
