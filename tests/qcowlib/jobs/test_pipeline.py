# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The pipeline: order, errors, cancelling, memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from qcowlib.errors import Cancelled, UsageError
from qcowlib.jobs.pipeline import Control, Turn, run

MANY = 1 << 30


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_turns_come_in_the_order_of_the_units(workers: int) -> None:
    seen: list[int] = []

    def work(unit: int, buffer: memoryview, turn: Turn) -> int:
        with turn:
            seen.append(unit)
        return 1

    run(range(500), work, Control(workers=workers), buffer_size=4096, amount=MANY)
    assert seen == list(range(500))


def test_units_are_worked_on_side_by_side() -> None:
    meeting = threading.Barrier(3, timeout=60)

    def work(unit: int, buffer: memoryview, turn: Turn) -> int:
        meeting.wait()
        return 1

    run(range(3), work, Control(workers=3), buffer_size=4096, amount=MANY)
    assert meeting.broken is False


def test_each_worker_has_a_buffer_of_its_own() -> None:
    def work(unit: int, buffer: memoryview, turn: Turn) -> int:
        buffer[:8] = unit.to_bytes(8, "big")
        with turn:
            assert bytes(buffer[:8]) == unit.to_bytes(8, "big")
        return 1

    run(range(200), work, Control(workers=4), buffer_size=4096, amount=MANY)


def test_memory_limits_the_number_of_workers() -> None:
    running = most = 0
    lock = threading.Lock()

    def work(unit: int, buffer: memoryview, turn: Turn) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        with turn:
            pass
        with lock:
            running -= 1
        return 1

    run(range(300), work, Control(workers=8, memory=2 << 20), buffer_size=1 << 20, amount=MANY)
    assert 1 <= most <= 2


@pytest.mark.parametrize("workers", [1, 5])
def test_error_raised_in_the_earliest_turn_is_the_one_raised(workers: int) -> None:
    def work(unit: int, buffer: memoryview, turn: Turn) -> int:
        with turn:
            if unit >= 7:
                raise ValueError(unit)
        return 1

    with pytest.raises(ValueError, match=r"^7$"):
        run(range(100), work, Control(workers=workers), buffer_size=4096, amount=MANY)


@pytest.mark.parametrize("workers", [1, 5])
def test_error_of_the_source_ends_the_job(workers: int) -> None:
    def units() -> Iterator[int]:
        yield from range(10)
        raise KeyError("map")

    done: list[int] = []

    def work(unit: int, buffer: memoryview, turn: Turn) -> int:
        with turn:
            done.append(unit)
        return 1

    with pytest.raises(KeyError):
        run(units(), work, Control(workers=workers), buffer_size=4096, amount=MANY)
    assert done == sorted(done)


@pytest.mark.parametrize("workers", [1, 4])
def test_no_thread_outlives_a_cancelled_job(workers: int) -> None:
    event = threading.Event()

    def work(unit: int, buffer: memoryview, turn: Turn) -> int:
        if unit == 20:
            event.set()
        return 1

    before = threading.active_count()
    with pytest.raises(Cancelled):
        run(range(10**6), work, Control(workers=workers, cancel=event), buffer_size=4096, amount=MANY)
    assert threading.active_count() == before


def test_progress_counts_what_workers_report() -> None:
    seen: list[tuple[int, int]] = []
    control = Control(workers=1, progress=lambda done, total: seen.append((done, total)))
    control.begin(40)
    run(range(4), lambda unit, buffer, turn: 10, control, buffer_size=4096, amount=MANY)
    control.end()
    assert seen == [(0, 40), (10, 40), (20, 40), (30, 40), (40, 40), (40, 40)]


@pytest.mark.parametrize("options", [{"workers": 0}, {"workers": 17}, {"memory": -1}, {"rate": -1}], ids=str)
def test_values_outside_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        Control(**options)  # type: ignore[arg-type]
