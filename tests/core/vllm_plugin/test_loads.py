"""Loads beside a running engine: what hangs is given up, and holds up nothing else."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qsharp_core.critic.checkpoint import CriticFiles
from qsharp_core.errors import CriticError
from qsharp_core.vllm_plugin.loads import MOST_AT_ONCE, CriticLoads
from qsharp_core.vllm_plugin.registry import LoadedCritic, WorkerRegistry


class Panic(BaseException):
    """As Rust's panics come to Python."""


def built(files: CriticFiles, name: str | None) -> LoadedCritic:
    return LoadedCritic(files.card, files.folder, None, 8)  # type: ignore[arg-type]


def loads_of(
    read: Callable[[Path], object], patience: float = 60.0, build: Callable[..., object] = built
) -> CriticLoads:
    registry = WorkerRegistry(read, build, patience)  # type: ignore[arg-type]
    return CriticLoads(registry.load, patience)


def polled(loads: CriticLoads, path: str, seconds: float = 10.0) -> LoadedCritic:
    deadline = time.monotonic() + seconds
    while (critic := loads.poll(path, None)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return critic


class Disk:
    """Reads of folders whose name begins with `stuck` wait until they are let go."""

    def __init__(self) -> None:
        self.released = threading.Event()

    def read(self, path: Path) -> CriticFiles:
        if path.name.startswith("stuck"):
            self.released.wait(60)
        return CriticFiles(path, None, {}, None)  # type: ignore[arg-type]


def test_a_load_that_hangs_is_given_up_and_another_goes_on() -> None:
    disk = Disk()
    loads = loads_of(disk.read, patience=0.3)
    began = time.monotonic()
    assert loads.poll("/stuck", None) is None
    assert polled(loads, "/good").path == Path("/good")  # while the other hangs
    with pytest.raises(CriticError, match=r"/stuck was given up: .* within 0.3 s"):
        polled(loads, "/stuck")
    assert 0.3 < time.monotonic() - began < 5
    with pytest.raises(CriticError, match="still hangs"):
        loads.poll("/stuck", None)
    assert polled(loads, "/good").path == Path("/good")
    disk.released.set()
    deadline = time.monotonic() + 10
    while True:  # its thread ends, and the folder may be asked for again
        try:
            assert polled(loads, "/stuck").path == Path("/stuck")
            break
        except CriticError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_few_loads_hang_at_once() -> None:
    disk = Disk()
    loads = loads_of(disk.read)
    for number in range(MOST_AT_ONCE):
        assert loads.poll(f"/stuck-{number}", None) is None
    with pytest.raises(CriticError, match="8 other loads have not ended"):
        loads.poll("/good", None)
    disk.released.set()
    for number in range(MOST_AT_ONCE):
        polled(loads, f"/stuck-{number}")
    polled(loads, "/good")


def test_one_is_built_at_a_time_and_none_waits_forever() -> None:
    released, building = threading.Event(), threading.Event()

    def build(files: CriticFiles, name: str | None) -> LoadedCritic:
        if files.folder.name == "slow":
            building.set()
            released.wait(60)
        return built(files, name)

    registry = WorkerRegistry(Disk().read, build, patience=0.2)
    slow = threading.Thread(target=registry.load, args=(Path("/slow"), None))
    slow.start()
    assert building.wait(10)
    with pytest.raises(CriticError, match="another critic was built for"):
        registry.load(Path("/good"), None)
    released.set()
    slow.join(10)
    assert registry.load(Path("/good"), None).path == Path("/good")


@pytest.mark.parametrize(
    "error", [ValueError("x"), MemoryError(), RecursionError("deep"), KeyError("k"), Panic("rust")]
)
def test_whatever_goes_wrong_is_the_critics_fault(error: BaseException) -> None:
    def read(path: Path) -> CriticFiles:
        raise error

    with pytest.raises(CriticError, match=f"/bad cannot be loaded: {type(error).__name__}"):
        polled(loads_of(read), "/bad")
