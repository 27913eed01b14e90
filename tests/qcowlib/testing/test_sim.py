# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Schedules are complete, repeatable, and find races that locks cure."""

from __future__ import annotations

from collections.abc import Coroutine
from math import comb
from typing import Any

import pytest

from qcowlib.locks import Gate, RangeLock
from qcowlib.testing.sim import Deadlock, SimRuntime, interleavings, replay


def test_every_order_of_two_operations_is_tried_once() -> None:
    orders = []

    def scenario(runtime: SimRuntime) -> list[Coroutine[Any, Any, None]]:
        order: list[str] = []
        orders.append(order)

        async def work(name: str) -> None:
            for _ in range(3):
                await runtime.pause()
                order.append(name)

        return [work("a"), work("b")]

    runs = list(interleavings(scenario))
    # Four stretches each; the order of the first ones is not visible in what they append.
    assert len(runs) == len({run.schedule for run in runs}) == comb(8, 4)
    assert {"".join(order) for order in orders} == {
        "".join("a" if index in chosen else "b" for index in range(6)) for chosen in _triples()
    }


def _triples() -> list[set[int]]:
    return [{a, b, c} for a in range(6) for b in range(a + 1, 6) for c in range(b + 1, 6)]


def _lost_updates(locked: bool) -> int:
    lost = 0
    value = [0]

    def scenario(runtime: SimRuntime) -> list[Coroutine[Any, Any, None]]:
        value[0] = 0
        lock = RangeLock(runtime)

        async def add() -> None:
            claim = await lock.acquire(0, 1) if locked else None
            before = await runtime.io(lambda: value[0])
            await runtime.io(value.__setitem__, 0, before + 1)
            if claim is not None:
                lock.release(claim)

        return [add(), add()]

    for run in interleavings(scenario):
        run.result()
        lost += value[0] != 2
    return lost


def test_a_race_is_found_and_a_range_lock_cures_it() -> None:
    assert _lost_updates(False) > 10
    assert _lost_updates(True) == 0


def test_many_schedules_are_sampled_by_seed() -> None:
    def scenario(runtime: SimRuntime) -> list[Coroutine[Any, Any, None]]:
        async def work() -> None:
            for _ in range(10):
                await runtime.pause()

        return [work() for _ in range(4)]

    first = [run.schedule for run in interleavings(scenario, limit=20, seed=3)]
    assert len(first) == 40
    assert first == [run.schedule for run in interleavings(scenario, limit=20, seed=3)]
    assert first != [run.schedule for run in interleavings(scenario, limit=20, seed=4)]
    assert replay(scenario, first[-1]).schedule == first[-1]


def test_a_deadlock_names_its_schedule_and_exceptions_are_results() -> None:
    def stuck(runtime: SimRuntime) -> list[Coroutine[Any, Any, None]]:
        gate = Gate(runtime)

        async def both() -> None:
            await gate.enter()
            await gate.close()

        return [both()]

    with pytest.raises(Deadlock, match="schedule"):
        replay(stuck, [])

    def failing(runtime: SimRuntime) -> list[Coroutine[Any, Any, None]]:
        async def fail() -> None:
            await runtime.pause()
            raise ValueError("no")

        return [fail(), fail()]

    run = replay(failing, [])
    assert [type(result) for result in run.results] == [ValueError, ValueError]
    with pytest.raises(ValueError):
        run.result()


def test_a_closed_gate_holds_in_every_order() -> None:
    inside = [0]
    seen: list[int] = []

    def scenario(runtime: SimRuntime) -> list[Coroutine[Any, Any, None]]:
        gate = Gate(runtime)
        inside[0] = 0

        async def user() -> None:
            await gate.enter()
            inside[0] += 1
            await runtime.pause()
            inside[0] -= 1
            gate.leave()

        async def closer() -> None:
            await gate.close()
            await runtime.pause()
            seen.append(inside[0])
            gate.open()

        return [user(), user(), closer()]

    for run in interleavings(scenario, limit=2000):
        run.result()
    assert set(seen) == {0}
