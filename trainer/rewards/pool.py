"""Runs verifiers in processes of their own, which can be killed.

A verifier that hangs is killed after a time-out. One that crashes takes its process along, and one that wants too much
memory gets a MemoryError. Only the completion that it judged is lost, and a new process is started.

A process runs one call at a time, and imports what it calls by name. It dies with its parent.
"""

import asyncio
import inspect
import multiprocessing
import resource
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from qsharp_core.lifetime import die_with_parent
from trainer.rewards.base import VerifierError

START_TIMEOUT = 300.0  # seconds until a new process has imported what it needs
_READY = "ready"


class Worker:
    """One process, which is started when it is first needed."""

    def __init__(self, load: Callable[[str], Callable[[Any], Any]], memory: int | None) -> None:
        self._load = load
        self._memory = memory
        self._process: Any = None
        self._pipe: Connection | None = None
        self._known: set[str] = set()

    def start(self) -> None:
        """Starts the process if none runs. To be called in the main thread: the process ends with the thread."""
        if self._process is not None:
            return
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._load, self._memory), daemon=True)
        self._process.start()
        theirs.close()
        self._known = set()

    def call(self, name: str, argument: Any, timeout: float) -> Any:
        """Calls the callable of that name in the process, and waits for what it returns.

        Raises:
            VerifierError: it raised, took longer than `timeout` seconds, or ended its process.
        """
        assert self._pipe is not None
        if name not in self._known:  # imports may take long, and are not the completion's fault
            self._ask((name, None), START_TIMEOUT, f"{name} was not loaded within {START_TIMEOUT:g} s")
            self._known.add(name)
        return self._ask((name, argument), timeout, f"took longer than {timeout:g} s")

    def stop(self) -> None:
        """Kills the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            assert self._pipe is not None
            self._pipe.close()
            self._process.close()
            self._process = self._pipe = None

    def kill(self) -> None:
        """Ends a call that another thread waits for, by killing the process."""
        if (process := self._process) is not None:
            with suppress(ValueError):  # that thread was faster
                process.kill()

    def _ask(self, request: tuple[str, Any], timeout: float, too_long: str) -> Any:
        assert self._pipe is not None
        try:
            self._pipe.send(request)
            if not self._pipe.poll(timeout):
                self.stop()
                raise VerifierError(too_long)
            error, value = self._pipe.recv()
        except (EOFError, OSError) as broken:
            self._process.join()
            code = self._process.exitcode
            self.stop()
            raise VerifierError(f"ended its process ({_ending(code)})") from broken
        if error is not None:
            raise VerifierError(error)
        return value


class WorkerPool:
    """Several worker processes, to be used as an async context manager.

    Args:
        load: makes a callable of a name, in the process; a module's function, so that it can be pickled.
        workers: how many processes.
        timeout: seconds a call may take.
        memory: bytes of address space that a process may have; None is no limit.
    """

    def __init__(
        self, load: Callable[[str], Callable[[Any], Any]], workers: int, timeout: float, memory: int | None = None
    ) -> None:
        self._timeout = timeout
        self._workers = [Worker(load, memory) for _ in range(workers)]
        self._idle: asyncio.Queue[Worker] = asyncio.Queue()
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="verifiers")
        for worker in self._workers:
            self._idle.put_nowait(worker)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.stop()

    async def run(self, name: str, argument: Any) -> Any:
        """Calls the callable of that name, when a worker is free.

        Raises:
            VerifierError: see `Worker.call`.
        """
        worker = await self._idle.get()
        worker.start()
        call = asyncio.get_running_loop().run_in_executor(self._threads, worker.call, name, argument, self._timeout)
        # A caller that is cancelled leaves the call behind: only its end makes the worker free.
        call.add_done_callback(lambda _: self._idle.put_nowait(worker))
        return await asyncio.shield(call)


def _serve(pipe: Connection, load: Callable[[str], Callable[[Any], Any]], memory: int | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    die_with_parent()
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    callables: dict[str, Callable[[Any], Any]] = {}
    while True:
        try:
            name, argument = pipe.recv()
        except EOFError:
            return
        try:
            if argument is None:
                callables[name] = load(name)
                answer = (None, _READY)
            else:
                answer = (None, _awaited(callables[name](argument)))
            pipe.send(answer)
        except Exception as error:  # whatever a verifier raises, or an answer that cannot be pickled
            pipe.send((f"{type(error).__name__}: {error}"[:500], None))


def _awaited(value: Any) -> Any:
    async def wait() -> Any:
        return await value

    return asyncio.run(wait()) if inspect.isawaitable(value) else value


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit status {code}"
