import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qsharp_core.returns import Bernoulli, Categorical
from qsharp_core.rollouts import parquet
from qsharp_core.rollouts.records import Rollout as Stored
from qsharp_core.rollouts.records import Sampling
from tests.support import trainer_data as world
from tests.support.trainer_data import A, B, row
from trainer.training import data
from trainer.training.rollouts import SamplingPolicy
from trainer.training.settings import TrainingError


def read(tmp_path: Path, rows: list[dict[str, Any]], **kwargs: Any) -> data.DataSet:
    return data.read([world.write(tmp_path / "data.parquet", rows)], **kwargs)


def test_only_rewarded_rollouts_with_a_valid_position_are_taken_and_the_rest_is_counted(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        [
            row("plain", [5], [A, B], 1.0),
            row("rolled-out", [5], [A, B, A], 0.0, first_valid_position=1),
            row("guided", [5], [A, B], 1.0, first_valid_position=None),
            row("too-late", [5], [A, B], 1.0, first_valid_position=2),
            row("empty", [5], [], 1.0),
            row("unrewarded", [5], [A, B], None),
            row("neither", [5], [A, B], None, first_valid_position=None),
        ],
    )
    assert [(r.id, r.first_valid, r.valid) for r in found.rollouts] == [("plain", 0, 2), ("rolled-out", 1, 2)]
    assert found.counts == {"read": 7, "no_valid_position": 3, "unrewarded": 2}


def test_rounds_are_aggregated_and_the_last_reward_of_an_id_counts(tmp_path: Path) -> None:
    first = world.write(tmp_path / "0.parquet", [row("x", [5], [A], 0.0), row("y", [5], [A], 1.0)])
    world.write(tmp_path / "1.parquet", [row("x", [5], [A], 1.0), row("y", [5], [A], None), row("z", [5], [A], 0.0)])
    found = data.read([tmp_path])
    assert {r.id: r.reward for r in found.rollouts} == {"x": 1.0, "y": 1.0, "z": 0.0}
    assert found.counts["duplicates"] == 2
    assert found.digest != data.read([first]).digest
    assert found.digest == data.read([tmp_path]).digest


@pytest.mark.parametrize("as_map", [False, True])
def test_the_split_is_by_prompt_or_by_metadata_and_stays(tmp_path: Path, as_map: bool) -> None:
    rows = world.rollouts(prompts=60, each=3)
    for i, r in enumerate(rows):
        metadata = {"problem": str(i % 7)}
        r["metadata"] = list(metadata.items()) if as_map else json.dumps(metadata)
    by_prompt = read(tmp_path, rows).rollouts
    train, held_out = data.split(by_prompt, 0.3)
    assert not {r.prompt.tobytes() for r in train} & {r.prompt.tobytes() for r in held_out}
    assert 0.15 < len(held_out) / len(by_prompt) < 0.45
    # A larger fraction, or more data, never moves a prompt out of the held-out ones.
    assert {r.id for r in held_out} <= {r.id for r in data.split(by_prompt, 0.5)[1]}
    assert {r.id for r in data.split(by_prompt.select(np.arange(90)), 0.3)[1]} <= {r.id for r in held_out}
    if not as_map:
        by_problem = read(tmp_path, rows, group_by="problem").rollouts
        train, held_out = data.split(by_problem, 0.5)
        problem = {r["id"]: json.loads(r["metadata"])["problem"] for r in rows}
        assert not {problem[r.id] for r in train} & {problem[r.id] for r in held_out}
        with pytest.raises(TrainingError, match="no 'topic' in its metadata"):
            read(tmp_path, rows, group_by="topic")


def test_metadata_may_be_a_parquet_map() -> None:
    assert data._metadata([("a", "b")]) == data._metadata({"a": "b"}) == data._metadata('{"a": "b"}') == {"a": "b"}
    assert data._metadata(None) == {}


def test_a_side_without_prompts_is_an_error(tmp_path: Path) -> None:
    rollouts = read(tmp_path, world.rollouts(prompts=1, each=3)).rollouts
    with pytest.raises(TrainingError, match="held out"):
        data.split(rollouts, 1e-9)
    assert [len(side) for side in data.split(rollouts, 0.0)] == [3, 0]


def test_different_sampling_policies_are_refused_unless_asked_for(tmp_path: Path) -> None:
    rows = [row("a", [5], [A], 1.0), row("b", [5], [A], 1.0, temperature=0.7), row("c", [5], [A], 0.0, top_k=-1)]
    found = read(tmp_path, rows)
    with pytest.raises(TrainingError, match=r"1 at .*0.7.*2 at"):
        data.check(found, Bernoulli(), 100, mixed_policies=False)
    assert [p.temperature for p in data.check(found, Bernoulli(), 100, mixed_policies=True)] == [0.7, 1.0]


def test_rewards_and_token_ids_out_of_range_are_refused(tmp_path: Path) -> None:
    found = read(tmp_path, [row("half", [5], [A], 0.5)])
    with pytest.raises(TrainingError, match=r"half has reward 0\.5: it must be 0 or 1"):
        data.check(found, Bernoulli(), 100, False)
    graded = read(tmp_path, [row(str(i), [5], [A], reward) for i, reward in enumerate((1.0, 0.5, 0.0, 0.25, 0.5))])
    with pytest.raises(TrainingError, match=r"give --distribution categorical --atoms 0 0\.25 0\.5 1$"):
        data.check(graded, Bernoulli(), 100, False)
    many = read(tmp_path, [row(str(i), [5], [A], i / 50) for i in range(51)])
    with pytest.raises(TrainingError, match=r"--atoms 0 0\.1 0\.2 0\.3 0\.4 0\.5 0\.6 0\.7 0\.8 0\.9 1$"):
        data.check(many, Bernoulli(), 100, False)
    data.check(found, Categorical((0.0, 1.0), (0.0, 1.0)), 100, False)
    with pytest.raises(TrainingError, match=r"in \[0\.6, 1\.0\]"):
        data.check(found, Categorical((0.7, 1.0), (0.6, 1.0)), 100, False)
    with pytest.raises(TrainingError, match="beyond the 68"):
        data.check(found, Categorical((0.0, 1.0), (0.0, 1.0)), A, False)
    with pytest.raises(TrainingError, match=r"no rollout can be trained on: {'read': 1, 'too_long': 1}"):
        data.check(data.refuse_longer(found, 1), Bernoulli(), 100, False)


def test_uniform_prompts_can_be_left_out(tmp_path: Path) -> None:
    rows = [row("a", [5], [A], 1.0), row("b", [5], [B], 1.0), row("c", [6], [A], 1.0), row("d", [6], [B], 0.0)]
    kept = data.without_uniform_prompts(read(tmp_path, rows).rollouts)
    assert [r.id for r in kept] == ["c", "d"]


def test_files_that_are_no_export_are_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.parquet"
    bad.write_text("nothing")
    with pytest.raises(TrainingError, match=r"bad\.parquet cannot be read"):
        data.read([bad])
    with pytest.raises(TrainingError, match=r"gone\.parquet cannot be read"):
        data.read([tmp_path / "gone.parquet"])
    rows = [{k: v for k, v in row("a", [5], [A], 1.0).items() if k != "reward"}]
    with pytest.raises(TrainingError, match="has no column reward"):
        read(tmp_path, rows)


def test_the_store_exports_what_the_trainer_reads(tmp_path: Path) -> None:
    made = Stored(
        id="rol_1",
        request_id="cmpl-1",
        choice=0,
        route="completion",
        created=1.0,
        model="m",
        prompt_token_ids=[5, 6],
        completion_token_ids=[A, B, A],
        prompt_text="p",
        completion_text="c",
        sampling=Sampling(temperature=0.7, top_p=0.9),
        first_valid_position=1,
        parent_id="rol_0",
        cut=2,
        metadata={"problem": "7"},
        reward=0.5,
    )
    path = tmp_path / "export.parquet"
    path.write_bytes(b"".join(parquet.write([[made]])))
    (found,) = data.read([path], group_by="problem").rollouts
    assert (found.prompt.tolist(), found.completion.tolist()) == ([5, 6], [A, B, A])
    assert (found.first_valid, found.reward) == (1, 0.5)
    assert found.policy == SamplingPolicy(0.7, 0.9, 0, 0.0)
