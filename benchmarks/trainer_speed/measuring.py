"""Both kinds of critics, measured on some rollouts: turns of all sides, and each side's memory."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import mkdtemp
from time import perf_counter
from typing import Any, Literal

import torch
from tqdm import tqdm

from benchmarks.trainer_speed import data
from benchmarks.trainer_speed.memory import Peak, alone
from benchmarks.trainer_speed.native import NativeTraining
from benchmarks.trainer_speed.separate import SeparateTraining
from benchmarks.trainer_speed.turns import by_turns
from qsharp_core.critic.checkpoint import input_embeddings
from trainer.training.base import local_folder
from trainer.training.prefix_tree import merge
from trainer.training.rollouts import Rollouts
from trainer.training.settings import TrainSettings

SIDES = ("qsharp", "trainer", "plain")
Kind = Literal["separate", "native"]
WARM_UP = 1
"""Steps of a turn that are not counted."""


@dataclass(frozen=True)
class Case:
    """What is trained on what.

    Attributes:
        kind: of the critic.
        rollouts: `trees`, `apart`, or `files`.
        settings: of the training, except its seed.
        count: rollouts of a turn.
        files: Parquet files, of `files`.
        prompt, completion: tokens on average, of the other two.
        whole, branches: rollouts of a prompt, of `trees`.
        threads: of all sides.
    """

    kind: Kind
    rollouts: Literal["trees", "apart", "files"]
    settings: TrainSettings
    count: int
    files: tuple[Path, ...] = ()
    prompt: int = data.PROMPT
    completion: int = data.COMPLETION
    whole: int = data.WHOLE
    branches: int = data.BRANCHES
    threads: int = 1

    def of_turn(self, turn: int) -> "Case":
        """The case with the seed of a turn."""
        return replace(self, settings=self.settings.model_copy(update={"seed": turn}))

    def draw(self) -> Rollouts:
        """The rollouts of a turn."""
        seed = self.settings.seed
        if self.rollouts == "files":
            return data.of_files(list(self.files), self.count, seed)
        assert self.settings.base is not None
        vocab = len(input_embeddings(local_folder(self.settings.base)))
        shapes = data.Shapes(vocab, seed, self.prompt, self.completion)
        if self.rollouts == "apart":
            return shapes.apart(self.count)
        return shapes.trees(self.count, self.whole, self.branches)


def measure(case: Case, turns: int) -> dict[str, Any]:
    """All figures of a case, as JSON's data."""
    memory = {side: alone(peak, case.of_turn(0), side) for side in SIDES}
    torch.set_num_threads(case.threads)
    one_turn = separate_turn if case.kind == "separate" else native_turn
    found = [
        one_turn(case.of_turn(turn)) for turn in tqdm(range(turns), desc=f"{case.kind}, {case.rollouts}", unit="turn")
    ]
    described = asdict(case) | {
        "settings": case.settings.model_dump(mode="json"), "files": [str(path) for path in case.files],
    }  # fmt: skip
    return {"case": described, "turns": found, "memory_mib": memory}


def separate_turn(case: Case) -> dict[str, Any]:
    """Seconds of each step, by side, and how many tokens it has."""
    rollouts = case.draw()
    with folder() as place:
        training = SeparateTraining(case.settings, rollouts, place)
        steps = training.steps
        turns = {side: training.side(side) for side in SIDES}
        seconds = by_turns(turns, len(steps))
    tokens = [int(rollouts.lengths[step].sum()) for step in steps]
    padded = [len(step) * int(rollouts.lengths[step].max()) for step in steps]
    return {
        **shape(rollouts), "trees": training.passes.trees,
        "tokens": tokens[WARM_UP:], "padded_tokens": padded[WARM_UP:],
        "seconds": {side: each[WARM_UP:] for side, each in seconds.items()},
        "losses": {side: turn.losses for side, turn in turns.items()},
    }  # fmt: skip


def native_turn(case: Case) -> dict[str, Any]:
    """Seconds of the reference's pass and of each step of the head, by side; the others share their pass."""
    rollouts = case.draw()
    with folder() as place:
        training = NativeTraining(case.settings, rollouts, place)
        training.reference.model(torch.tensor([[0]]))  # warm
        reads: dict[str, Callable[[], Any]] = {"qsharp": training.read, "others": training.read_rows}
        passes: dict[str, float] = {}
        found: dict[str, Any] = {}
        for name in [*reads] if case.settings.seed % 2 else [*reads][::-1]:
            began = perf_counter()
            found[name] = reads[name]()
            passes[name] = perf_counter() - began
        states = found["others"]
        turns = {"qsharp": training.ours(*found["qsharp"])}
        turns |= {side: training.peer(side, states) for side in SIDES[1:]}
        seconds = by_turns(turns, training.plan.steps)
    return {
        **shape(rollouts), "labels": len(states), "distinct_labels": training.nodes, "batch": training.plan.batch,
        "pass_seconds": passes,
        "seconds": {side: each[WARM_UP:] for side, each in seconds.items()},
    }  # fmt: skip


def peak(case: Case, side: str) -> dict[str, float]:
    """MiB that a process has when a side begins, and the most that it has until the side is done."""
    torch.set_num_threads(case.threads)
    rollouts = case.draw()
    with folder() as place:
        if case.kind == "separate":
            separate = SeparateTraining(case.settings, rollouts, place)
            steps = len(separate.steps)
            measured = Peak()
            turn = separate.side(side)
        else:
            native = NativeTraining(case.settings, rollouts, place)
            native.reference.model(torch.tensor([[0]]))
            steps = native.plan.steps
            measured = Peak()
            turn = native.ours(*native.read()) if side == "qsharp" else native.peer(side, native.read_rows())
        by_turns({side: turn}, steps)
    return {"before": measured.before, "most": measured.most}


def shape(rollouts: Rollouts) -> dict[str, int]:
    """How many rollouts, tokens and different prefixes there are."""
    prefixes = len(merge([r.token_ids for r in rollouts]))
    return {"rollouts": len(rollouts), "all_tokens": int(rollouts.lengths.sum()), "distinct_prefixes": prefixes}


@contextmanager
def folder() -> Iterator[Path]:
    """A temporary one, on the disk that runs are on."""
    place = Path(mkdtemp(prefix=".trainer-speed-", dir="."))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
