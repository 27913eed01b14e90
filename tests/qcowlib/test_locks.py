# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Range locks and the gate under threads and under an event loop."""

from __future__ import annotations

import asyncio
import threading

import pytest

from qcowlib.locks import Gate, RangeLock
from qcowlib.runtime import AsyncioRuntime, SyncRuntime


def test_overlapping_ranges_are_served_in_order_of_arrival() -> None:
    async def main() -> list[str]:
        runtime = AsyncioRuntime(asyncio.get_running_loop())
        lock = RangeLock(runtime)
        order: list[str] = []

        async def work(name: str, start: int, end: int) -> None:
            claim = await lock.acquire(start, end)
            order.append(f"+{name}")
            await asyncio.sleep(0)
            order.append(f"-{name}")
            lock.release(claim)

        await asyncio.gather(work("a", 0, 10), work("b", 5, 20), work("c", 15, 30), work("d", 40, 50))
        assert not lock.busy
        return order

    order = asyncio.run(main())
    assert order[:2] == ["+a", "+d"]
    # c does not overlap a, but b, which came first, does overlap it.
    assert [step for step in order if step[1] != "d"] == ["+a", "-a", "+b", "-b", "+c", "-c"]


def test_try_acquire_does_not_pass_a_waiter() -> None:
    async def main() -> None:
        lock = RangeLock(AsyncioRuntime(asyncio.get_running_loop()))
        first = lock.try_acquire(0, 10)
        assert first is not None
        waiter = asyncio.ensure_future(lock.acquire(5, 15))
        await asyncio.sleep(0)
        assert lock.try_acquire(12, 13) is None
        assert lock.try_acquire(15, 20) is not None
        lock.release(first)
        lock.release(await waiter)

    asyncio.run(main())


def test_a_cancelled_waiter_blocks_nobody() -> None:
    async def main() -> None:
        lock = RangeLock(AsyncioRuntime(asyncio.get_running_loop()))
        first = await lock.acquire(0, 10)
        second = asyncio.ensure_future(lock.acquire(5, 15))
        third = asyncio.ensure_future(lock.acquire(12, 20))
        await asyncio.sleep(0)
        second.cancel()
        claim = await third
        lock.release(claim)
        lock.release(first)
        assert not lock.busy
        with pytest.raises(ValueError):
            lock.release(first)

    asyncio.run(main())


def test_threads_exclude_each_other() -> None:
    runtime = SyncRuntime()
    lock = RangeLock(runtime)
    inside: set[int] = set()
    clashes: list[int] = []

    def touch(start: int) -> None:
        # Runs with the engine unlocked, as I/O does.
        for block in (start, start + 1):
            if block in inside:
                clashes.append(block)
            inside.add(block)
        for block in (start, start + 1):
            inside.discard(block)

    async def work(start: int) -> None:
        claim = await lock.acquire(start, start + 2)
        try:
            await runtime.io(touch, start)
        finally:
            lock.release(claim)

    def run(seed: int) -> None:
        for index in range(200):
            runtime.run(work((index * seed) % 5))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (1, 2, 3, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clashes == []
    assert not lock.busy


def test_a_closing_gate_waits_for_pins_and_holds_newcomers() -> None:
    async def main() -> list[str]:
        gate = Gate(AsyncioRuntime(asyncio.get_running_loop()))
        events: list[str] = []
        assert gate.try_enter()
        await gate.enter()

        async def close() -> None:
            await gate.close()
            events.append(f"closed with {gate.pins}")
            await asyncio.sleep(0)
            gate.open()

        async def enter() -> None:
            await gate.enter()
            events.append("entered")
            gate.leave()

        tasks = [asyncio.ensure_future(work) for work in (close(), enter(), close())]
        await asyncio.sleep(0)
        assert gate.closed
        assert not gate.try_enter()
        gate.leave()
        await asyncio.sleep(0)
        assert events == []
        gate.leave()
        await asyncio.gather(*tasks)
        with pytest.raises(ValueError):
            gate.leave()
        return events

    events = asyncio.run(main())
    assert events[0] == "closed with 0"
    assert sorted(events) == ["closed with 0", "closed with 0", "entered"]


def test_a_cancelled_closer_opens_the_gate() -> None:
    async def main() -> None:
        gate = Gate(AsyncioRuntime(asyncio.get_running_loop()))
        await gate.enter()
        closer = asyncio.ensure_future(gate.close())
        await asyncio.sleep(0)
        closer.cancel()
        await asyncio.sleep(0)
        assert gate.try_enter()

    asyncio.run(main())
