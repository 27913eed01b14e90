# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""One failed call of the storage at a time (promise L5).

Each workload runs once without faults to count its calls, then once for each
call and each way to fail.  The request that met the fault raises StorageError
and nothing else ever does; what was durable stays; after a failed barrier
nothing is written over what is reachable; without one the image goes on, and
the same request succeeds later.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from contextlib import ExitStack

import pytest

import qcowlib
from qcowlib.errors import StorageError
from qcowlib.qcow2.create import CreateOptions, create
from qcowlib.storage.memory import MemoryStorage
from qcowlib.testing.faults import Fault, FaultPlan, FaultStorage
from qcowlib.testing.model import GuestModel, tagged
from qcowlib.testing.recorder import OpLog
from qcowlib.testing.reference import RefImage, reference_check, reference_read

pytestmark = pytest.mark.crash

LONG = int(os.environ.get("QCOWLIB_LONG", "1"))
SIZE = 96 * 1024
SECTORS = SIZE // 512


class OneBase:
    """A policy for tests: every backing file is the given storage."""

    def __init__(self, storage: MemoryStorage) -> None:
        self.storage = storage

    def open(self, kind: str, name: str, owner: str, *, writable: bool, cache: str) -> MemoryStorage:
        return self.storage


class Session:
    """An image whose file fails as *plan* says, and the model of its guest; a step may raise StorageError."""

    def __init__(self, options: CreateOptions, plan: FaultPlan, seed: int) -> None:
        self.rng = random.Random(seed)
        self.options = options
        self.base = b"".join(tagged(n, 0xBA5E) for n in range(SECTORS)) if options.backing_file else b""
        self.file = MemoryStorage()
        self.data = MemoryStorage() if options.data_file else None
        create(self.file, options, data=self.data)
        self.log = OpLog()
        self.model = GuestModel(SIZE, self.log, base=self.base)
        self.recorded = self.log.record(self.file)
        recorded_data = None if self.data is None else self.log.record(self.data)
        self.faulty = FaultStorage(self.recorded, plan)
        self.faulty_data = None if recorded_data is None else FaultStorage(recorded_data, plan)
        self.plan = plan
        self.errors: list[BaseException] = []
        self.snapshots: list[str] = []
        #: Closing failed: counts may be too high.
        self.unclean = False
        self.image = self.open()

    def open(self) -> qcowlib.Image:
        return qcowlib.open(
            self.faulty,  # type: ignore[arg-type]
            "r+",
            format="qcow2",
            data_file=self.faulty_data,  # type: ignore[arg-type]
            references=OneBase(MemoryStorage(self.base)),  # type: ignore[arg-type]
        )

    def place(self, most: int) -> tuple[int, int]:
        first = self.rng.randrange(SECTORS)
        return first * 512, min(self.rng.randint(1, most), SECTORS - first) * 512

    def write(self) -> None:
        offset, length = self.place(9)
        with self.model.write(offset, length) as data:
            self.image.pwrite(data, offset)

    def zero(self) -> None:
        offset, length = self.place(20)
        unmap = self.rng.random() < 0.6
        with self.model.zero(offset, length):
            self.image.zero(length, offset, unmap=unmap)

    def discard(self) -> None:
        offset, length = self.place(40)
        with self.model.discard(offset, length):
            self.image.discard(length, offset)

    def flush(self) -> None:
        with self.model.flush():
            self.image.flush()

    def snapshot(self) -> None:
        name = f"s{self.rng.random()}"
        with self.model.snapshot(name):
            self.image.create_snapshot(name)
        self.snapshots.append(name)

    def revert(self) -> None:
        if self.snapshots:
            name = self.rng.choice(self.snapshots)
            with self.model.revert(name):
                self.image.apply_snapshot(name)

    def delete(self) -> None:
        if self.snapshots:
            name = self.snapshots.pop(0)
            with self.model.delete(name):
                self.image.delete_snapshot(name)

    def compressed(self) -> None:
        size = self.image.cluster_size
        assert size is not None
        for at in range(0, SIZE - size + 1, size):
            if [extent.kind for extent in self.image.extents(at, size)] == ["hole"]:
                with self.model.write(at, size) as data:
                    self.image.write_compressed(data, at)
                return

    def grow(self) -> None:
        """Larger, then back: the guest keeps to its sectors."""
        with self.model.flush():
            self.image.resize(SIZE * 3)
        with self.model.flush():
            self.image.resize(SIZE, shrink=True)

    def many(self) -> None:
        """Pieces of whole clusters and of less, by one call."""
        size = self.image.cluster_size
        assert size is not None
        chosen = sorted(self.rng.sample(range(SIZE // size), 4))
        with ExitStack() as stack:
            pieces = []
            for cluster in chosen:
                length = size if self.rng.random() < 0.8 else 512
                pieces.append((cluster * size, stack.enter_context(self.model.write(cluster * size, length))))
            self.image.pwrite_many(pieces)

    def run(self, steps: list[Callable[[], None]], count: int) -> None:
        """Every step is tried, whatever became of those before."""
        for step in (self.rng.choice(steps) for _ in range(count)):
            try:
                step()
            except StorageError as error:
                self.errors.append(error)

    def close(self) -> None:
        try:
            with self.model.flush():
                self.image.close()
        except StorageError as error:
            self.errors.append(error)
            self.unclean = True


def options(**changes: object) -> CreateOptions:
    return CreateOptions(**{"size": SIZE, "cluster_size": 1024, "refcount_bits": 16, **changes})  # type: ignore[arg-type]


Make = Callable[[FaultPlan, int], Session]


def played(name: str, plan: FaultPlan, seed: int) -> Session:
    """Run workload *name* to its end, close included."""
    changes, kinds, count = WORKLOADS[name]
    session = Session(options(**changes), plan, seed)
    session.run([getattr(session, kind) for kind in kinds.split()], count)
    session.close()
    return session


WORKLOADS: dict[str, tuple[dict[str, object], str, int]] = {
    "allocate": ({}, "write write write flush", 10),
    "small-clusters": ({"cluster_size": 512, "refcount_bits": 64}, "write write write flush", 14),
    "overlay": ({"backing_file": b"b", "backing_format": b"raw"}, "write zero discard flush", 12),
    "discard": ({"size": SIZE}, "write write write discard zero flush", 16),
    "lazy": ({"lazy_refcounts": True}, "write write discard flush", 12),
    "extended": ({"cluster_size": 16384, "extended_l2": True}, "write write zero discard flush", 10),
    "compressed": ({"cluster_size": 4096}, "compressed compressed write discard flush", 12),
    "many": ({}, "many many discard snapshot flush", 8),
    "data-file": ({"data_file": b"d"}, "write zero discard flush", 10),
    "snapshots": ({}, "write write snapshot revert delete flush", 9),
    "resize": ({}, "write write grow flush", 7),
    "old": ({"version": 2}, "write write discard snapshot delete flush", 10),
}


def barrier_failed(session: Session) -> bool:
    return any(": flush " in line for line in session.plan.played)


def judge(session: Session, where: str) -> None:
    """Nothing durable lost, nothing foreign, at most leaks; with the dirty bit counts may be stale."""
    image = RefImage(session.file.getvalue(), None if session.data is None else session.data.getvalue())
    result = reference_check(image)
    if not result.dirty:
        excused = result.stale if barrier_failed(session) or session.unclean else 0
        assert result.corruptions == excused, f"{result.messages[:4]} {where}"
    content = reference_read(image, backing=session.base)[:SIZE]
    position = session.log.position
    if not barrier_failed(session) and not session.unclean:
        assert (result.leaks, result.dirty) == (0, False), f"{result.messages[:4]} {where}"
    findings = [*session.model.judge(content, position)]
    findings += session.model.judge_snapshots(image, position, session.base)
    # A snapshot whose creation or deletion failed may be there or not; its content must be right.
    findings = [f for f in findings if not (f.verdict == "SNAPSHOT" and f.detail.endswith("exists"))]
    assert not findings, f"{findings} {where}"


def usable(session: Session, where: str) -> None:
    """The file opens again, takes writes and ends clean; storage works."""
    session.plan.faults = ()
    image = session.open()
    content = image.pread(SIZE, 0)
    fresh = tagged(3, 0xFFFF)
    image.pwrite(fresh, 3 * 512)
    image.flush()
    assert image.pread(SIZE, 0) == content[: 3 * 512] + fresh + content[4 * 512 :], where
    image.close()


CODES = {"error": errno.EIO, "late": errno.EIO, "short": errno.ENOSPC, "torn": errno.EIO}


@pytest.mark.parametrize("seed", range(LONG))
@pytest.mark.parametrize("name", WORKLOADS)
def test_each_failing_call_costs_one_request_and_nothing_durable(name: str, seed: int) -> None:
    whole = played(name, FaultPlan(), seed)
    assert not whole.errors
    calls = whole.plan.calls
    rng = random.Random(seed)
    injected = 0
    for nth in range(1, calls + 1):
        for way in ("error", rng.choice(["late", "short", "torn"])):
            plan = FaultPlan([Fault(nth=nth, code=CODES[way], way=way)])  # type: ignore[arg-type]
            where = f"(seed {seed}, call {nth} of {calls}, {way})"
            try:
                session = played(name, plan, seed)
            except StorageError:
                # The first opening failed.
                assert nth < 10, where
                continue
            injected += 1
            where += f" {plan.played}"
            judge(session, where)
            usable(session, where)
    print(f"{name}: {injected} faults")
    assert injected > calls


@pytest.mark.parametrize("way", ["error", "late"])
def test_a_failed_shrink_keeps_the_size_for_good(way: str) -> None:
    plan = FaultPlan()
    session = Session(options(size=SIZE), plan, 1)
    session.image.pwrite(tagged(SECTORS - 1, 7), SIZE - 512)
    session.image.flush()
    plan.faults = (Fault("write", 1, way=way, offset=24, length=8),)  # type: ignore[arg-type]
    plan._seen = [0]
    with pytest.raises(StorageError):
        session.image.resize(SIZE // 2, shrink=True)
    assert session.image.size == SIZE
    session.image.flush()
    session.image.close()
    with session.open() as image:
        assert image.size == SIZE
        assert image.pread(512, SIZE - 512) == tagged(SECTORS - 1, 7)


def test_nothing_is_written_after_a_failed_barrier() -> None:
    plan = FaultPlan()
    session = Session(options(), plan, 1)
    session.write()
    plan.faults = (Fault("flush", 1),)
    plan._seen = [0]
    with pytest.raises(StorageError):
        session.image.flush()
    before = session.file.getvalue()
    content = session.image.pread(SIZE, 0)
    for request in (session.write, session.zero, session.flush, session.snapshot, session.grow, session.compressed):
        with pytest.raises(StorageError):
            request()
    assert session.image.pread(SIZE, 0) == content
    with pytest.raises(StorageError):
        session.image.close()
    assert session.file.getvalue() == before


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_full_disk_stops_writes_and_nothing_else(name: str) -> None:
    """Reads go on, requests fail with ENOSPC; with space again the same requests succeed and the image is clean."""
    changes, kinds, count = WORKLOADS[name]
    whole = played(name, FaultPlan(), 3)
    grown = len(whole.file.getvalue())
    session = Session(options(**changes), FaultPlan(), 3)
    start = session.file.size
    for part in (0.1, 0.4, 0.7):
        session.file._limit = start + int((grown - start) * part)
        session.run([getattr(session, kind) for kind in kinds.split()], count)
        content = session.image.pread(SIZE, 0)
        assert all(isinstance(error, StorageError) and error.errno == errno.ENOSPC for error in session.errors)
        assert not session.model.judge(content, session.log.position)
        session.file._limit = 1 << 40
        with session.model.flush():
            session.image.flush()
        session.run([getattr(session, kind) for kind in kinds.split()], 2)
    session.unclean = False
    session.close()
    assert not session.unclean
    judge(session, name)
    usable(session, name)
