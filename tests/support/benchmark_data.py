"""Where the files of public benchmarks are, if they are there."""

import os
from pathlib import Path

import pytest

BESIDE = Path(__file__).parents[3] / "shared" / "data"


def found(file: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that has the file, which `QSHARP_DATA` then names; without the file the test is skipped."""
    folder = Path(os.environ.get("QSHARP_DATA", BESIDE))
    if not (folder / file).is_file():
        pytest.skip(f"no data in {folder}: set QSHARP_DATA")
    monkeypatch.setenv("QSHARP_DATA", str(folder))
    return folder
