# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Power cuts at every write of the engine: I1 to I8, and each rule's absence noticed.

Each workload runs on recording storages; every state a cut could leave is then
read and checked by the independent reference reader.  The mutants remove one
ordering rule each and must be caught.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from random import Random

import pytest

import qcowlib
from qcowlib.qcow2 import ordering
from qcowlib.qcow2.create import CreateOptions, create
from qcowlib.storage.memory import MemoryStorage
from qcowlib.testing.crash import CrashReport, assert_crash_safe, explore
from qcowlib.testing.model import GuestModel, tagged
from qcowlib.testing.recorder import OpLog, RecordingStorage

SEEDS = range(int(os.environ.get("QCOWLIB_LONG", "1")))
SIZE = 48 * 1024

Ranks = tuple[list[ordering.Write], list[ordering.Write], list[ordering.Write]]


class OneBase:
    """A policy for tests: every backing file is the given storage."""

    def __init__(self, storage: MemoryStorage) -> None:
        self.storage = storage

    def open(self, kind: str, name: str, owner: str, *, writable: bool, cache: str) -> MemoryStorage:
        return self.storage


class Session:
    """An image on recording storages, and the model of what its guest was promised."""

    def __init__(self, options: CreateOptions, *, base: bytes = b"", prepare: int = 0, seed: int = 1) -> None:
        self.rng = Random(seed)
        file, data = MemoryStorage(), MemoryStorage() if options.data_file else None
        create(file, options, data=data)
        self.base = MemoryStorage(base) if base else None
        self.log = OpLog()
        self.file: RecordingStorage = self.log.record(file)
        self.data = self.log.record(data) if data is not None else None
        self.model = GuestModel(options.size, self.log, base=base)
        self.image = self.open()
        for _ in range(prepare):
            self.write()
        self.flush()

    def open(self) -> qcowlib.Image:
        more = {} if self.base is None else {"references": OneBase(self.base)}
        return qcowlib.open(self.file, "r+", format="qcow2", data_file=self.data, **more)  # type: ignore[arg-type]

    def place(self, most: int) -> tuple[int, int]:
        sectors = self.model.size // 512
        first = self.rng.randrange(sectors)
        count = min(self.rng.randint(1, most), sectors - first)
        return first * 512, count * 512

    def write(self) -> None:
        offset, length = self.place(6)
        with self.model.write(offset, length) as data:
            self.image.pwrite(data, offset)

    def zero(self) -> None:
        offset, length = self.place(12)
        with self.model.zero(offset, length):
            self.image.zero(length, offset, unmap=self.rng.random() < 0.6)

    def discard(self) -> None:
        offset, length = self.place(16)
        with self.model.discard(offset, length):
            self.image.discard(length, offset)

    def flush(self) -> None:
        with self.model.flush():
            self.image.flush()

    def reopen(self) -> None:
        with self.model.flush():
            self.image.close()
        self.image = self.open()

    def compressed(self) -> None:
        """One whole cluster that is not allocated yet."""
        size = self.image.cluster_size
        assert size is not None
        for at in range(0, self.model.size - size + 1, size):
            if [e.kind for e in self.image.extents(at, size)] == ["hole"]:
                with self.model.write(at, size) as data:
                    self.image.write_compressed(data, at)
                return

    def many(self) -> None:
        """Pieces of whole clusters and of less, by one call."""
        size = self.image.cluster_size
        assert size is not None
        chosen = sorted(self.rng.sample(range(self.model.size // size), 4))
        with ExitStack() as stack:
            pieces = []
            for cluster in chosen:
                length = size if self.rng.random() < 0.8 else 512
                pieces.append((cluster * size, stack.enter_context(self.model.write(cluster * size, length))))
            self.image.pwrite_many(pieces)

    def run(self, steps: list[Callable[[], None]], count: int) -> None:
        for _ in range(count):
            self.rng.choice(steps)()
        with self.model.flush():
            self.image.close()


def options(**changes: object) -> CreateOptions:
    return CreateOptions(**{"size": SIZE, "cluster_size": 1024, "refcount_bits": 64, **changes})  # type: ignore[arg-type]


def base_content() -> bytes:
    return b"".join(tagged(sector, 0xBA5E) for sector in range(SIZE // 512))


def session(name: str, seed: int) -> Session:
    """Run the workload *name*."""
    if name == "allocate":
        s = Session(options(), seed=seed)
        s.run([s.write, s.write, s.flush], 30)
    elif name == "copy-on-write":
        s = Session(options(backing_file=b"base", backing_format=b"raw"), base=base_content(), seed=seed)
        s.run([s.write, s.write, s.flush, s.zero], 25)
    elif name == "discard-and-reuse":
        s = Session(options(size=24 * 1024), prepare=20, seed=seed)
        s.run([s.write, s.write, s.discard, s.zero, s.flush], 40)
    elif name == "refcount-growth":
        s = Session(options(size=256 * 1024, cluster_size=512), seed=seed)
        s.run([s.write] * 4 + [s.flush], 45)
    elif name == "lazy-refcounts":
        s = Session(options(lazy_refcounts=True), seed=seed)
        s.run([s.write, s.write, s.discard, s.flush], 30)
    elif name == "extended-l2":
        s = Session(options(size=256 * 1024, cluster_size=16384, extended_l2=True, refcount_bits=16), seed=seed)
        s.run([s.write, s.write, s.zero, s.flush], 16)
    elif name == "compressed":
        s = Session(options(cluster_size=4096, size=128 * 1024), seed=seed)
        s.run([s.compressed, s.compressed, s.write, s.flush], 30)
    elif name == "data-file":
        s = Session(options(data_file=b"data"), seed=seed)
        s.run([s.write, s.write, s.zero, s.flush], 20)
    elif name == "many":
        s = Session(options(backing_file=b"base", backing_format=b"raw"), base=base_content(), prepare=5, seed=seed)
        s.run([s.many, s.many, s.write, s.discard, s.flush], 16)
    elif name == "old-version":
        s = Session(options(version=2, refcount_bits=16), seed=seed)
        s.run([s.write, s.write, s.discard, s.flush], 30)
    else:
        s = Session(options(size=24 * 1024), prepare=10, seed=seed)
        s.run([s.write, s.write, s.discard, s.flush, s.reopen], 30)
    return s


WORKLOADS = [
    "allocate",
    "copy-on-write",
    "discard-and-reuse",
    "refcount-growth",
    "lazy-refcounts",
    "extended-l2",
    "compressed",
    "data-file",
    "many",
    "old-version",
    "reopen",
]


def check(name: str, seed: int) -> CrashReport:
    done = session(name, seed)
    return assert_crash_safe(done.log, done.model.oracle, seed=seed, random_states=6)


@pytest.mark.crash
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", WORKLOADS)
def test_every_cut_keeps_what_was_flushed_and_check_finds_leaks_at_most(name: str, seed: int) -> None:
    report = check(name, seed)
    print(f"{name}: {report.distinct} states")
    assert report.distinct > 20


def no_first_barrier(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries may reach storage before the data they point at."""

    async def send(self: ordering.Writeback, cut: ordering._Cut) -> None:
        for rank in cut.ranks:
            await self._write_all(rank)
        await self.barrier()

    monkeypatch.setattr(ordering.Writeback, "_send", send)


def release_before_publish(monkeypatch: pytest.MonkeyPatch) -> None:
    """Freed space is reused before its unmapping is durable."""
    collect = ordering.Writeback._collect

    async def commit(self: ordering.Writeback, *, final: bool = False, quiet: bool = False) -> None:
        self.check()
        for freed in (self.freed, self.unmapped):
            await self._release(freed)
            freed.clear()
        await self._send(collect(self, final))
        self.cmap.written()
        self.refs.written()

    monkeypatch.setattr(ordering.Writeback, "commit", commit)


def no_grow_barrier(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refcount structures may come after what they count."""

    async def send(self: ordering.Writeback, cut: ordering._Cut) -> None:
        prepare, grow, publish = cut.ranks
        await self._write_all(prepare)
        await self.barrier()
        await self._write_all(grow + publish)
        await self.barrier()

    monkeypatch.setattr(ordering.Writeback, "_send", send)


def no_last_barrier(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush returns although nothing makes the mapping durable."""

    async def send(self: ordering.Writeback, cut: ordering._Cut) -> None:
        prepare, grow, publish = cut.ranks
        await self._write_all(prepare)
        await self.barrier()
        await self._write_all(grow)
        await self._write_all(publish)

    monkeypatch.setattr(ordering.Writeback, "_send", send)


def counts_with_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refcounts travel together with the entries they count."""
    collect = ordering.Writeback._collect_refcounts

    def mixed(self: ordering.Writeback, ranks: Ranks, undo: list[Callable[[], None]]) -> None:
        own: Ranks = ([], [], [])
        collect(self, own, undo)
        ranks[ordering.PUBLISH].extend(own[0] + own[1] + own[2])

    monkeypatch.setattr(ordering.Writeback, "_collect_refcounts", mixed)


def no_dirty_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refcounts are postponed, and nothing on storage says so."""

    async def nothing(self: ordering.Writeback) -> None:
        return

    monkeypatch.setattr(ordering.Writeback, "set_dirty", nothing)


@pytest.mark.parametrize(
    ("mutant", "name"),
    [
        (no_first_barrier, "allocate"),
        (release_before_publish, "discard-and-reuse"),
        (no_grow_barrier, "refcount-growth"),
        (no_last_barrier, "allocate"),
        (counts_with_entries, "allocate"),
        (no_dirty_bit, "lazy-refcounts"),
    ],
)
def test_a_rule_removed_is_noticed(
    monkeypatch: pytest.MonkeyPatch, mutant: Callable[[pytest.MonkeyPatch], None], name: str
) -> None:
    mutant(monkeypatch)
    caught = 0
    for seed in range(6):
        done = session(name, seed)
        report = explore(done.log, done.model.oracle, seed=seed, random_states=6, stop_after=3)
        caught += sum(count for verdict, count in report.verdicts.items() if verdict != "LEAK")
        if caught:
            break
    assert caught, f"{mutant.__name__} went unnoticed"


@pytest.mark.parametrize("seed", SEEDS)
def test_write_through_makes_each_write_durable_before_it_returns(seed: int) -> None:
    file = MemoryStorage()
    create(file, options())
    log = OpLog()
    recorded = log.record(file)
    model = GuestModel(SIZE, log)
    rng = Random(seed)
    image = qcowlib.open(recorded, "r+", format="qcow2", cache="writethrough")
    for _ in range(12):
        first = rng.randrange(SIZE // 512 - 4)
        with model.write(first * 512, 2048) as data:
            image.pwrite(data, first * 512)
        # Nothing is asked of the image: the promise was made when the write returned.
        with model.flush():
            pass
    image.close()
    assert_crash_safe(log, model.oracle, seed=seed, random_states=6)
