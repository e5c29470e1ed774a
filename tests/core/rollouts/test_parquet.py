"""Rollouts to Parquet and back; files that other tools wrote, and files that are none."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from qsharp_core.errors import RolloutError
from qsharp_core.rollouts import parquet
from qsharp_core.rollouts.records import LARGEST, LATEST, Reward, Rollout, Sampling
from tests.server.test_store import made, unguided

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
BOUNDED = st.floats(-LARGEST, LARGEST)
TIME = st.floats(0, LATEST)
NAME = st.text("abc-", min_size=1)
TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=20)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
OBJECT = st.dictionaries(TEXT, JSON, max_size=3)
SAMPLING = st.builds(
    Sampling,
    temperature=NUMBER,
    top_p=NUMBER,
    top_k=st.integers(0, 2**31 - 1),
    min_p=NUMBER,
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    other=OBJECT,
)


@st.composite
def rollouts(draw: st.DrawFn) -> Rollout:
    completion = draw(TOKENS)
    length = len(completion)
    guided = draw(st.booleans())
    cut = draw(st.none() | st.integers(1, length)) if length and not guided else None
    valid = None if guided or not length else draw(st.none() | st.integers(cut - 1 if cut else 0, length - 1))
    history = draw(st.lists(st.builds(Reward, BOUNDED, st.none() | TEXT, TIME, st.none() | NAME), max_size=3))
    return Rollout(
        id="rol_" + draw(st.text("0123456789abcdef", min_size=1)),
        owner=draw(NAME),
        request_id=draw(TEXT),
        choice=draw(st.integers(0, 2**31 - 1)),
        route=draw(st.sampled_from(["completion", "chat"])),
        created=draw(TIME),
        model=draw(TEXT),
        prompt_token_ids=draw(TOKENS),
        completion_token_ids=completion,
        prompt_text=draw(st.none() | TEXT),
        completion_text=draw(TEXT),
        messages=draw(st.none() | st.lists(OBJECT, max_size=3)),
        response=draw(st.none() | OBJECT),
        sampling=draw(SAMPLING),
        eta=draw(st.floats(1e-6, 1e6)) if guided else None,
        method=draw(st.none() | TEXT),
        critic=draw(st.none() | TEXT),
        guidance=draw(st.none() | OBJECT),
        first_valid_position=valid,
        parent_id=draw(TEXT) if cut else None,
        cut=cut,
        kl=draw(BOUNDED),
        value=draw(st.none() | BOUNDED),
        finish_reason=draw(st.none() | TEXT),
        metadata=draw(st.dictionaries(TEXT, TEXT, max_size=3)),
        reward=history[-1].reward if history else None,
        rewards=tuple(history),
    )


def written(*batches: list[Rollout]) -> io.BytesIO:
    return io.BytesIO(b"".join(parquet.write(batches)))


def back(source: Any) -> list[Rollout]:
    return [rollout for batch in parquet.read(source) for rollout in batch]


@settings(max_examples=60, deadline=None, phases=set(Phase) - {Phase.shrink})
@given(st.lists(st.lists(rollouts(), min_size=1, max_size=4), max_size=4))
def test_what_is_written_is_read(batches: list[list[Rollout]]) -> None:
    assert back(written(*batches)) == [rollout for batch in batches for rollout in batch]


@pytest.mark.parametrize("count", [0, 1, 4, 5, 13])
def test_files_are_read_in_batches_whatever_their_length(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "BATCH", 4)
    several = [made() for _ in range(count)]
    batches = [*parquet.read(written(several))]
    assert [rollout for batch in batches for rollout in batch] == several
    assert max(map(len, batches), default=0) <= 4


def test_bytes_come_batch_by_batch() -> None:
    batches = ([made(completion_text=str(i) * 1000) for _ in range(10)] for i in range(5))
    pieces = [len(piece) for piece in parquet.write(batches)]
    assert len(pieces) == 6
    assert min(pieces) > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_datasets_loads_it(tmp_path: Path) -> None:
    from datasets import Dataset

    several = [unguided(), made(rewards=(Reward(1.0, None, 2.0),), reward=1.0, metadata={"a": "b"})]
    (tmp_path / "r.parquet").write_bytes(written(several).getvalue())
    loaded = Dataset.from_parquet(str(tmp_path / "r.parquet"), cache_dir=str(tmp_path / "cache"))
    assert loaded["completion_token_ids"][:] == [list(r.completion_token_ids) for r in several]
    assert loaded[1]["rewards"] == [{"reward": 1.0, "source": None, "created": 2.0, "given_by": None}]
    assert loaded[1]["first_valid_position"] is None
    loaded.to_parquet(str(tmp_path / "again.parquet"))
    assert back(tmp_path / "again.parquet") == several


def test_wider_types_and_absent_columns_of_other_tools(tmp_path: Path) -> None:
    one = unguided(messages=None)
    table = pq.read_table(written([one])).drop_columns(["messages", "response", "parent_id", "cut", "seed"])
    wide = table.set_column(
        table.column_names.index("prompt_token_ids"),
        "prompt_token_ids",
        table["prompt_token_ids"].cast(pa.large_list(pa.int64())),
    )
    wide = wide.set_column(0, "id", wide["id"].cast(pa.large_string()))
    pq.write_table(wide, tmp_path / "r.parquet")
    (found,) = back(tmp_path / "r.parquet")
    assert found == replace(one, sampling=replace(one.sampling, seed=None))


def changed(name: str, values: list[Any] | None, kind: Any = None) -> io.BytesIO:
    table = pq.read_table(written([unguided()]))
    position = table.column_names.index(name)
    table = (
        table.remove_column(position) if values is None else table.set_column(position, name, pa.array(values, kind))
    )
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink


@pytest.mark.parametrize(
    ("source", "param"),
    [
        (io.BytesIO(b"nothing"), None),
        (io.BytesIO(b"PAR1" + b"x" * 100 + b"PAR1"), None),
        (changed("id", None), "id"),
        (changed("id", [None], pa.string()), "id"),
        (changed("completion_token_ids", ["x"]), "completion_token_ids"),
        (changed("completion_token_ids", [[2**40]]), "completion_token_ids"),
        (changed("completion_token_ids", [[1, None]]), "completion_token_ids"),
        (changed("completion_token_ids", [[-5]]), "completion_token_ids"),
        (changed("metadata", ["{"]), "metadata"),
        (changed("metadata", ['{"a": 1}']), "metadata"),
        (changed("messages", ["{}"]), "messages"),
        (changed("first_valid_position", [77]), "first_valid_position"),
        (changed("rewards", [[{"reward": None, "source": None, "created": 1.0}]]), "rewards"),
        (changed("rewards", [[{"reward": float("nan"), "source": None, "created": 1.0}]]), "rewards"),
        (changed("reward", [float("inf")]), "reward"),
        (changed("created", ["now"]), "created"),
    ],
)
def test_what_is_not_a_file_of_rollouts_is_refused(source: io.BytesIO, param: str | None) -> None:
    source.seek(0)
    with pytest.raises(RolloutError) as raised:
        back(source)
    assert raised.value.param == param


def test_a_file_that_was_cut_off_is_refused() -> None:
    whole = written([made() for _ in range(50)]).getvalue()
    with pytest.raises(RolloutError, match="not a Parquet file"):
        back(io.BytesIO(whole[: len(whole) * 3 // 4]))
