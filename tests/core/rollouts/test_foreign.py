"""Files of others: damaged ones, ones that become far more than they are, and ones with a row that no rollout has."""

import asyncio
import io
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qsharp_core.errors import RolloutError
from qsharp_core.rollouts import foreign, parquet
from qsharp_core.rollouts.records import LARGEST, Reward, Rollout, Sampling
from tests.server.test_store import made, unguided

FLIPS = 200


def several(count: int = 40) -> list[Rollout]:
    return [
        made(owner="me", metadata={"i": str(i)}, rewards=(Reward(1.0, "s", 2.0, "me"),), reward=1.0)
        if i % 2
        else unguided(messages=[{"role": "user", "content": "x" * i}])
        for i in range(count)
    ]


def file_of(*rollouts: Rollout, **options: Any) -> bytes:
    """As pyarrow writes it, with no checksums."""
    table = pq.read_table(io.BytesIO(b"".join(parquet.write([list(rollouts)]))))
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def take(content: bytes, folder: Path, owner: str = "importer") -> list[Rollout]:
    source, target = folder / "given.parquet", folder / "checked.parquet"
    source.write_bytes(content)
    count = asyncio.run(foreign.take(source, target, owner))
    found = [one for batch in parquet.read(target) for one in batch]
    assert count == len(found)
    return found


def test_what_is_taken_is_what_was_given(tmp_path: Path) -> None:
    whole = several()
    assert take(b"".join(parquet.write([whole[:7], whole[7:]])), tmp_path) == whole
    assert take(file_of(*whole, compression="snappy"), tmp_path) == whole
    assert take(file_of(*whole, compression="none", use_dictionary=False), tmp_path) == whole
    assert take(b"".join(parquet.write([])), tmp_path) == []


FLIPPING = """
import os, resource, sys
from pathlib import Path
from qsharp_core.rollouts import foreign

folder = Path(sys.argv[1])
assert foreign.main(folder / "given.parquet", folder / "checked.parquet", "me") == 0  # imports what it needs
sys.stdout.flush()
resource.setrlimit(resource.RLIMIT_AS, (foreign.MEMORY, foreign.MEMORY))
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
for at, bit in (map(int, flip.split(":")) for flip in sys.argv[2:]):
    if (child := os.fork()) == 0:
        data = bytearray((folder / "given.parquet").read_bytes())
        data[at] ^= bit
        (folder / "flipped.parquet").write_bytes(data)
        os.dup2(2, 1)
        try:
            os._exit(foreign.main(folder / "flipped.parquet", folder / "checked.parquet", "me"))
        except BaseException:
            os._exit(99)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.parametrize("form", ["ours", "snappy", "none"])
def test_a_flipped_bit_is_refused_or_does_no_harm(form: str, tmp_path: Path) -> None:
    whole = b"".join(parquet.write([several()])) if form == "ours" else file_of(*several(), compression=form)
    (tmp_path / "given.parquet").write_bytes(whole)
    dice = random.Random(form)
    flips = [(dice.randrange(len(whole)), 1 << dice.randrange(8)) for _ in range(FLIPS)]
    command = [sys.executable, "-c", FLIPPING, str(tmp_path), *(f"{at}:{bit}" for at, bit in flips)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    ended = [int(line) for line in done.stdout.splitlines()[1:]]
    assert len(ended) == FLIPS
    counts = Counter(ended)
    assert counts.keys() <= {0, 1, -signal.SIGABRT, -signal.SIGSEGV}, counts
    assert counts[1] > FLIPS / 4
    if form == "ours":  # its pages have checksums; what is not read is the rest
        assert counts[1] > FLIPS / 3
    # Those that ended the process are refused like the others.
    for (at, bit), _ in [pair for pair in zip(flips, ended, strict=True) if pair[1] < 0][:3]:
        damaged = bytearray(whole)
        damaged[at] ^= bit
        with pytest.raises(RolloutError, match="damaged"):
            take(bytes(damaged), tmp_path)


@pytest.mark.parametrize("end", ["os.abort()", "os.kill(os.getpid(), 9)", "sys.exit(3)"])
def test_a_process_that_ends_is_a_file_that_is_refused(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some damaged files make pyarrow do."""
    (tmp_path / "first").mkdir()
    code = f"import os, sys\nif 'given.parquet' in ' '.join(sys.orig_argv):\n    {end}\n"
    (tmp_path / "first" / "sitecustomize.py").write_text(code)
    paths = [str(tmp_path / "first"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    with pytest.raises(RolloutError, match="not a Parquet file, or a damaged one"):
        take(file_of(*several(2)), tmp_path)


def test_a_file_that_takes_too_long_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "SECONDS", 0.05)
    with pytest.raises(RolloutError, match=r"longer than 0\.05 seconds"):
        take(file_of(*several(2)), tmp_path)


# -- files that become far more than they are


def repeated(name: str, value: Any, count: int = 1000) -> bytes:
    """A file of `count` rollouts that all have this value: Parquet and zstd keep it once."""
    table = pq.read_table(io.BytesIO(file_of(*(replace(unguided(), id=f"rol_{i}") for i in range(count)))))
    position, field = table.column_names.index(name), table.schema.field(name)
    one = pa.array([value], field.type)
    column = (
        pa.concat_arrays([one] * count) if pa.types.is_nested(field.type) else pa.array([value] * count, field.type)
    )
    sink = io.BytesIO()
    pq.write_table(table.set_column(position, field, column), sink, compression="zstd")
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("completion_text", "x" * 400_000),
        ("messages", f'["{"x" * 400_000}"]'),
        ("prompt_token_ids", [7] * 100_000),
        ("rewards", [{"reward": 1.0, "source": "x" * 400_000, "created": 1.0, "given_by": None}]),
        ("rewards", [{"reward": 1.0, "source": None, "created": 1.0, "given_by": None}] * 5000),
    ],
)
def test_a_small_file_does_not_become_a_large_one(name: str, value: Any, tmp_path: Path) -> None:
    content = repeated(name, value)
    assert len(content) < 200_000
    began = time.monotonic()
    with pytest.raises(RolloutError, match=r"becomes more than 64 MiB|damaged"):
        take(content, tmp_path)
    assert time.monotonic() - began < 60
    assert not (tmp_path / "checked.parquet").exists() or (tmp_path / "checked.parquet").stat().st_size < 10_000_000


def test_what_repeats_itself_within_reason_is_taken(tmp_path: Path) -> None:
    content = repeated("prompt_text", "x" * 10_000)
    assert len(take(content, tmp_path)) == 1000


@pytest.mark.parametrize(("rows", "right"), [(9, True), (10, False)])
def test_a_file_has_no_more_rows_than_are_read_at_once(rows: int, right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MOST_ROWS", 9)
    content = io.BytesIO(file_of(*several(rows)))
    if right:
        assert len([one for batch in parquet.read(content) for one in batch]) == rows
        return
    with pytest.raises(RolloutError, match="10 rows: at most 9"):
        list(parquet.read(content))


# -- rows that no rollout has


def deep(levels: int) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [1]}, "messages"),
        ({"messages": ["a"]}, "messages"),
        ({"messages": [{"role": "user", "content": deep(200)}]}, "messages"),
        ({"response": {"choice": "x"}}, "response"),
        ({"response": {"request": [1]}}, "response"),
        ({"response": {"created": "yesterday"}}, "response"),
        ({"guidance": {"a": deep(200)}}, "guidance"),
        ({"sampling": Sampling(temperature=float("inf"))}, "sampling"),
        ({"sampling": Sampling(other={"a": deep(200)})}, "sampling"),
        ({"choice": -1}, "choice"),
        ({"created": 1e300}, "created"),
        ({"created": -1.0}, "created"),
        ({"kl": 1e308}, "kl"),
        ({"value": 1e308}, "value"),
        ({"eta": 1e308}, "eta"),
        ({"eta": 0.0}, "eta"),
        ({"reward": 1.1 * LARGEST}, "reward"),
        ({"rewards": (Reward(1e308, None, 1.0),)}, "rewards"),
        ({"rewards": (Reward(1.0, None, 1e300),)}, "rewards"),
        ({"owner": ""}, "owner"),
        ({"owner": "a\0"}, "owner"),
        ({"id": "a\0"}, "id"),
    ],
)
def test_a_row_that_no_rollout_has_names_its_column(fields: dict[str, Any], param: str) -> None:
    content = io.BytesIO(file_of(unguided(), made(**fields), unguided()))
    with pytest.raises(RolloutError) as raised:
        list(parquet.read(content))
    assert raised.value.param == param


@pytest.mark.parametrize(
    "text", ["[" * 20_000 + "]" * 20_000, "{", "NaN", '[{"a": 1e999}]', '[{"a": NaN}]', "9" * 5000]
)
def test_json_that_is_none_or_too_deep(text: str) -> None:
    table = pq.read_table(io.BytesIO(file_of(unguided())))
    sink = io.BytesIO()
    pq.write_table(table.set_column(table.column_names.index("messages"), "messages", [[text]]), sink)
    with pytest.raises(RolloutError) as raised:
        list(parquet.read(sink))
    assert raised.value.param == "messages"


def test_text_that_is_no_utf8(tmp_path: Path) -> None:
    table = pq.read_table(io.BytesIO(file_of(unguided())))
    odd = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"]).buffers())
    sink = io.BytesIO()
    pq.write_table(table.set_column(table.column_names.index("model"), table.schema.field("model"), odd), sink)
    with pytest.raises(RolloutError):
        list(parquet.read(sink))
