"""Rollouts are kept on disk: what is learned from is the same as in memory, and memory does not grow with tokens."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from qsharp_core.returns import Bernoulli
from tests.support import trainer_data as world
from tests.support.trainer_data import row
from trainer.training import data
from trainer.training.families import parts
from trainer.training.prefix_tree import shared_prefix
from trainer.training.prepare import DataRequirements, prepare
from trainer.training.rollouts import LabelledRollout, SamplingPolicy, kept
from trainer.training.separate.batching import plan_epoch
from trainer.training.settings import TrainSettings
from trainer.training.siblings import ONLY_WAY, weighed
from trainer.training.spill import Spill

ROOT = Path(__file__).parents[2]


def tokens(dice: np.random.Generator, longest: int, letters: int = 3) -> NDArray[np.int32]:
    return dice.integers(5, 5 + letters, dice.integers(0, longest)).astype(np.int32)


def rollouts(seed: int, n: int = 120) -> list[LabelledRollout]:
    """Few letters and short prompts: many begin alike, and many prompts extend one another."""
    dice = np.random.default_rng(seed)
    made = []
    for i in range(n):
        prompt, completion = np.append(tokens(dice, 5), 5).astype(np.int32), np.append(tokens(dice, 6), 6)
        first = int(dice.integers(0, len(completion)))
        group, completion = f"{prompt.sum():x}", completion.astype(np.int32)
        made.append(LabelledRollout(f"{i:03}", prompt, completion, first, float(i % 2), SamplingPolicy(), group))
    return made


def test_what_is_kept_is_what_was_given() -> None:
    given = rollouts(random.randrange(2**31))
    found = kept(given)
    assert len(found) == len(given)
    for one, other in zip(found, given, strict=True):
        assert (one.id, one.first_valid, one.reward, one.policy, one.group) == (
            other.id, other.first_valid, other.reward, other.policy, other.group,
        )  # fmt: skip
        assert one.weights is None
        assert one.prompt.tolist() == other.prompt.tolist()
        assert one.completion.tolist() == other.completion.tolist()
    assert found.lengths.tolist() == [r.length for r in given]
    assert found.valid.tolist() == [r.valid for r in given]
    assert found.greatest.tolist() == [int(r.token_ids.max()) for r in given]
    same_prompt = found.prompts[:, None] == found.prompts[None]
    assert same_prompt.tolist() == [[a.prompt.tolist() == b.prompt.tolist() for b in given] for a in given]
    chosen = np.random.default_rng().permutation(len(given))[:7]
    assert [r.id for r in found.select(chosen)] == [given[i].id for i in chosen]


def test_files_are_read_as_one_dictionary_of_rows_would_be(tmp_path: Path) -> None:
    """Against the definition: of each id the last row with a reward, in the order of ids."""
    dice = random.Random()
    rows = []
    for i in range(400):
        letters = [dice.randint(60, 70) for _ in range(dice.randint(0, 5))]
        reward = dice.choice([None, 0.0, 1.0])
        first = dice.choice([None, 0, 0, 1, 2, 9])
        metadata = json.dumps({"problem": dice.randint(0, 5)})
        name = f"{dice.choice('abZé')}{dice.randint(0, 60)}"
        made = row(name, [70] * dice.randint(0, 3), letters, reward, first_valid_position=first, metadata=metadata)
        rows.append(made | {"temperature": dice.choice([1.0, 0.5]), "created": float(i)})
    cut = sorted(dice.sample(range(1, 400), 2))
    for number, part in enumerate((rows[: cut[0]], rows[cut[0] : cut[1]], rows[cut[1] :])):
        world.write(tmp_path / f"{number}.parquet", part)
    by_id: dict[str, Any] = {}
    for one in rows:
        if one["reward"] is not None or one["id"] not in by_id:
            by_id[one["id"]] = one
    labelled = {
        key: one
        for key, one in sorted(by_id.items())
        if one["reward"] is not None
        and one["first_valid_position"] is not None
        and one["first_valid_position"] < len(one["completion_token_ids"])
    }
    unrewarded = sum(one["reward"] is None for one in by_id.values())
    found = data.read([tmp_path], group_by="problem")
    assert [
        (r.id, r.prompt.tolist(), r.completion.tolist(), r.reward, r.policy.temperature) for r in found.rollouts
    ] == [
        (key, one["prompt_token_ids"], one["completion_token_ids"], one["reward"], one["temperature"])
        for key, one in labelled.items()
    ]
    assert found.counts == {
        "read": 400,
        "duplicates": 400 - len(by_id),
        "unrewarded": unrewarded,
        "no_valid_position": len(by_id) - unrewarded - len(labelled),
    }
    groups = {key: json.loads(one["metadata"])["problem"] for key, one in labelled.items()}
    assert len({(r.group, groups[r.id]) for r in found.rollouts}) == len(set(groups.values()))


@pytest.mark.parametrize("together", [1, 30, 200])
def test_parts_share_no_labelled_prefix_and_are_in_the_order_of_the_one_tree(together: int) -> None:
    found = kept(rollouts(random.randrange(2**31)))
    cut = list(parts(found, together))
    assert sorted(np.concatenate(cut).tolist()) == list(range(len(found)))
    assert len(cut) > 1
    held = found.held(range(len(found)))
    place = {i: number for number, part in enumerate(cut) for i in part.tolist()}
    for i, a in held.items():
        for j, b in held.items():
            common = shared_prefix(a.token_ids, b.token_ids)
            if common >= max(len(a.prompt), len(b.prompt)):  # they share the prefix before a labelled token at least
                assert place[i] == place[j]
    order = sorted(held, key=lambda i: held[i].token_ids.tolist())
    assert [place[i] for i in order] == sorted(place[i] for i in order)


def by_definition(given: list[LabelledRollout]) -> list[list[float]]:
    """Weights by node, by looking at all prefixes of all rollouts."""

    def prefix(r: LabelledRollout, position: int) -> tuple[int, ...]:
        return tuple(r.token_ids[: len(r.prompt) + position + 1].tolist())

    labelled: dict[tuple[int, ...], int] = {}
    for r in given:
        for position in range(r.first_valid, len(r.completion)):
            labelled[prefix(r, position)] = labelled.get(prefix(r, position), 0) + 1
    ways: dict[tuple[int, ...], int] = {}
    for one in labelled:
        ways[one[:-1]] = ways.get(one[:-1], 0) + 1
    found = [
        [
            (1.0 if ways[node[:-1]] > 1 else ONLY_WAY) / labelled[node]
            for node in (prefix(r, position) for position in range(r.first_valid, len(r.completion)))
        ]
        for r in given
    ]
    scale = len(given) / sum(map(sum, found))
    return [[weight * scale for weight in weights] for weights in found]


@pytest.mark.parametrize("together", [1, 50, 2**20])
def test_weights_do_not_depend_on_how_many_rollouts_are_in_memory(together: int) -> None:
    given = rollouts(random.randrange(2**31))
    for got, wanted in zip(weighed(kept(given), together=together), by_definition(given), strict=True):
        assert got.weights is not None
        np.testing.assert_allclose(got.weights, wanted, rtol=1e-12)
    whole, cut = (weighed(kept(given), together=tokens) for tokens in (2**20, together))
    for one, other in zip(whole, cut, strict=True):
        assert one.weights is not None
        assert other.weights is not None
        assert one.weights.tobytes() == other.weights.tobytes()


def test_numbers_on_disk() -> None:
    dice = np.random.default_rng()
    spill, given, places = Spill(np.int32), [], []
    for _ in range(50):
        given.append(dice.integers(-9, 9, dice.integers(0, 4000)).astype(np.int32))
        places.append(spill.add(given[-1]))
        i = int(dice.integers(0, len(given)))  # what was added just now, too
        assert spill.read(places[i], len(given[i])).tolist() == given[i].tolist()
    assert spill.size == sum(map(len, given))


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    code = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from trainer.training.settings import TrainingError
from trainer.training.spill import Spill
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
spill = Spill(np.int32, Path(sys.argv[1]))
try:
    spill.add(np.zeros(100_000, np.int32))
    spill.read(0, 100_000)
except TrainingError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert f"rollouts cannot be kept in {tmp_path}: " in done.stdout
    assert list(tmp_path.iterdir()) == []


LENGTH = 1000
"""Tokens of a completion in the test of memory."""


def write(path: Path, n: int, seed: int) -> Path:
    """A folder of files of `n` rollouts in all, eight of a prompt."""
    path.mkdir()
    dice = np.random.default_rng(seed)
    for first in range(0, n, 2000):
        numbers = np.arange(first, min(first + 2000, n))
        prompts = [np.frombuffer(np.int64(number // 8).tobytes(), np.uint8).astype(np.int32) for number in numbers]
        letters = dice.integers(300, 305, (len(numbers), LENGTH)).astype(np.int32)
        columns = {
            "id": pa.array([f"rol_{number:032}" for number in numbers]),
            "prompt_token_ids": pa.array(prompts, pa.list_(pa.int32())),
            "completion_token_ids": pa.array(list(letters), pa.list_(pa.int32())),
            "first_valid_position": pa.array(np.zeros(len(numbers), np.int32)),
            "reward": pa.array((letters[:, 0] % 2).astype(np.float64)),
        }
        pq.write_table(pa.table(columns), path / f"{first:08}.parquet", row_group_size=1000)
    return path


def an_epoch(folder: Path, out: Path) -> None:
    """What a training of a separate critic has in memory, less the critic: the index, and the rollouts of a step."""
    settings = TrainSettings(base="x", weigh="nodes", held_out=0.05)
    prepared = prepare([folder], settings, DataRequirements(Bernoulli(), None, 400, None), out)
    assert prepared.everything.digest
    for step in plan_epoch(prepared.train, 16384, True, seed=0, epoch=0):
        held = prepared.train.held(step)
        assert sum(r.length for r in held.values()) <= 16384
    # Not ru_maxrss, which begins with what the parent had.
    (most,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(len(prepared.everything.rollouts), int(most) * 1024)


def test_memory_grows_by_an_index_alone(tmp_path: Path) -> None:
    """A process of its own for each size: the kernel tells the most that it ever had."""
    peaks = {}
    for n in (8_000, 40_000):
        folder = write(tmp_path / str(n), n, seed=n)
        code = f"""
from pathlib import Path
from tests.trainer.test_streaming import an_epoch
an_epoch(Path({str(folder)!r}), Path({str(tmp_path)!r}))
"""
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        read, peak = map(int, done.stdout.split())
        assert read == n
        peaks[n] = peak
    each = (peaks[40_000] - peaks[8_000]) / 32_000
    print(f"{peaks}: {each:.0f} bytes of a rollout")
    assert each < LENGTH * 4 / 4  # its tokens alone are four times that
