"""`pip install qsharp-serve[cpu]` of the wheel, in an empty environment: it serves, guides, learns and is guided anew.

It takes minutes, so it runs by `make package-check` alone.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.package.conftest import ROOT, Built
from trainer.serving import serve

KEY = "admin"
UNUSED = ("torchvision", "torchaudio", "torchcodec")  # see the Makefile
PROMPT = (
    "21,13|20,15|17,9|17,5|16,19|1,18|3,0|17,16|5,12|7,3|9,7|11,1|18,4|19,23|17,14|23,8|12,20|13,10|14,21|17,11/17,4="
)
ANSWERS = 64
VERIFIER = """
def even(case):
    \"\"\"Whether the path begins with an arm of an even number.\"\"\"
    return float(int(case.completion.split(",")[1]) % 2 == 0)
"""


@pytest.fixture(scope="module")
def environment(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel and what it asks for, in the versions that are tested."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt")]
    if index := os.environ.get("TORCH_INDEX_URL"):
        pip += ["--extra-index-url", index]
    started = time.monotonic()
    subprocess.run([*pip, f"{built.wheel}[cpu]"], check=True)
    if subprocess.run([python, "-c", "import torchvision, torchaudio"], capture_output=True).returncode:
        subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", *UNUSED], check=True)
    print(f"installed in {time.monotonic() - started:.0f} s")
    return folder


@pytest.mark.package
@pytest.mark.timeout(3600)
def test_it_serves_and_trains(environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    qsharp = environment / "bin" / "qsharp"
    (tmp_path / "rule.py").write_text(VERIFIER)

    def run(*arguments: str) -> str:
        done = subprocess.run([qsharp, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    assert run("--version").startswith("qsharp-serve ")
    flags = ["star-graph", "--rollouts", "sqlite:///rollouts.db", "--admin-key", KEY]
    serving = serve(flags, tmp_path / "log", command=(str(qsharp), "serve"), patience=900)
    with serving as url, httpx.Client(base_url=url) as http:
        server = ["--url", url]

        def answers(model: str) -> list[str]:
            body = {"model": model, "prompt": PROMPT, "max_tokens": 16, "n": ANSWERS, "seed": 0}
            response = http.post("/v1/completions", json=body, timeout=120)
            choices: list[dict[str, Any]] = response.json()["choices"]
            return [choice["text"] for choice in choices]

        def right(model: str) -> int:
            return sum(text == "17,11,1,18,4" for text in answers(model))

        def even(model: str) -> int:
            return sum(bool(re.match(r"17,\d*[02468],", text)) for text in answers(model))

        assert right("star-graph@eta=0.1") > 0.75 * ANSWERS > 2 * right("star-graph")

        (model, *_) = http.get("/v1/models").json()["data"]
        run("collect", "--task", "star_graph", "--limit", "300", "--n", "8", "--state", "state.jsonl", *server)
        run("reward", "--verifier", "rule:even", *server)
        run("export", "--has-reward", "true", "--out", "rollouts.parquet", *server)
        native = ["--backbone", "reference", "--base", model["root"]]
        run("train", "--data", "rollouts.parquet", "--out", "critics", "--name", "even", *native)
        run("critics", "--admin-key", KEY, *server, "load", "critics/even/1")
        # Two arms of five are even.
        guided, alone = even("star-graph@eta=0.05@critic=even"), even("star-graph")
        assert guided > 0.6 * ANSWERS > alone
        print(f"of {ANSWERS} answers {guided} begin with an even arm with the new critic, {alone} without")
