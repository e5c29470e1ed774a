"""What a release has in it, and that it runs from there beside others' modules called `server` and `trainer`."""

import ast
import base64
import hashlib
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import BytesParser
from pathlib import Path, PurePosixPath

import pytest

from qsharp_core.cli import COMMANDS
from tests.package.conftest import ROOT, Built

PACKAGES = ("qsharp", "qsharp_core", "server", "trainer")
LINK = re.compile(r"\]\(([^)]+)\)")


@pytest.fixture(scope="module")
def files(built: Built) -> dict[str, bytes]:
    """The wheel's, by path."""
    with zipfile.ZipFile(built.wheel) as wheel:
        return {name: wheel.read(name) for name in wheel.namelist()}


@pytest.fixture(scope="module")
def metadata(files: dict[str, bytes]) -> Message:
    (text,) = [content for name, content in files.items() if name.endswith(".dist-info/METADATA")]
    return BytesParser().parsebytes(text)


def modules(files: dict[str, bytes]) -> set[str]:
    return {
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in files if name.endswith(".py")
    }


def test_a_wheel_has_no_name_that_others_have(files: dict[str, bytes]) -> None:
    tops = {name.partition("/")[0] for name in files}
    assert {top for top in tops if not top.startswith("qsharp")} == set()
    assert {"qsharp", "qsharp_core", "qsharp_serve"} < tops
    assert {"qsharp/py.typed", "qsharp_core/py.typed", "qsharp_serve/py.typed"} < files.keys()


def test_a_wheel_has_every_module_and_what_they_read(files: dict[str, bytes]) -> None:
    sources = [path for top in PACKAGES for path in (ROOT / top).rglob("*")]
    wanted = {
        str(path.relative_to(ROOT)) for path in sources if path.suffix in {".py", ".toml", ".json", ".safetensors"}
    } | {str(path.relative_to(ROOT)) for path in (ROOT / "server" / "playground").rglob("*") if path.is_file()}
    moved = {re.sub("^(?=server/|trainer/)", "qsharp_serve/", path) for path in wanted}
    assert len(moved) > 250
    assert moved - files.keys() == set()


def test_every_module_imports_what_is_there(files: dict[str, bytes]) -> None:
    known, imported = modules(files), set()
    for name, content in files.items():
        if name.endswith(".py"):
            for node in ast.walk(ast.parse(content)):
                match node:
                    case ast.ImportFrom(module=str(module), level=0):
                        imported.add((module, name))
                    case ast.Import(names=names):
                        imported |= {(alias.name, name) for alias in names}
    ours = {(module, name) for module, name in imported if re.match(r"(qsharp\w*|server|trainer)(\.|$)", module)}
    assert {module for module, _ in ours} >= {"qsharp_serve.server.errors", "qsharp_serve.trainer.tasks.base"}
    assert {(module, name) for module, name in ours if module not in known} == set()


def test_lines_stay_where_they_are(files: dict[str, bytes]) -> None:
    for path in (
        ROOT / "server" / "plugin.py",
        ROOT / "qsharp_core" / "cli.py",
        ROOT / "trainer" / "tasks" / "sums.py",
    ):
        name = str(path.relative_to(ROOT))
        theirs = files.get(name) or files[f"qsharp_serve/{name}"]
        ours = path.read_text().splitlines()
        assert [line.replace("qsharp_serve.", "") for line in theirs.decode().splitlines()] == ours


def test_the_record_is_of_these_files(files: dict[str, bytes]) -> None:
    (record,) = [content.decode() for name, content in files.items() if name.endswith(".dist-info/RECORD")]
    entries = {path: digest for path, digest, _ in (line.rsplit(",", 2) for line in record.splitlines())}
    assert entries.keys() == files.keys()
    for name, content in files.items():
        if not name.endswith("RECORD"):
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
            assert entries[name] == f"sha256={digest}", name


def test_metadata(metadata: Message, files: dict[str, bytes]) -> None:
    assert metadata["Name"] == "qsharp-serve"
    assert {"cpu", "cuda"} <= set(metadata.get_all("Provides-Extra", []))
    assert metadata.get_all("License-File") == ["LICENSE", "NOTICE"]
    assert any(name.endswith(".dist-info/licenses/NOTICE") for name in files)
    assert "docs/images" in (ROOT / "README.md").read_text()
    description = str(metadata.get_payload())
    assert "[arXiv 2502.20548](https://arxiv.org/abs/2502.20548)" in description
    assert {link for link in LINK.findall(description) if not link.startswith(("https:", "#"))} == set()


def test_a_source_distribution_has_all_that_git_has(built: Built) -> None:
    with tarfile.open(built.sdist) as sdist:
        names = {str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in sdist.getnames()}
        info = sdist.extractfile(f"{sdist.getnames()[0].partition('/')[0]}/PKG-INFO")
        assert info is not None
        assert "](docs/" not in info.read().decode()
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    left_out = {name for name in tracked if name not in names and (ROOT / name).exists()}
    assert {name for name in left_out if not name.startswith(".")} == set()
    assert {"constraints.txt", "docs/serving.md", "NOTICE", "package/relocated_wheel.py"} <= names


def test_it_runs_beside_others_of_these_names(built: Built, tmp_path: Path) -> None:
    site, folder = tmp_path / "site", tmp_path / "folder"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*pip, str(built.wheel)], check=True)
    folder.mkdir()
    for name in ("server", "trainer"):
        (folder / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")
    script = f"""
import sys
sys.path.insert(0, {str(folder)!r})
from importlib import import_module
from importlib.metadata import entry_points
from qsharp_core.cli import COMMANDS, main
for module, _ in COMMANDS.values():
    assert module.startswith("qsharp_"), module
    import_module(module)
(point,) = entry_points(group="vllm.endpoint_plugins", name="qsharp")
from qsharp_serve.server.plugin import QSharpEndpoints
assert point.load() is QSharpEndpoints
from qsharp_serve.server.store.database import connect
connect("sqlite:///rollouts.db").dispose()
from qsharp_serve.trainer.tasks.registry import find_task
assert find_task("sums").name == "sums"
import qsharp
for name in qsharp.__all__:
    getattr(qsharp, name)
assert not {{"server", "trainer"}} & sys.modules.keys()
assert {str(site)!r} in import_module("qsharp_core").__file__
main(["--version"])
"""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].startswith("qsharp-serve ")
    assert len(COMMANDS) > 8
