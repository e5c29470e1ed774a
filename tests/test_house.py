"""What keeps the code easy to find one's way in: small files, one class for a name, typed data."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("qsharp", "qsharp_core", "server", "trainer")
MOST_LINES = 400
MOST_UNTYPED = 59


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    """The text of every file of the three packages, by its path."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > 100
    return {str(path.relative_to(ROOT)): path.read_text() for path in files}


def test_public_classes_have_names_of_their_own(sources: dict[str, str]) -> None:
    places = defaultdict(list)
    for path, source in sources.items():
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(path)
    # The adapters of vLLM's two model runners: users type their paths.
    del places["QSharpLogitsProcessor"]
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


def test_files_are_short(sources: dict[str, str]) -> None:
    lengths = {path: len(source.splitlines()) for path, source in sources.items()}
    assert {path: length for path, length in lengths.items() if length > MOST_LINES} == {}


def test_data_has_types(sources: dict[str, str]) -> None:
    counts = {path: len(re.findall(r"dict\[str, Any\]", source)) for path, source in sources.items()}
    assert sum(counts.values()) <= MOST_UNTYPED, {path: count for path, count in counts.items() if count}


def test_the_tests_that_documents_name_are_there() -> None:
    # These two say that paths are below `tests/`.
    named = {
        (page, *match)
        for page in (ROOT / "docs" / "limits.md", ROOT / "SECURITY.md")
        for match in re.findall(r"`([\w/]+/test_\w+\.py)(?:::(\w+))?", page.read_text())
    }
    for page in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]:
        named |= {(page, *match) for match in re.findall(r"\btests/([\w/]+\.py)(?:::(\w+))?", page.read_text())}
    assert len(named) > 20
    for page, path, test in sorted(named):
        file = ROOT / "tests" / path
        assert file.is_file(), f"{page.name} names {path}"
        assert f"def {test}(" in file.read_text() if test else True, f"{page.name} names {path}::{test}"
