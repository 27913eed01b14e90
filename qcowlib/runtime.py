# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Who runs the engine: the caller's thread, or an asyncio loop.

The engine is written once, as coroutines.  Invariant: every ``await`` in it is
an I/O (:meth:`Runtime.io`) or a wait for another operation
(:meth:`WaitQueue.wait`), and nothing else is; between two awaits its state
changes are atomic.  Under :class:`SyncRuntime` that holds for threads too,
because one lock per image chain is held by whoever runs engine code and is
dropped exactly around those two.  A coroutine run by :class:`SyncRuntime`
never suspends: there is no loop and no hidden thread.

Not here: policy of any kind.  A deterministic runtime for tests is in
:mod:`qcowlib.testing.sim`.
"""

from __future__ import annotations

import time
from _thread import allocate_lock
from collections.abc import Callable, Coroutine

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    import threading
    from _thread import LockType
    from typing import Any, Protocol, TypeVar

    T = TypeVar("T")
else:
    Protocol = object

__all__ = ["AsyncioRuntime", "Runtime", "SyncRuntime", "WaitQueue", "new_condition", "pause"]


def new_condition() -> threading.Condition:
    """Return a mutex with a condition, for a storage that keeps state between its calls."""
    import threading

    return threading.Condition(threading.Lock())


def thread_id() -> int:
    """Return a number that no other living thread has."""
    import threading

    return threading.get_ident()


def pause() -> None:
    """Give other threads a moment: for waits that are rare and short, and have nobody to wake them."""
    time.sleep(0.001)


class WaitQueue(Protocol):
    """Operations waiting for a condition that others change."""

    async def wait(self) -> None:
        """Suspend until :meth:`wake_all` is called; the condition must be tested again."""

    def wake_all(self) -> None:
        """Let every waiter test its condition again."""


class Runtime(Protocol):
    """How one image chain runs its coroutines."""

    async def io(self, call: Callable[..., T], *args: object) -> T:
        """Run a blocking storage call with the engine unlocked."""

    def queue(self) -> WaitQueue:
        """Return a new queue for waiters."""

    def wall_ns(self) -> int:
        """Wall-clock time in nanoseconds since 1970."""


class _SyncQueue:
    """A condition on the engine lock, made when somebody first has to wait."""

    __slots__ = ("_condition", "_lock")

    def __init__(self, lock: LockType) -> None:
        self._lock = lock
        self._condition: threading.Condition | None = None

    async def wait(self) -> None:
        if self._condition is None:
            import threading

            self._condition = threading.Condition(self._lock)
        self._condition.wait()

    def wake_all(self) -> None:
        if self._condition is not None:
            self._condition.notify_all()


class SyncRuntime:
    """Runs a coroutine to its end in the calling thread.

    ``lock`` is the engine lock; compiled fast paths do not need it because
    they hold the GIL while they look at shared state.
    """

    __slots__ = ("lock",)

    def __init__(self) -> None:
        self.lock = allocate_lock()

    async def io(self, call: Callable[..., T], *args: object) -> T:
        self.lock.release()
        try:
            return call(*args)
        finally:
            self.lock.acquire()

    def queue(self) -> WaitQueue:
        return _SyncQueue(self.lock)

    def wall_ns(self) -> int:
        return time.time_ns()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Return the coroutine's result; raises what it raises."""
        with self.lock:
            try:
                coroutine.send(None)
            except StopIteration as stop:
                result: T = stop.value
                return result
        coroutine.close()
        raise RuntimeError("an engine coroutine suspended under SyncRuntime")


class _AsyncQueue:
    __slots__ = ("_loop", "_waiters")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiters: list[asyncio.Future[None]] = []

    async def wait(self) -> None:
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._waiters.append(waiter)
        await waiter

    def wake_all(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


class AsyncioRuntime:
    """Runs coroutines on a loop; blocking storage calls go to its executor.

    One executor job is one storage call of the engine, that is a whole batch
    of runs, not one cluster.
    """

    __slots__ = ("_cancelled", "_shield", "_wait", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        import asyncio

        self.loop = loop
        self._cancelled = asyncio.CancelledError
        self._shield = asyncio.shield
        self._wait = asyncio.wait

    async def io(self, call: Callable[..., T], *args: object) -> T:
        """Run *call* in a thread; a cancelled task ends only when the call has returned.

        Otherwise it would still write where its space was given back.
        """
        future = self.loop.run_in_executor(None, call, *args)
        try:
            return await self._shield(future)
        except self._cancelled:
            while not future.done():
                try:
                    await self._wait((future,))
                except self._cancelled:
                    continue
            # A failed barrier counts for more than that the caller lost interest.
            future.result()
            raise

    def queue(self) -> WaitQueue:
        return _AsyncQueue(self.loop)

    def wall_ns(self) -> int:
        return time.time_ns()


def cpu_seconds() -> float:
    """Return the processor time of the calling thread, for calibrations."""
    return time.thread_time()
