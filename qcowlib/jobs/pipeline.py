# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Units of work through a few threads, in bounded memory, with one order where order matters.

Each worker takes the next unit, works on it in a buffer of its own, and may
ask for its *turn*: turns are given in the order of the units, one at a time.
So a job reads, scans and compresses side by side, decides about places in
order, and writes side by side; what it decides does not depend on how many
workers there are or which is faster.

Invariants: memory is the number of workers times the size of a unit; the first
error ends the job and is the one raised; a job that was cancelled raises
:class:`~qcowlib.errors.Cancelled`; no thread outlives the call.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Final, Protocol, TypeVar

from qcowlib.errors import Cancelled, UsageError
from qcowlib.units import MiB

__all__ = ["DEFAULT_MEMORY", "MAX_WORKERS", "Control", "Turn", "run"]

Unit = TypeVar("Unit")

MAX_WORKERS: Final = 16
DEFAULT_MEMORY: Final = 64 * MiB

#: Jobs with no more than this to do run in the caller's thread alone.
_SMALL: Final = 4 * MiB
_MOST_MARKS: Final = 10_000
#: How long a rate limit may be exceeded before it is enforced, and how often progress is told.
_SLICE_S: Final = 0.1


class _Flag(Protocol):
    def is_set(self) -> bool: ...


class Control:
    """What the caller of a job says about how it runs, and what it hears of it.

    *progress* is called with ``(done, total)`` in bytes, in the caller's
    thread, at the start, now and then, and with ``done == total`` at the end.
    *cancel* is a callable or an object with ``is_set()`` (an event), looked at
    before each unit.  *rate* limits bytes per second.  *workers* is 1 to 16
    (by default as many as processors, at least 2), *memory* the bytes for
    buffers.  Raises: UsageError for values outside.
    """

    __slots__ = (
        "_cancel",
        "_done",
        "_lock",
        "_marks",
        "_progress",
        "_rate",
        "_start",
        "_throttled",
        "memory",
        "total",
        "workers",
    )

    def __init__(
        self,
        *,
        progress: Callable[[int, int], object] | None = None,
        cancel: Callable[[], bool] | _Flag | None = None,
        rate: int | None = None,
        workers: int | None = None,
        memory: int = DEFAULT_MEMORY,
    ) -> None:
        if workers is not None and not 1 <= workers <= MAX_WORKERS:
            raise UsageError(
                f"Invalid number of coroutines. Allowed number of coroutines is between 1 and {MAX_WORKERS}"
            )
        if memory < 0 or (rate is not None and rate < 0):
            raise UsageError("memory and rate must not be negative")
        self._progress = progress
        self._cancel: Callable[[], bool] | None
        self._cancel = cancel if cancel is None or callable(cancel) else cancel.is_set
        self._rate = rate or 0
        self._lock = threading.Lock()
        self._done = 0
        self._marks: list[int] = []
        self._start = 0.0
        self._throttled = 0
        self.total = 0
        self.workers = workers or max(2, min(os.cpu_count() or 1, 8))
        self.memory = memory

    @property
    def wanted(self) -> bool:
        """Whether somebody listens to the progress."""
        return self._progress is not None

    def check(self) -> None:
        """Raise Cancelled if the caller wants the job to end."""
        if self._cancel is not None and self._cancel():
            raise Cancelled("the job was cancelled")

    def begin(self, total: int) -> None:
        """A job of *total* bytes starts."""
        self.total = total
        self._done = 0
        self._throttled = 0
        self._start = time.monotonic()
        self.report()

    def add(self, count: int, steps: Sequence[int] = ()) -> None:
        """*count* more bytes are done, in *steps* if they are to be told apart; any thread may say so."""
        with self._lock:
            done = self._done
            self._done += count
            for step in steps if self.wanted else ():
                done += step
                if done - (self._marks[-1] if self._marks else 0) > self.total // _MOST_MARKS:
                    self._marks.append(done)

    def report(self) -> None:
        """Tell the caller how far the job is."""
        if self._progress is None:
            return
        with self._lock:
            marks, self._marks = self._marks, []
            marks.append(self._done)
        for mark in marks:
            self._progress(min(mark, self.total), self.total)

    def end(self) -> None:
        """The job is complete."""
        self._done = self.total
        self.report()

    def throttle(self, count: int) -> None:
        """Wait until *count* more bytes are within the rate."""
        if not self._rate or not count:
            return
        with self._lock:
            self._throttled += count
            early = self._start + self._throttled / self._rate - time.monotonic()
        while early > _SLICE_S:
            step = min(early, 1.0)
            time.sleep(step)
            early -= step
            self.check()


class _Stop(Exception):
    """Another worker failed."""


class Turn:
    """``with turn:`` waits until every earlier unit had its turn, and keeps later ones out."""

    __slots__ = ("_index", "_state", "steps", "taken")

    def __init__(self, state: _State, index: int) -> None:
        self._state = state
        self._index = index
        #: Bytes of progress of the parts of the unit, which are told one by one.
        self.steps: Sequence[int] = ()
        self.taken = False

    def __enter__(self) -> None:
        self._state.wait_for(self._index)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.taken = True
        if error is not None:
            # Before anybody later has a turn: of errors raised in turns the earliest wins.
            self._state.fail(error)
        self._state.passed(self._index)


class _State:
    """What the workers of one job share."""

    def __init__(self, units: Iterator[tuple[int, object]], ordered: bool) -> None:
        self.units = units
        self.ordered = ordered
        self.source_lock = threading.Lock()
        self.changed = threading.Condition()
        self.ended = threading.Condition(threading.Lock())
        self.turn = 0
        self.busy = False
        self.running = 0
        self.failed: BaseException | None = None

    def fail(self, error: BaseException) -> None:
        with self.changed:
            if self.failed is None and not isinstance(error, _Stop):
                self.failed = error
            self.changed.notify_all()

    def wait_for(self, index: int) -> None:
        with self.changed:
            while self.failed is None and (self.busy or (self.ordered and self.turn != index)):
                self.changed.wait()
            if self.failed is not None:
                raise _Stop
            self.busy = True

    def passed(self, index: int) -> None:
        with self.changed:
            self.busy = False
            self.turn += 1
            self.changed.notify_all()

    def next_unit(self) -> tuple[int, object] | None:
        with self.source_lock:
            if self.failed is not None:
                return None
            return next(self.units, None)


def _buffer(size: int) -> memoryview:
    # Of whole pages at a page's start: fit for direct I/O.
    return memoryview(mmap.mmap(-1, max(size, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def run(
    units: Iterable[Unit],
    work: Callable[[Unit, memoryview, Turn], int],
    control: Control,
    *,
    buffer_size: int,
    amount: int,
    ordered: bool = True,
) -> None:
    """Do *work* on every unit; return when all is done, raise the first error.

    *work* gets the unit, a private buffer of *buffer_size* bytes and its turn
    (to be entered once at most), and returns how many bytes of progress the
    unit was.  *amount* is about how many bytes there are, to decide whether
    threads are worth it.  Without *ordered* turns only exclude each other.
    """
    state = _State(enumerate(units), ordered)
    count = min(control.workers, max(1, control.memory // max(buffer_size, 1)))
    if count == 1 or amount <= _SMALL:
        _work_alone(state, work, control, buffer_size)
        return
    threads = [
        threading.Thread(
            target=_worker, args=(state, work, control, buffer_size), name=f"qcowlib-{number}", daemon=True
        )
        for number in range(count)
    ]
    state.running = count
    try:
        for thread in threads:
            thread.start()
        while True:
            with state.ended:
                if state.running == 0 or state.failed is not None:
                    break
                state.ended.wait(_SLICE_S)
            control.report()
    except BaseException as error:
        state.fail(error)
        raise
    finally:
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    if state.failed is not None:
        raise state.failed


def _one(
    state: _State,
    unit: tuple[int, object],
    work: Callable[[Unit, memoryview, Turn], int],
    control: Control,
    buffer: memoryview,
) -> None:
    index, what = unit
    control.check()
    turn = Turn(state, index)
    count = work(what, buffer, turn)  # type: ignore[arg-type]
    if not turn.taken:
        with turn:
            pass
    control.add(count, turn.steps)
    control.throttle(count)


def _work_alone(
    state: _State, work: Callable[[Unit, memoryview, Turn], int], control: Control, buffer_size: int
) -> None:
    buffer = _buffer(buffer_size)
    while (unit := state.next_unit()) is not None:
        _one(state, unit, work, control, buffer)
        control.report()


def _worker(state: _State, work: Callable[[Unit, memoryview, Turn], int], control: Control, buffer_size: int) -> None:
    try:
        buffer = _buffer(buffer_size)
        while (unit := state.next_unit()) is not None:
            _one(state, unit, work, control, buffer)
    except BaseException as error:
        state.fail(error)
    finally:
        with state.ended:
            state.running -= 1
            state.ended.notify_all()
