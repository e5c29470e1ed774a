"""The snippets of docs/clients.md, each with its client: against a real server, where the client is installed.

A client is taken from this environment, or from `$QSHARP_CLIENTS/NAME` (a virtual environment, or for Node.js a folder
with `node_modules`), as their requirements exclude each other.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

from tests.conftest import Server

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "clients"
# Script -> the client's folder in $QSHARP_CLIENTS, and the module by which it is known to be here.
CLIENTS = {
    "openai_python.py": ("openai-python", "openai"),
    "openai_node.mjs": ("openai-node", None),
    "langchain_chat.py": ("langchain", "langchain_openai"),
    "litellm_completion.py": ("litellm", "litellm"),
    "lm_eval.sh": ("lm-eval", "lm_eval"),
    "inspect_task.py": ("inspect-ai", "inspect_ai"),
    "vllm_bench.sh": ("vllm", "vllm.entrypoints.cli.main"),
    "guidellm.sh": ("guidellm", "guidellm"),
}
GUIDED = re.compile(r"^qsharp_guided_tokens_total (\S+)$", re.MULTILINE)


def command(script: str, work: Path) -> tuple[Sequence[str], Path]:
    """How to run a script where its client is installed: the command, and the folder of that client's programs."""
    name, module = CLIENTS[script]
    apart = Path(os.environ.get("QSHARP_CLIENTS", "nowhere")) / name
    programs = Path(sys.executable).parent
    if module is None:
        node = shutil.which("node")
        if node is None or not (apart / "node_modules").is_dir():
            pytest.skip(f"{name} is not installed: set QSHARP_CLIENTS")
        shutil.copy(SCRIPTS / script, work / script)  # Node.js looks for packages beside the script
        (work / "node_modules").symlink_to(apart / "node_modules")
        return (node, str(work / script)), programs
    if (apart / "bin" / "python").exists():
        programs = apart / "bin"
    elif find_spec(module.partition(".")[0]) is None:
        pytest.skip(f"{name} is not installed: set QSHARP_CLIENTS")
    runner = "sh" if script.endswith(".sh") else str(programs / "python")
    return (runner, str(SCRIPTS / script)), programs


def guided_tokens(server: Server) -> float:
    found = GUIDED.search(httpx.get(f"{server.url}/metrics", timeout=60).text)
    assert found is not None
    return float(found[1])


@pytest.mark.parametrize("script", CLIENTS)
def test_a_client_guides(script: str, server: Server, tmp_path: Path) -> None:
    words, programs = command(script, tmp_path)
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"),
        "QSHARP_URL": server.url, "MODEL": "tiny", "TOKENIZER": str(server.reference), "OPENAI_API_KEY": "none",
    }  # fmt: skip
    before = guided_tokens(server)
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.strip()
    assert guided_tokens(server) > before


def test_every_snippet_is_in_the_documentation() -> None:
    page = (ROOT / "docs" / "clients.md").read_text()
    blocks = re.findall(r"^```\w+\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert {path.name for path in SCRIPTS.iterdir() if path.is_file()} == CLIENTS.keys()
    for name in CLIENTS:
        assert f"(../examples/clients/{name})" in page
        source = (SCRIPTS / name).read_text()
        assert any(block in source and block.count("\n") > 2 for block in blocks), name
