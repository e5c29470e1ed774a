"""`docs/your-own-task.md` and its notebook, run block by block on the default model, with smaller numbers."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.serving import serve
from trainer.tasks.files import file_task

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "own_task"
PAGE = (ROOT / "docs" / "your-own-task.md").read_text()
SMALLER = {
    "--n 16 8": "--n 3 1", "--n 16": "--n 3", "--branch 24": "--branch 3", "--samples 8": "--samples 1",
    "--eval-samples 8": "--eval-samples 1", "--rounds 2": "--rounds 1", "samples=2": "samples=1",
    "SAMPLES, BRANCHES, MEASURED = 16, 24, 8": "SAMPLES, BRANCHES, MEASURED = 2, 1, 1",
    # So little data may teach nothing.
    "--recommended-eta 0.1": "--recommended-eta 0.1 --publish-anyway",
    "recommended_eta=0.1": "recommended_eta=0.1, publish_anyway=True",
}  # fmt: skip


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def smaller(text: str) -> str:
    for large, small in SMALLER.items():
        text = re.sub(rf"{re.escape(large)}(?!\d)", small, text)
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("own") / "own_task"))


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """The server, as the page's first command starts it."""
    first = re.findall(r"^\$ (.*)$", blocks("console")[0], re.MULTILINE)
    (command,) = first
    assert command.startswith("qsharp serve ")
    before = Path.cwd()
    os.chdir(folder)
    try:
        with serve(command.removeprefix("qsharp serve ").split(), folder / "server.log", patience=600) as url:
            os.chdir(before)
            yield url
    finally:
        os.chdir(before)


def run(command: list[str] | str, folder: Path, url: str) -> str:
    environment = os.environ | {"QSHARP_URL": url, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        command,
        shell=isinstance(command, str),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_lines_of_text_become_prompts(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Name a bird.\n\nName a tree.\nName a river.\nName a town.\n")
    subprocess.run([sys.executable, "-c", blocks("python")[0]], cwd=tmp_path, check=True)
    task = file_task(tmp_path / "prompts.jsonl")
    asked = {split: [one.messages for one in task.of_split(split)] for split in ("held_out", "train")}
    assert asked["held_out"] == [[{"role": "user", "content": f"Name a {one}."}] for one in ("bird", "town")]
    assert len(asked["train"]) == 2


@pytest.mark.timeout(2400)
def test_the_page_runs(folder: Path, url: str) -> None:
    (line,) = blocks("json")
    assert json.loads(line) == json.loads((folder / "prompts.jsonl").read_text().splitlines()[0])
    _, shown, python = blocks("python")
    assert shown in (folder / "my_task.py").read_text()
    commands = [
        smaller(line).replace("localhost:8000", url.removeprefix("http://"))
        for block in blocks("console")[1:]
        for line in re.findall(r"^\$ (.*)$", block, re.MULTILINE)
    ]
    assert len(commands) >= 9
    exports = " && ".join(one for one in commands if one.startswith("export ")) or "true"
    said = {one: run(f"{exports} && {one}", folder, url) for one in commands if not one.startswith("export ")}
    (answer,) = [json.loads(text) for one, text in said.items() if one.startswith("curl")]
    assert answer["choices"][0]["guidance"]["critic"] == "own@1"
    report = json.loads((folder / "runs" / "evaluation" / "report.json").read_text())
    assert [(r["method"], r["eta"]) for r in report["results"]] == [
        ("reference", None),
        ("qsharp", 0.3),
        ("qsharp", 0.1),
    ]
    for plot in (
        "runs/evaluation/report.png",
        "critics/.runs/own/calibration.png",
        "critics/.runs/own/learning-curve.png",
    ):
        assert (folder / plot).stat().st_size > 10_000
    loop = json.loads((folder / "runs" / "loop" / "report.json").read_text())
    assert loop["rounds"][0]["evaluate"]["results"]
    printed = run([sys.executable, "-c", smaller(python)], folder, url)
    assert "qsharp 0.1" in printed


@pytest.mark.timeout(1200)
def test_the_notebook_runs(folder: Path, url: str) -> None:
    """Inside a running event loop, as notebooks have one."""
    cells = json.loads((EXAMPLE / "own_task.ipynb").read_text())["cells"]
    source = smaller("\n".join("".join(one["source"]) for one in cells if one["cell_type"] == "code"))
    body = "".join(f"    {line}\n" for line in source.splitlines())
    script = f"import asyncio\nasync def notebook():\n{body}\nif __name__ == '__main__':\n    asyncio.run(notebook())\n"
    (folder / "notebook.py").write_text(script)
    assert "qsharp 0.1:" in run([sys.executable, "notebook.py"], folder, url)
