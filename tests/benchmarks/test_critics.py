"""What the benchmarks of critics compute around the commands that they run."""

import json
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.critics import common, kinds
from tests.support import models


def test_a_subset_is_drawn_at_random_and_again_the_same(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": list(range(100))}), tmp_path / "all.parquet")
    drawn = [
        pq.read_table(common.subset(tmp_path / "all.parquet", count, seed, tmp_path / f"{i}" / "some.parquet"))["id"]
        for i, (count, seed) in enumerate([(30, 0), (30, 0), (30, 1), (500, 0)])
    ]
    first, again, other, whole = (column.to_pylist() for column in drawn)
    assert len({*first}) == len(first) == 30
    assert first == again != other
    assert whole == list(range(100))


def test_parameters_are_those_that_are_stored(tmp_path: Path) -> None:
    reference = models.write_reference(tmp_path / "reference")
    critic = models.write_native_critic(tmp_path / "critic", reference, width=8)
    shapes = json.loads((critic / "critic.json").read_text())["made_for"]
    hidden = embed = shapes["hidden_size"]
    standardised = 2 * hidden + 2 * embed + 2 + 1  # means, scales, and the least log-probability
    assert kinds._parameters(critic) == 8 * (hidden + embed + 1) + standardised + 8 + 8 + 1


def test_what_was_measured_is_read_from_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result: dict[str, Any] = {"accuracy": 0.7, "gain": 0.3, "kl": 0.6, "n": 8}
    result |= {"accuracy_se": 0.02, "gain_se": 0.03, "kl_se": 0.1}
    results = [{"method": "reference", **result, "accuracy": 0.4}, {"method": "qsharp", **result}]
    folder = tmp_path / "evaluation" / "name"
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps({"results": results}))
    monkeypatch.delattr(httpx, "post")  # nothing is measured again
    found = common.measured("http://nowhere", tmp_path / "name" / "1", tmp_path, samples=2, seed=0)
    assert found == common.Measured(reference=0.4, **result)
