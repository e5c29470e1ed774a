"""The critics that take the right one's place: made of the model's own rollouts, by the commands that users type.

All have the same layers and settings. The shipped critic had far more rollouts; so that this is not taken for a
difference between tasks, one of them is trained for the sums again.
"""

import subprocess
import sys
from pathlib import Path

import torch

from qsharp_core.critic.checkpoint import load, save
from qsharp_core.precision import fast_bfloat16
from server.presets.known import PRESETS, SEPARATE
from trainer.serving import serve

RIGHT, AGAIN, SHORT, LARGER, RANDOM = "shipped", "sums-again", "short", "larger", "random-head"
ALL = (RIGHT, AGAIN, SHORT, LARGER, RANDOM)
KEY = "benchmark"  # of a server that listens on the loopback interface, while rollouts are made
TASKS = "benchmarks.bellman_residual.tasks"
# As recipes/sums.toml, in smaller steps, and not as long: it is minutes so.
TRAINING = [
    "--layers", "3", "--mlp", "512", "--borrow-embeddings", "--held-out", "0.06", "--epochs", "2", "--lr", "5e-4",
    "--warmup", "0.1", "--batch-tokens", "6500", "--weigh", "nodes", "--select", "last", "--dtype", "bf16",
    "--precision", "bf16" if fast_bfloat16() else "float32",
]  # fmt: skip


def critics(folder: Path, rollouts: int) -> dict[str, Path]:
    """The critics' folders by name; what is missing is made.

    Args:
        folder: where rollouts and critics are kept.
        rollouts: of each problem of the sums.
    """
    preset = PRESETS[SEPARATE]
    found = {RIGHT: preset.critic_folder, **{name: folder / "critics" / name / "1" for name in ALL[1:]}}
    data = {name: folder / f"{name}.parquet" for name in (AGAIN, SHORT, LARGER)}
    if not all(path.exists() for path in data.values()):
        _roll_out(folder, data, rollouts)
    for name, path in data.items():
        if not found[name].exists():
            to = ["--out", folder / "critics", "--name", name, "--resume"]
            _qsharp("train", "--data", path, "--base", preset.model(), *to, *TRAINING)
    if not found[RANDOM].exists():
        _randomise(found[RIGHT], found[RANDOM], preset.model())
    return found


def _roll_out(folder: Path, data: dict[str, Path], rollouts: int) -> None:
    """Samples the model, and writes the same answers to sums with two rewards, and those of the other task."""
    flags = ["--no-critic", "--admin-key", KEY, "--rollouts", f"sqlite:///{(folder / 'rollouts.db').absolute()}"]
    with serve(flags, folder / "rollouts.log", patience=900) as url:
        to, sums, larger = ["--url", url], ["--metadata", "qsharp_task=sums"], ["--metadata", "qsharp_task=larger"]
        for task, state in ("sums", "sums.jsonl"), (f"{TASKS}:LARGER", "larger.jsonl"):
            made = ["--n", rollouts, "--state", folder / state, "--concurrency", 32]
            _qsharp("collect", "--task", task, *made, *to)
        _qsharp("reward", "--verifier", "task", "--task", f"{TASKS}:LARGER", *to)
        _qsharp("export", "--out", data[AGAIN], *sums, *to)
        _qsharp("export", "--out", data[LARGER], *larger, *to)
        _qsharp("reward", "--verifier", f"{TASKS}:short", "--again", *sums, *to)
        _qsharp("export", "--out", data[SHORT], *sums, *to)


def _randomise(right: Path, folder: Path, reference: Path) -> None:
    """The right critic with the weights of its head shuffled: opinions of that size about nothing."""
    card, critic = load(right, dtype=torch.bfloat16, reference=reference)
    dice = torch.Generator().manual_seed(0)
    for weights in critic.head.parameters():
        shuffled = weights.flatten()[torch.randperm(weights.numel(), generator=dice)]
        weights.copy_(shuffled.view_as(weights))
    save(folder, card.model_copy(update={"name": RANDOM, "version": "1"}), critic)


def _qsharp(*arguments: object) -> None:
    subprocess.run([Path(sys.executable).parent / "qsharp", *map(str, arguments)], check=True)
