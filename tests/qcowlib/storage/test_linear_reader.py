# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Segments that grow, windows with limits, and objects that only read."""

from __future__ import annotations

import errno
import io
import threading

import pytest

from qcowlib.errors import OutOfRange, ReadOnly, StorageError, UsageError
from qcowlib.storage.linear import LinearStorage, Segment
from qcowlib.storage.memory import MemoryStorage
from qcowlib.storage.reader import ReaderStorage
from qcowlib.storage.view import StorageView
from qcowlib.testing.conformance import pattern, read


def test_append_moves_no_existing_offset() -> None:
    first, second = MemoryStorage(1000), MemoryStorage(1000)
    storage = LinearStorage([Segment(first, 500, 100)])
    storage.write(0, [pattern(100)])
    storage.append([Segment(second, 0, 50), Segment(first, 0, 30)])
    storage.write(90, [pattern(90, 2)])
    assert storage.size == 180
    assert read(storage, 0, 180) == pattern(100)[:90] + pattern(90, 2)
    assert first.getvalue()[500:600] == pattern(100)[:90] + pattern(90, 2)[:10]
    assert first.getvalue()[:30] == pattern(90, 2)[60:]


def test_a_write_beyond_the_end_changes_nothing() -> None:
    below = MemoryStorage(100)
    storage = LinearStorage([Segment(below, 0, 60)])
    with pytest.raises(StorageError) as caught:
        storage.write(50, [b"x" * 20])
    assert caught.value.errno == errno.ENOSPC
    assert below.getvalue() == bytes(100)


def test_segments_and_windows_outside_are_refused() -> None:
    below = MemoryStorage(100)
    for offset, length in ((-1, 5), (96, 5), (0, -1), (101, 0)):
        with pytest.raises(OutOfRange):
            LinearStorage([Segment(below, offset, length)])
        with pytest.raises(OutOfRange):
            StorageView(below, offset, length)


def test_every_storage_is_flushed_and_the_first_failure_told() -> None:
    calls: list[str] = []

    class Failing(MemoryStorage):
        def flush(self) -> None:
            calls.append(self.name)
            if self.name != "good":
                raise StorageError(errno.EIO, path=self.name, operation="flush")

    parts = [Failing(10, name=name) for name in ("bad", "good", "worse")]
    storage = LinearStorage([Segment(part, half, 5) for half in (0, 5) for part in parts])
    with pytest.raises(StorageError, match=r"^bad: flush failed"):
        storage.flush()
    assert calls == ["bad", "good", "worse"]


class Positioned:
    def __init__(self, data: bytes, step: int) -> None:
        self.data, self.step, self.size = data, step, len(data)

    def pread(self, length: int, offset: int) -> bytes:
        return self.data[offset : offset + min(length, self.step)]


@pytest.mark.parametrize("step", [1, 7, 10000])
def test_positioned_objects_may_answer_short(step: int) -> None:
    storage = ReaderStorage(Positioned(pattern(500), step))
    assert (storage.size, storage.writable, storage.fd_map()) == (500, False, None)
    assert read(storage, 100, 600) == pattern(500)[100:] + bytes(200)
    assert [tuple(extent) for extent in storage.extents(400, 200)] == [("data", 400, 100), ("hole", 500, 100)]


def test_seeking_objects_are_used_by_one_thread_at_a_time() -> None:
    storage = ReaderStorage(io.BytesIO(pattern(100000)))
    wrong: list[int] = []

    def work(part: int) -> None:
        for offset in range(part, 99000, 997):
            if read(storage, offset, 333) != pattern(100000)[offset : offset + 333]:
                wrong.append(offset)

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_reader_refuses_changes() -> None:
    storage = ReaderStorage(io.BytesIO(b"abc"))
    for call in (
        lambda: storage.write(0, [b"x"]),
        lambda: storage.zero(0, 1),
        lambda: storage.discard(0, 1),
        lambda: storage.resize(1),
    ):
        with pytest.raises(ReadOnly):
            call()
    storage.flush()
    storage.close()


def test_objects_that_misbehave_become_errors_of_storage() -> None:
    class Long(Positioned):
        def pread(self, length: int, offset: int) -> bytes:
            return bytes(length + 1)

    class Broken(Positioned):
        def pread(self, length: int, offset: int) -> bytes:
            raise OSError(errno.EIO, "gone")

    class Blocking(io.BytesIO):
        def readinto(self, buffer: memoryview) -> None:  # type: ignore[override]
            return None

    for source in (Long(b"abc", 9), Broken(b"abc", 9), Blocking(b"abc")):
        with pytest.raises(StorageError):
            read(ReaderStorage(source), 0, 3)
    with pytest.raises(UsageError):
        ReaderStorage(object())  # type: ignore[arg-type]


def test_owned_sources_are_closed_once() -> None:
    source = io.BytesIO(b"abc")
    storage = ReaderStorage(source, owned=True)
    storage.close()
    storage.close()
    assert source.closed
