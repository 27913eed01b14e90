# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Operations side by side, in every order that their I/O allows (Invariant: I4, I6, I7).

A pair runs under :class:`~qcowlib.testing.sim.SimRuntime` with each single
interruption, in each order while there are few, in seeded ones beyond.  Each sector then reads as some order of
the two leaves it, readers see nothing that was never there, and the image is
clean: no leak, no reference too many.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, NamedTuple

import pytest

from qcowlib.chain import Chain
from qcowlib.opening import OpenOptions, open_chain
from qcowlib.qcow2.create import CreateOptions, create
from qcowlib.qcow2.snapshot import apply_snapshot, create_snapshot, delete_snapshot
from qcowlib.qcow2.write import Writer
from qcowlib.storage.memory import MemoryStorage
from qcowlib.testing.model import tagged
from qcowlib.testing.reference import RefImage, reference_check, reference_read
from qcowlib.testing.sim import Run, SimRuntime, interleavings, preemptions

LONG = int(os.environ.get("QCOWLIB_LONG", "1"))
LIMIT = 30 * LONG
pytestmark = pytest.mark.crash

CLUSTER = 512
SIZE = 128 * CLUSTER
#: One L2 table of 512-byte clusters covers 64 of them.
SPAN = 64 * CLUSTER

#: What a sector may hold: the versions written to it, 0 for zeros, -1 for the base.
ZEROS, BASE = 0, -1


class OneBase:
    """A policy for tests: every backing file is the given storage."""

    def __init__(self, storage: MemoryStorage) -> None:
        self.storage = storage

    def open(self, kind: str, name: str, owner: str, *, writable: bool, cache: str) -> MemoryStorage:
        return self.storage


class Step(NamedTuple):
    """One call: ``version`` marks what a write writes."""

    kind: str
    offset: int = 0
    length: int = 0
    version: int = 0


def write(first: int, count: int, version: int) -> Step:
    """Write sectors."""
    return Step("write", first * 512, count * 512, version)


class World:
    """An image in memory with its expected sectors; steps run on it one after the other or side by side."""

    def __init__(self, runtime: SimRuntime, options: CreateOptions, prepare: Sequence[Step]) -> None:
        self.runtime = runtime
        self.file = MemoryStorage()
        self.options = options
        create(self.file, options)
        self.base = b""
        if options.backing_file:
            self.base = b"".join(tagged(sector, 0xBA5E) for sector in range(options.size // 512))
        self.seen: list[tuple[Step, bytes]] = []
        self.chain = self.open()
        for step in prepare:
            if step.kind == "reopen":
                runtime.run(self.chain.top.finish())
                self.chain = self.open()
            else:
                runtime.run(self.step(step))

    def open(self) -> Chain:
        gate = OneBase(MemoryStorage(self.base))
        return open_chain(
            self.runtime,
            self.file,
            OpenOptions(writable=True, format="qcow2", references=gate),  # type: ignore[arg-type]
        )

    def data(self, step: Step) -> bytes:
        first = step.offset // 512
        return b"".join(tagged(sector, step.version) for sector in range(first, first + step.length // 512))

    async def step(self, step: Step) -> None:
        chain = self.chain
        writer = chain.writer
        assert isinstance(writer, Writer)
        if step.kind == "write":
            await chain.write(step.offset, memoryview(self.data(step)))
        elif step.kind == "compressed":
            await writer.write_compressed(step.offset, memoryview(self.data(step)))
        elif step.kind in ("zero", "keep"):
            await writer.zero(step.offset, step.length, unmap=step.kind == "zero")
        elif step.kind == "discard":
            await writer.discard(step.offset, step.length)
        elif step.kind == "flush":
            await chain.flush()
        elif step.kind == "snapshot":
            await create_snapshot(writer, f"s{step.version}")
        elif step.kind == "apply":
            await apply_snapshot(writer, f"s{step.version}", chain.refresh)
        elif step.kind == "delete":
            await delete_snapshot(writer, f"s{step.version}")
        elif step.kind == "resize":
            await chain.resize(step.length, preallocation="off", shrink=True)
        else:
            buffer = bytearray(step.length)
            await chain.read_into(step.offset, memoryview(buffer))
            self.seen.append((step, bytes(buffer)))

    async def steps(self, steps: Sequence[Step]) -> None:
        for step in steps:
            await self.step(step)

    def sector(self, number: int, version: int) -> bytes:
        if version == ZEROS:
            return bytes(512)
        return self.base[number * 512 :][:512] if version == BASE else tagged(number, version)


class Pair(NamedTuple):
    """Programs that run side by side on an image that ``prepare`` made."""

    prepare: list[Step]
    programs: list[list[Step]]
    options: dict[str, object] = {}  # noqa: RUF012


def effects(world: World, pair: Pair) -> list[set[int]]:
    """Which versions each sector may show at any time while the programs run, or after them."""
    start = BASE if world.base else ZEROS
    sectors = world.options.size // 512
    now = [{start} for _ in range(sectors)]
    saved: dict[int, list[set[int]]] = {}

    def play(step: Step, *, certain: bool) -> None:
        for sector in range(step.offset // 512, (step.offset + step.length) // 512):
            if step.kind in ("write", "compressed"):
                now[sector] = {step.version} if certain else now[sector] | {step.version}
            elif step.kind in ("zero", "keep", "discard"):
                now[sector] = {ZEROS} if certain and step.kind != "discard" else now[sector] | {ZEROS}
        if step.kind == "snapshot":
            saved[step.version] = [set(values) for values in now]
        elif step.kind == "apply":
            for sector, values in enumerate(saved[step.version]):
                now[sector] = set(values) if certain else now[sector] | values

    for step in pair.prepare:
        if step.kind != "resize":
            play(step, certain=True)
    for program in pair.programs:
        for step in program:
            if step.kind != "resize":
                play(step, certain=False)
    return now


def check(world: World, pair: Pair, run: Run) -> None:
    where = f"schedule {run.schedule}"
    run.result()
    allowed = effects(world, pair)
    for step, data in world.seen:
        compare(world, data, step.offset // 512, allowed, f"{step} in {where}")
    size = world.chain.size
    before = bytearray(size)
    world.runtime.run(world.chain.read_into(0, memoryview(before)))
    compare(world, bytes(before), 0, allowed, where)
    top = world.chain.top
    world.runtime.run(top.finish())
    writer = world.chain.writer
    assert isinstance(writer, Writer)
    assert not writer.ranges.busy and not writer.gate.closed and writer.gate.pins == 0, where
    assert world.chain.map.pinned == 0, where
    image = RefImage(world.file.getvalue())
    result = reference_check(image)
    assert (result.corruptions, result.leaks, result.dirty) == (0, 0, False), f"{result.messages[:3]} {where}"
    assert reference_read(image, backing=world.base) == bytes(before), where


def compare(world: World, data: bytes, first: int, allowed: list[set[int]], where: str) -> None:
    for number in range(len(data) // 512):
        found = data[number * 512 : number * 512 + 512]
        choices = allowed[first + number] if first + number < len(allowed) else {ZEROS}
        assert any(found == world.sector(first + number, version) for version in choices), (
            f"sector {first + number} shows {found[:16].hex()}, allowed {choices}: {where}"
        )


def explore(pair: Pair, *, limit: int = LIMIT, also: Callable[[World, Run], None] | None = None) -> int:
    """Run every order; returns how many."""
    worlds: list[World] = []
    options = CreateOptions(**{"size": SIZE, "cluster_size": CLUSTER, "refcount_bits": 16, **pair.options})  # type: ignore[arg-type]

    def scenario(runtime: SimRuntime) -> list[Coroutine[Any, Any, object]]:
        worlds[:] = [World(runtime, options, pair.prepare)]
        return [worlds[0].steps(program) for program in pair.programs]

    count = 0
    for run in itertools.chain(preemptions(scenario, limit=2 * limit), interleavings(scenario, limit=limit)):
        count += 1
        check(worlds[0], pair, run)
        if also is not None:
            also(worlds[0], run)
    return count


FULL = [write(0, 128, 1), Step("flush")]
#: Both tables on storage, none in memory.
COLD = [*FULL, Step("reopen")]
OVERLAY = {"backing_file": b"base", "backing_format": b"raw"}
EXTENDED = {"cluster_size": 16384, "extended_l2": True, "size": 1 << 20}
BIG = {"cluster_size": 4096, "size": 1 << 19}

PAIRS = {
    "write-write-same-new-cluster": Pair([], [[write(5, 1, 2)], [write(5, 1, 3)]]),
    "write-write-parts-of-a-cluster": Pair([], [[write(16, 3, 2)], [write(18, 4, 3)]], BIG),
    "write-write-over-a-base": Pair([], [[write(17, 2, 2)], [write(18, 3, 3)]], {**BIG, **OVERLAY}),
    "write-write-subclusters": Pair([], [[write(1, 2, 2)], [write(4, 9, 3)]], {**EXTENDED, **OVERLAY}),
    "write-write-cold-tables": Pair(COLD, [[write(62, 4, 2)], [write(63, 2, 3)]]),
    "write-discard": Pair(FULL, [[write(10, 6, 2)], [Step("discard", 8 * 512, 5 * 512)]]),
    "write-discard-flush": Pair(
        FULL, [[write(10, 6, 2), Step("flush")], [Step("discard", 8 * 512, 8 * 512), Step("flush")]]
    ),
    "write-flush": Pair([], [[write(3, 2, 2), write(70, 2, 4)], [Step("flush"), Step("flush")]]),
    "write-flush-lazy": Pair([], [[write(3, 2, 2), write(70, 2, 4)], [Step("flush")]], {"lazy_refcounts": True}),
    "write-snapshot": Pair(FULL, [[write(3, 2, 2), write(3, 2, 4)], [Step("snapshot", version=1)]]),
    "write-snapshot-apply": Pair(
        [*FULL, Step("snapshot", version=1), write(0, 9, 5)], [[write(3, 2, 2)], [Step("apply", version=1)]]
    ),
    "write-snapshot-delete": Pair(
        [*FULL, Step("snapshot", version=1), write(0, 9, 5)],
        [[write(3, 8, 2)], [Step("delete", version=1)]],
    ),
    "read-discard-reuse": Pair(
        FULL,
        [
            [Step("read", 0, SIZE)],
            [Step("discard", 0, SPAN), Step("flush"), Step("flush"), write(64, 64, 3)],
        ],
    ),
    "read-discard-reuse-cold": Pair(
        [write(0, 120, 1), Step("flush"), Step("reopen")],
        [
            [Step("read", 0, SIZE)],
            [Step("discard", 0, 32 * 512), Step("flush"), Step("flush"), write(120, 8, 3)],
        ],
    ),
    "read-apply-reuse": Pair(
        [*FULL, Step("snapshot", version=1), write(0, 40, 5), Step("flush")],
        [[Step("read", 0, 64 * 512)], [Step("apply", version=1), Step("flush"), write(80, 20, 7)]],
    ),
    "zero-write": Pair(FULL, [[Step("zero", 0, 8 * 512)], [write(4, 8, 2)]]),
    "zero-write-keep": Pair(FULL, [[Step("keep", 0, 8 * 512)], [write(4, 8, 2)]]),
    "zero-write-subclusters": Pair([write(0, 64, 1)], [[Step("zero", 2 * 512, 9 * 512)], [write(4, 20, 2)]], EXTENDED),
    "compressed-compressed": Pair([], [[Step("compressed", 0, 4096, 2)], [Step("compressed", 4096, 4096, 3)]], BIG),
    "compressed-write": Pair(
        [Step("compressed", 0, 4096, 2)], [[write(3, 2, 4)], [Step("compressed", 4096, 4096, 3)]], BIG
    ),
    "compressed-discard-flush": Pair(
        [Step("compressed", at * 4096, 4096, 2) for at in range(3)],
        [
            [Step("discard", 0, 3 * 4096), Step("flush"), Step("flush")],
            [Step("compressed", 5 * 4096, 4096, 3), Step("compressed", 6 * 4096, 4096, 3)],
        ],
        BIG,
    ),
    "flush-flush": Pair([write(0, 70, 1)], [[Step("flush")], [Step("flush")]]),
    "resize-write": Pair(FULL, [[write(3, 2, 2)], [Step("resize", 0, SIZE)]]),
    "resize-read": Pair(FULL, [[Step("read", 0, SIZE)], [Step("resize", 0, 4 * SIZE)]]),
}


@pytest.mark.parametrize("name", PAIRS)
def test_any_order_of_two_programs_reads_as_one_after_the_other(name: str) -> None:
    assert explore(PAIRS[name]) > 1


def random_program(rng: random.Random, versions: Iterator[int], sectors: int, unit: int) -> list[Step]:
    program = []
    for _ in range(rng.randint(1, 3)):
        kind = rng.choice(["write", "write", "write", "zero", "keep", "discard", "flush", "read", "snapshot", "resize"])
        first = rng.randrange(sectors)
        count = min(rng.choice([1, 3, unit, 2 * unit + 1, sectors // 2]), sectors - first)
        length = sectors * 512 if kind == "resize" else count * 512
        program.append(Step(kind, first * 512, length, next(versions)))
    return program


@pytest.mark.parametrize("seed", range(12 * LONG))
def test_three_random_programs_read_as_one_after_the_other(seed: int) -> None:
    rng = random.Random(seed)
    options: dict[str, object] = dict(rng.choice([{}, BIG, EXTENDED, {"lazy_refcounts": True}, {"version": 2}]))
    if rng.random() < 0.4:
        options |= OVERLAY
    size = options.get("size", SIZE)
    assert isinstance(size, int)
    sectors = size // 512
    kinds = ("snapshot", "resize") if options.get("version") == 2 else ()
    unit = {None: 1, 4096: 8, 16384: 32}[options.get("cluster_size")]  # type: ignore[index]
    versions = itertools.count(10)
    prepare = [step for step in random_program(rng, versions, sectors, unit) if step.kind != "snapshot"]
    prepare.append(Step(rng.choice(["flush", "reopen"])))
    programs = [
        [step for step in random_program(rng, versions, sectors, unit) if step.kind not in kinds] for _ in range(3)
    ]
    explore(Pair(prepare, programs, options), limit=LIMIT // 2)
