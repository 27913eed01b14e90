# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Faults happen where the plan says, in the way it says, and nowhere else."""

from __future__ import annotations

import errno

import pytest

from qcowlib.errors import StorageError
from qcowlib.storage.memory import MemoryStorage
from qcowlib.testing.conformance import StorageContract, read
from qcowlib.testing.faults import Fault, FaultPlan, FaultStorage, every_fault
from qcowlib.testing.recorder import OpLog

DATA = b"".join(bytes([sector + 1]) * 512 for sector in range(4))


def _after(fault: Fault) -> bytes:
    storage = FaultStorage(MemoryStorage(2048), FaultPlan([fault]))
    if fault.way == "lie":
        storage.write(0, [DATA])
    else:
        with pytest.raises(StorageError) as caught:
            storage.write(0, [DATA])
        assert caught.value.errno == fault.code
    return read(storage, 0, 2048)


def test_each_way_leaves_what_it_promises() -> None:
    assert _after(Fault("write")) == bytes(2048)
    assert _after(Fault("write", way="late", code=errno.ENOSPC)) == DATA
    assert _after(Fault("write", way="short")) == DATA[:1024] + bytes(1024)
    assert _after(Fault("write", way="torn")) == DATA[:512] + bytes(512) + DATA[1024:1536] + bytes(512)
    assert _after(Fault("write", way="lie")) == bytes(2048)


def test_calls_are_counted_by_operation_and_place() -> None:
    plan = FaultPlan([Fault("write", nth=2, offset=1024, length=512)])
    storage = FaultStorage(MemoryStorage(2048), plan)
    storage.write(0, [DATA[:1024]])
    storage.write(512, [DATA[:1024]])
    storage.read_into(1024, [bytearray(512)])
    with pytest.raises(StorageError):
        storage.write(1024, [b"x"])
    storage.write(1024, [b"x"])
    assert plan.played == ["call 4: write 1024+1: error 5"]


def test_a_fault_may_last_for_ever_and_changes_exclude_reads() -> None:
    storage = FaultStorage(MemoryStorage(2048), FaultPlan([Fault("change", nth=2, forever=True, code=errno.ENOSPC)]))
    storage.zero(0, 512)
    for call in (
        lambda: storage.write(0, [b"x"]),
        storage.flush,
        lambda: storage.resize(9),
        lambda: storage.zero(0, 9),
    ):
        with pytest.raises(StorageError) as caught:
            call()
        assert caught.value.errno == errno.ENOSPC
    with pytest.raises(StorageError):
        storage.discard(0, 9)
    assert read(storage, 0, 512) == bytes(512)


def test_a_lying_flush_is_no_barrier_in_the_log() -> None:
    log = OpLog()
    storage = FaultStorage(log.record(MemoryStorage(512)), FaultPlan([Fault("flush", way="lie")]))
    storage.flush()
    assert log.ops == []
    storage.flush()
    assert [op.kind for op in log.ops] == ["flush"]


def test_a_torn_write_is_logged_as_it_happened() -> None:
    log = OpLog()
    storage = FaultStorage(log.record(MemoryStorage(2048)), FaultPlan([Fault("write", way="torn")]))
    with pytest.raises(StorageError):
        storage.write(0, [DATA])
    assert [(op.offset, op.length) for op in log.ops] == [(0, 512), (1024, 512)]


def test_every_fault_plays_each_call_once() -> None:
    def run(plan: FaultPlan) -> int:
        storage = FaultStorage(MemoryStorage(2048), plan)
        try:
            storage.write(0, [DATA])
            storage.flush()
            read(storage, 0, 10)
        except StorageError:
            pass
        return plan.calls

    calls = run(FaultPlan())
    plans = list(every_fault(calls))
    for plan in plans:
        run(plan)
        assert len(plan.played) == 1
    assert len(plans) == 3 * 2 * 3


@pytest.mark.parametrize(
    ("fault", "test"),
    [
        (Fault("write", way="lie"), StorageContract.test_written_bytes_read_back_at_any_alignment),
        (Fault("zero", way="lie"), StorageContract.test_zero_makes_exactly_the_range_zero),
        (Fault("resize", way="lie"), StorageContract.test_resize_gives_zeros_even_where_data_was),
        (Fault("write", nth=30, way="lie"), StorageContract.test_parallel_writers_do_not_disturb_each_other),
    ],
)
def test_the_contract_catches_a_storage_that_lies(fault: Fault, test: object) -> None:
    class Lying(StorageContract):
        def make(self, size: int) -> FaultStorage:
            return FaultStorage(MemoryStorage(size), FaultPlan([fault]))

    with pytest.raises(AssertionError):
        test(Lying())  # type: ignore[operator]
