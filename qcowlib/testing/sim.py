# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A runtime that runs several operations in one chosen order.

Invariant: between two awaits nothing else runs, and at each await a schedule
(a list of small numbers) says who goes on; the same schedule gives the same
run.  An I/O is two steps: before it is made and after it returned, so others
may run on either side, but never inside it.

:func:`interleavings` tries every schedule of a scenario while there are few,
and seeded ones beyond that; :func:`preemptions` those with few changes of who
runs, which is where long programs go wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator, Iterator, Sequence
from random import Random
from typing import Any, NamedTuple, TypeVar

__all__ = ["Deadlock", "Run", "SimRuntime", "interleavings", "preemptions", "replay"]

T = TypeVar("T")

MAX_STEPS = 1_000_000
_REST = 100_000


class Deadlock(AssertionError):
    """Every operation that is left waits; the message has the schedule."""


class _Step:
    """Awaited: suspends once; ``queue`` says whose waking is needed to go on."""

    __slots__ = ("queue",)

    def __init__(self, queue: _SimQueue | None = None) -> None:
        self.queue = queue

    def __await__(self) -> Generator[_Step, None, None]:
        yield self


class _SimQueue:
    __slots__ = ("waiting",)

    def __init__(self) -> None:
        self.waiting: set[int] = set()

    async def wait(self) -> None:
        await _Step(self)

    def wake_all(self) -> None:
        self.waiting.clear()


class Run(NamedTuple):
    """One finished run: a result or an exception for each operation, and the schedule that gave it."""

    results: tuple[object, ...]
    schedule: tuple[int, ...]
    #: How many operations could go on at each choice.
    choices: tuple[int, ...]

    def result(self) -> tuple[object, ...]:
        """Return the results; raise the first exception."""
        for result in self.results:
            if isinstance(result, BaseException):
                raise result
        return self.results


class SimRuntime:
    """Give it to the engine as its runtime, and its coroutines to :meth:`run` or :meth:`run_all`."""

    def __init__(self, schedule: Sequence[int] = (), seed: int | None = None) -> None:
        self._schedule = schedule
        self._random = None if seed is None else Random(seed)
        self._taken: list[int] = []
        self._choices: list[int] = []

    async def io(self, call: Callable[..., T], *args: object) -> T:
        await _Step()
        result = call(*args)
        await _Step()
        return result

    def queue(self) -> _SimQueue:
        return _SimQueue()

    def wall_ns(self) -> int:
        return 0

    async def pause(self) -> None:
        """Let others run; for scenarios."""
        await _Step()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run one operation alone and return its result."""
        result: T = self.run_all([coroutine]).result()[0]  # type: ignore[assignment]
        return result

    def run_all(self, coroutines: Sequence[Coroutine[Any, Any, object]]) -> Run:
        """Run operations together until all have ended.

        Raises: Deadlock when those that are left all wait.
        """
        self._taken, self._choices = [], []
        results: list[object] = [None] * len(coroutines)
        left = dict(enumerate(coroutines))
        queues: dict[int, _SimQueue] = {}
        try:
            for _ in range(MAX_STEPS):
                ready = [index for index in left if index not in queues or index not in queues[index].waiting]
                if not ready:
                    break
                index = ready[self._choose(len(ready))]
                queues.pop(index, None)
                try:
                    step = left[index].send(None)
                except StopIteration as stop:
                    results[index] = stop.value
                    del left[index]
                except Exception as error:
                    results[index] = error
                    del left[index]
                else:
                    if step.queue is not None:
                        step.queue.waiting.add(index)
                        queues[index] = step.queue
            if left:
                raise Deadlock(f"operations {sorted(left)} wait for ever; schedule {self._taken}")
        finally:
            for coroutine in left.values():
                coroutine.close()
        return Run(tuple(results), tuple(self._taken), tuple(self._choices))

    def _choose(self, count: int) -> int:
        if count == 1:
            return 0
        position = len(self._taken)
        if position < len(self._schedule):
            choice = self._schedule[position] % count
        else:
            choice = self._random.randrange(count) if self._random is not None else 0
        self._taken.append(choice)
        self._choices.append(count)
        return choice


Scenario = Callable[[SimRuntime], Sequence[Coroutine[Any, Any, object]]]


def replay(scenario: Scenario, schedule: Sequence[int]) -> Run:
    """Run *scenario* by one schedule, as a failure named it."""
    runtime = SimRuntime(schedule)
    return runtime.run_all(scenario(runtime))


def interleavings(scenario: Scenario, *, limit: int = 500, seed: int = 1) -> Iterator[Run]:
    """Yield the run of each schedule of *scenario*, which makes its operations anew each time.

    After *limit* schedules in order, *limit* more are drawn by *seed* if
    there are others left.  Check what the operations left between two runs.
    """
    schedule: list[int] = []
    for _ in range(limit):
        run = replay(scenario, schedule)
        yield run
        # The next in order: the last choice that has another option, one further.
        schedule = list(run.schedule)
        while schedule and schedule[-1] + 1 >= run.choices[len(schedule) - 1]:
            schedule.pop()
        if not schedule:
            return
        schedule[-1] += 1
    for number in range(limit):
        runtime = SimRuntime(seed=seed * 1_000_003 + number)
        yield runtime.run_all(scenario(runtime))


def preemptions(scenario: Scenario, *, limit: int = 500, seed: int = 1) -> Iterator[Run]:
    """Yield runs in which each operation goes on as long as it can, but for one or two interruptions.

    First every single one (at each step, in favour of each of two
    operations), then pairs of them, drawn by *seed*: *limit* runs at most.
    """
    lengths = []
    count = 0
    for first in (0, 1):
        step = 0
        while count < limit:
            # While both could go on the same one is chosen, then the other one for the rest.
            schedule = [first] * step + [1 - first] * _REST
            run = replay(scenario, schedule)
            count += 1
            yield run
            if len(run.schedule) <= step:
                break
            step += 1
        lengths.append(step)
    random = Random(seed)
    while count < limit:
        first = random.randrange(2)
        schedule = [first] * random.randrange(lengths[first] + 1)
        schedule += [1 - first] * random.randrange(1, lengths[1 - first] + 2)
        yield replay(scenario, schedule + [first] * _REST)
        count += 1
