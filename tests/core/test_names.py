"""What critics and their versions may be called: one pattern, at every entrance."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from qsharp_core.errors import ConfigError
from qsharp_core.vllm_plugin.settings import parse_critic
from qsharp_core.wire.critics import ActivateRequest, LoadRequest, critic_name
from server.commands import critics as critics_command
from trainer.commands.train import main as train
from trainer.training.settings import TrainingError, TrainSettings

GOOD = ["a", "7", "A9", "a.b", "a-b_c", "3.1-soak", "a.", "a" * 64]
BAD = ["", ".a", "-a", "_a", "a..b", "../x", "x/y", "x@1", "a b", "a\n", "a\0", "é", "a" * 65, "a" * 10**6]


@pytest.mark.parametrize("name", GOOD)
def test_names(name: str) -> None:
    assert critic_name(name) == name
    assert parse_critic(f"{name}=some/path") == (name, Path("some/path"))
    assert LoadRequest(path="x", name=name).name == name
    assert ActivateRequest(version=name).version == name
    assert TrainSettings(base="x", name=name).name == name
    assert critics_command._parser().parse_args(["unload", name, name]).version == name


@pytest.mark.parametrize("name", BAD, ids=lambda name: repr(name)[:12])
def test_no_names(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be 1 to 64 letters") as raised:
        critic_name(name)
    assert len(str(raised.value)) < 300
    with pytest.raises(ConfigError, match="--critic: NAME must be"):
        parse_critic(f"{name}=some/path")
    for wrong in (lambda: LoadRequest(path="x", name=name), lambda: ActivateRequest(version=name)):
        with pytest.raises(ValidationError, match=r"name|version"):
            wrong()
    with pytest.raises(ValidationError, match="name"):
        TrainSettings(base="x", name=name)
    with pytest.raises(SystemExit):
        critics_command._parser().parse_args(["load", "x", f"--name={name}"])
    assert "--name: must be 1 to 64" in capsys.readouterr().err


def test_the_trainer_names_its_flag(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"^--name: "):
        train(["--data", str(tmp_path), "--base", "x", "--out", str(tmp_path), "--name", "a..b"])


@given(st.text(max_size=70))
def test_the_pattern_is_what_the_words_say(name: str) -> None:
    fits = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) is not None and ".." not in name
    try:
        critic_name(name)
    except ValueError:
        assert not fits
    else:
        assert fits
