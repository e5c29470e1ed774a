"""Files that are there whole or not at all."""

from pathlib import Path

import pytest

from qsharp_core.disk import whole_file


def test_a_file_is_replaced_as_a_whole_or_stays(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    with whole_file(path) as temporary:
        temporary.write_text("old")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), whole_file(path) as temporary:
        temporary.write_text(f"ne{1 / 0}")
    assert path.read_text() == "old"
    with whole_file(path) as temporary:
        temporary.touch(0o600)
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]
