"""One thread that does all writing, in groups: whatever is queued when it is free goes into one transaction.

A commit waits for the disk, for milliseconds; grouping makes that the cost of many rollouts and not of each. A future
resolves after the commit that holds its operation, or fails, and then nothing of the operation is stored.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, OperationalError

from qsharp_core.errors import StoreError
from server.store.database import WRITES

logger = logging.getLogger("vllm.qsharp")
GROUP = 1024  # operations in one transaction at most: bounds how long the first of them waits


@dataclass(eq=False)
class Operation:
    """Something to write.

    Attributes:
        run: writes it, or several of one kind at once, and returns the results in order. It may be run again when a
            transaction has failed, so it must not mind to find its own work done.
        payload: what `run` is given, among others of the same kind.
    """

    run: Callable[[Connection, list[Any]], list[Any]]
    payload: Any
    future: "Future[Any]" = field(default_factory=Future)
    submitted: float = field(default_factory=time.monotonic)


class Writer:
    """The thread; it starts at once and ends with `close`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine.execution_options(**{WRITES: True})
        self._queue: queue.SimpleQueue[Operation | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._oldest: float | None = None  # when the first of the running transaction was submitted
        self._thread = threading.Thread(target=self._work, name="qsharp-rollouts", daemon=True)
        self._thread.start()

    def submit(self, run: Callable[[Connection, list[Any]], list[Any]], payload: Any) -> "Future[Any]":
        """Queues an operation, from any thread.

        Raises:
            StoreError: the writer is closed.
        """
        operation = Operation(run, payload)
        with self._lock:
            if self._closed:
                raise StoreError("the rollout store is closed")
            self._queue.put(operation)
        return operation.future

    def lag(self) -> float:
        """Seconds that the oldest write on its way has waited; 0 if there is none."""
        oldest = self._oldest
        return 0.0 if oldest is None else time.monotonic() - oldest

    def close(self) -> None:
        """Writes what is queued, then ends."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        going = True
        while going:
            group: list[Operation] = []
            going = self._take(group)
            # One that nobody waits for any more is not begun.
            group = [operation for operation in group if operation.future.set_running_or_notify_cancel()]
            if group:
                self._oldest = group[0].submitted
                self._write(group)
                self._oldest = None

    def _take(self, group: list[Operation]) -> bool:
        """Waits for one operation and adds all that are there; False at the end."""
        operation = self._queue.get()
        while operation is not None:
            group.append(operation)
            if len(group) == GROUP:
                return True
            try:
                operation = self._queue.get_nowait()
            except queue.Empty:
                return True
        return False

    def _write(self, group: list[Operation]) -> None:
        try:
            results = self._transact(group)
        except Exception as error:  # whatever it is, it belongs to who waits, and this thread must go on
            logger.warning("a transaction of %d writes to the rollout store failed: %s", len(group), error)
            self._write_each(group)
        else:
            for operation, result in zip(group, results, strict=True):
                operation.future.set_result(result)

    def _write_each(self, group: list[Operation]) -> None:
        """One may have spoilt it for all, or a connection was lost: each has another try, alone."""
        down: OperationalError | None = None
        for operation in group:
            try:
                if down is not None:  # no use in waiting for the same again and again
                    raise down
                (result,) = self._transact([operation])
            except Exception as error:
                down = error if isinstance(error, OperationalError) else None
                reason = str(error.orig if isinstance(error, DBAPIError) else error).strip()
                failure = StoreError(f"the rollout store failed, nothing was written: {reason}")
                failure.__cause__ = error
                operation.future.set_exception(failure)
            else:
                operation.future.set_result(result)

    def _transact(self, group: list[Operation]) -> list[Any]:
        kinds: dict[Any, list[int]] = {}
        for position, operation in enumerate(group):
            kinds.setdefault(operation.run, []).append(position)
        results: list[Any] = [None] * len(group)
        with self._engine.begin() as connection:
            for run, positions in kinds.items():
                done = run(connection, [group[position].payload for position in positions])
                for position, result in zip(positions, done, strict=True):
                    results[position] = result
        return results
