"""One thread that does all writing, in groups: all operations that are queued when it is free share a transaction.

A commit waits milliseconds for the disk, and in a group many rollouts share that wait. An operation's future resolves
after the commit, or it fails, and then nothing of the operation is stored.
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
from sqlalchemy.exc import OperationalError

from qsharp_core.errors import StoreError
from server.store.database import WRITES
from server.store.failures import reason

logger = logging.getLogger("vllm.qsharp")
GROUP = 1024  # most operations in one transaction: bounds how long the first of them waits


@dataclass(eq=False)
class Operation:
    """Something to write.

    Attributes:
        run: writes the payloads of several operations of one kind, and returns their results in order. It may run again
            after a transaction has failed, so it must be correct where its work is done already.
        payload: this operation's.
        future: receives its result.
        submitted: when it was queued, on the monotonic clock, in seconds.
    """

    run: Callable[[Connection, list[Any]], list[Any]]
    payload: Any
    future: "Future[Any]" = field(default_factory=Future)
    submitted: float = field(default_factory=time.monotonic)


class Writer:
    """Owns the thread, which starts at once and ends with `close`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine.execution_options(**{WRITES: True})
        self._queue: queue.SimpleQueue[Operation | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._oldest: float | None = None  # when the first operation of the running transaction was submitted
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
        """Seconds that the oldest unfinished write has waited; 0 if there is none."""
        oldest = self._oldest
        return 0.0 if oldest is None else time.monotonic() - oldest

    def close(self) -> None:
        """Writes what is queued, then ends the thread."""
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
            # An operation whose future was cancelled is not begun.
            group = [operation for operation in group if operation.future.set_running_or_notify_cancel()]
            if group:
                self._oldest = group[0].submitted
                self._write(group)
                self._oldest = None

    def _take(self, group: list[Operation]) -> bool:
        """Waits for an operation, and adds it and all that are queued behind it to the group; False when closed."""
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
        except Exception as error:  # whoever waits gets it in the end, and this thread must go on
            logger.warning("a transaction of %d writes to the rollout store failed: %s", len(group), error)
            self._write_each(group)
        else:
            for operation, result in zip(group, results, strict=True):
                operation.future.set_result(result)

    def _write_each(self, group: list[Operation]) -> None:
        """Tries each operation alone: one of them may have made the group fail, or a connection was lost."""
        down: OperationalError | None = None
        for operation in group:
            try:
                if down is not None:  # the database is away: the others need not wait for that, too
                    raise down
                (result,) = self._transact([operation])
            except Exception as error:
                down = error if isinstance(error, OperationalError) else None
                logger.warning("a write to the rollout store failed: %s", error)
                # Clients are answered with this: a database's own words may have SQL in them.
                failure = StoreError(f"the rollout store failed, nothing was written: {reason(error)}")
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
