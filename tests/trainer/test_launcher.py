"""Training in the processes that a launcher starts: what is shown and said, and that none is left behind."""

import asyncio
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qsharp_core import cli
from tests.support import fake_server, models
from tests.support import trainer_data as world
from tests.trainer.test_loop import arguments, report_of
from trainer.commands.loop import main
from trainer.experiments import files
from trainer.experiments.files import RecipeError
from trainer.training.launcher import LAST_LINES, Launcher, launch, launcher_of
from trainer.training.settings import TrainingError

ROOT = Path(__file__).parents[2]


def script(tmp_path: Path, code: str) -> Launcher:
    """A launcher that runs this code, whatever it is to launch."""
    path = tmp_path / "launcher.py"
    path.write_text(code)
    return launcher_of(shlex.join([sys.executable, str(path)]))


def test_a_launcher_is_read_as_by_a_shell_and_looked_for_beside_this_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    program, *rest = launcher_of("accelerate launch --config_file 'my file.yaml'")
    assert Path(program) == Path(sys.executable).parent / "accelerate"
    assert rest == ["launch", "--config_file", "my file.yaml"]
    for text, complaint in (
        ("torchrunn --nnodes 2", "no program 'torchrunn'"),
        ("a 'b", "cannot be read as a shell would"),
        (" ", "names no program"),
    ):
        with pytest.raises(TrainingError, match=complaint):
            launcher_of(text)


def test_a_launcher_that_is_not_there_ends_a_command_before_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = ["loop", "--task", "sums", "--rounds", "1", "--run", str(tmp_path / "run"), "--url", "http://localhost:9"]
    train = ["train", "--data", str(tmp_path / "no.parquet"), "--out", str(tmp_path)]
    for command in (loop, train):
        assert cli.main([*command, "--launcher", "no-such-launcher"]) == 1
        assert "there is no program 'no-such-launcher'" in capsys.readouterr().err
    with pytest.raises(RecipeError, match=r"launcher: .*no program 'no-such-launcher'"):
        files.load("sums", ["launcher=no-such-launcher"])
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_goes_on_with_another_launcher() -> None:
    by_hand, launched = files.load("sums"), files.load("sums", [f"launcher={sys.executable}"])
    assert by_hand.identity == launched.identity


def test_what_it_writes_is_shown_and_its_reason_said(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    status = random.randint(2, 99)
    noise = random.randint(20, 60)
    code = f"""
import sys
sys.stderr.write("step 1\\rstep 2\\r")
for _ in range(2):  # of two processes
    sys.stderr.write("training: the loss became nan\\n")
for i in range({noise}):
    sys.stderr.write(f"a launcher's table, line {{i}}\\n")
sys.exit({status})
"""
    with pytest.raises(TrainingError, match=rf"ended with status {status}: the loss became nan$"):
        asyncio.run(launch(script(tmp_path, code), "-m", "what"))
    assert b"step 1\rstep 2\rtraining" in capfdbinary.readouterr().err
    # Without a reason: the last lines.
    with pytest.raises(TrainingError, match=f"line {noise - 1}$") as caught:
        asyncio.run(launch(script(tmp_path, code.replace("training: ", "x ")), "-m", "what"))
    assert str(caught.value).count("a launcher's table") == LAST_LINES
    asyncio.run(launch(script(tmp_path, "import sys; assert sys.argv[1:] == ['-m', 'what']"), "-m", "what"))


SLOW = """
import os, signal, subprocess, sys, time
from pathlib import Path
here = Path(__file__).parent
if "child" not in sys.argv:
    code = "import time; time.sleep(600)"
    (here / "child").write_text(str(subprocess.Popen([sys.executable, "-c", code]).pid))
    (here / "pid").write_text(str(os.getpid()))
try:
    time.sleep(600)
except KeyboardInterrupt:
    (here / "saved").write_text("")
    sys.exit(1)
"""


def wait_for(path: Path) -> int:
    """The number in a file that another process writes."""
    deadline = time.monotonic() + 60
    while not path.is_file() or not path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return int(path.read_text())


def ended(pid: int) -> bool:
    """Whether a process ends soon."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.05)
    return False


def test_what_is_stopped_is_interrupted_and_leaves_nothing(tmp_path: Path) -> None:
    async def stopped() -> None:
        running = asyncio.create_task(launch(script(tmp_path, SLOW), "-m", "what"))
        await asyncio.to_thread(wait_for, tmp_path / "pid")
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(stopped())
    assert (tmp_path / "saved").is_file()  # it was told by SIGINT, and waited for
    assert ended(wait_for(tmp_path / "pid"))
    assert ended(wait_for(tmp_path / "child"))


def test_what_is_killed_takes_its_launcher_with_it(tmp_path: Path) -> None:
    launcher = script(tmp_path, SLOW)
    code = f"import asyncio; from trainer.training.launcher import launch; asyncio.run(launch({launcher!r}, '-m', 'x'))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    pid, child = wait_for(tmp_path / "pid"), wait_for(tmp_path / "child")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert ended(pid)
    os.kill(child, signal.SIGKILL)  # a launcher's own children have a lifeline; this script's has none


TWO = "torchrun --standalone --nproc-per-node 2"
"""On a machine without GPUs, `accelerate launch` starts a single process."""


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.mark.usefixtures("one_thread")
def test_qsharp_train_in_two_processes_says_that_nothing_was_learned(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = models.write_reference(tmp_path / "base", "qwen2", sharpness=1.0)
    noise = world.write(tmp_path / "data.parquet", [
        one | {"reward": float(random.Random(one["id"]).random() < 0.5)} for one in world.rollouts(prompts=12, each=4)
    ])  # fmt: skip
    given = [
        "train", "--data", str(noise), "--out", str(tmp_path / "out"), "--base", str(base), "--layers", "1", "--epochs",
        "4", "--lr", "0.1", "--batch-tokens", "64", "--held-out", "0.3", "--select", "last", "--launcher", TWO,
    ]  # fmt: skip
    assert cli.main(given) == 1
    shown = capfd.readouterr()
    last = shown.err.strip().splitlines()[-1]
    assert last.startswith("qsharp train: ")
    assert last.count("the critic has learned nothing: held-out log loss") == 1
    assert "held-out prompts" in shown.out  # the table is shown all the same
    assert "2 processes" in shown.out
    assert not (tmp_path / "out" / "critic").exists()
    assert cli.main([*given, "--publish-anyway"]) == 0
    assert (tmp_path / "out" / "critic" / "1" / "critic.json").is_file()


@pytest.mark.usefixtures("one_thread")
def test_a_loop_that_is_killed_in_its_launchers_training_goes_on_with_another_one(tmp_path: Path) -> None:
    base = models.write_reference(tmp_path / "base", sharpness=1.0)
    with fake_server.running(f"sqlite:///{tmp_path / 'rollouts.db'}") as fake:
        fake.root = str(base)
        given = arguments(fake, tmp_path, "run", "--rounds", "1", train=("--epochs", "40", "--checkpoint-every", "1"))
        at = given.index("--")
        launched = [*given[:at], "--launcher", TWO, *given[at:]]
        training = tmp_path / "run" / "round-0" / "training"
        process = subprocess.Popen(
            [sys.executable, "-c", "from qsharp_core.cli import main; main()", "loop", *launched],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 180
        while not list(training.glob("checkpoint-*")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        workers = of_job(training.parent / "training.json")
        assert len(workers) == 3  # and torchrun
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert all(ended(pid) for pid in workers)
        run = (training / "run.json").read_text()
        # On with a launcher that is a plain Python.
        main([*given[:at], "--launcher", shlex.quote(sys.executable), *given[at:]])
        assert report_of(tmp_path)["rounds"][0]["train"]["critic"] == "tiny@1"
        assert run.partition('"published"')[0] == (training / "run.json").read_text().partition('"published"')[0]


def of_job(file: Path) -> list[int]:
    """The processes that were started for a job."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(file).encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found
