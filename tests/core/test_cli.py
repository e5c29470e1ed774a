"""The command line: its version, and what shells complete of it."""

import os
import subprocess
import tomllib
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest

from qsharp_core import cli, completion

ROOT = Path(__file__).parents[2]


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{project['name']} {project['version']}\n"


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bash's completion."""
    path = tmp_path_factory.mktemp("completion") / "qsharp"
    # The commands set variables for vLLM, which the servers of other tests are not to inherit.
    with path.open("w") as file, redirect_stdout(file), patch.dict(os.environ):
        assert cli.main(["completion", "bash"]) == 0
    return path


def completed(script: Path, *words: str) -> set[str]:
    """What bash offers after these words, of which the last is begun."""
    line = " ".join(words)
    commands = [
        f"source {script}",
        f'COMP_LINE="{line}"; COMP_POINT={len(line)}',
        "COMP_WORDS=(" + " ".join(f'"{word}"' for word in words) + f"); COMP_CWORD={len(words) - 1}",
        "$(complete -p qsharp | sed -E 's/.*-F ([^ ]+).*/\\1/')",
        'printf "%s\\n" "${COMPREPLY[@]}"',
    ]
    done = subprocess.run(["bash", "-c", "\n".join(commands)], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_a_shell_completes_commands_and_flags(script: Path) -> None:
    assert completed(script, "qsharp", "") >= cli.COMMANDS.keys()
    assert completed(script, "qsharp", "cri") == {"critics"}
    assert completed(script, "qsharp", "serve", "--default-e") == {"--default-eta"}
    assert "--max-model-len" in completed(script, "qsharp", "serve", "--max-mo")
    assert completed(script, "qsharp", "loop", "--eval-s") == {"--eval-samples", "--eval-split"}
    assert "rollback" in completed(script, "qsharp", "critics", "")
    assert completed(script, "qsharp", "train", "--tail-no-such") == set()


def test_every_commands_parser_is_found() -> None:
    for name in cli.COMMANDS:
        assert completion.parser_of(name).prog.startswith(f"qsharp {name}")
