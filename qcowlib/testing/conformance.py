# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The suite that every storage passes.

Inherit :class:`StorageContract` in a test class, and give ``make`` (and, where
they differ, ``growable``, ``sparse``); pytest collects the inherited tests.

Invariant: each test states one sentence of :class:`qcowlib.storage.base.Storage`
and uses nothing but that protocol.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from qcowlib.errors import OutOfRange, ReadOnly, StorageError
from qcowlib.storage.base import Storage

__all__ = ["StorageContract", "pattern", "read"]

SIZE = 64 << 10


def pattern(length: int, seed: int = 1) -> bytes:
    """Return *length* bytes without zeros, different at each 509-byte step and for each *seed*."""
    block = bytes((index * 7 + seed * 31) % 255 + 1 for index in range(509))
    return b"".join(bytes((b + step) % 255 + 1 for b in block) for step in range(length // 509 + 1))[:length]


def read(storage: Storage, offset: int, length: int) -> bytes:
    """Return *length* bytes at *offset*."""
    buffer = bytearray(length)
    storage.read_into(offset, [buffer])
    return bytes(buffer)


@contextmanager
def _raises(*kinds: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kinds:
        return
    raise AssertionError(f"expected one of {kinds}")


def _check(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)


class StorageContract:
    """Tests of one kind of storage; override :meth:`make`."""

    #: Whether writes past the end, and ``resize``, change the size.
    growable = True

    def make(self, size: int) -> Storage:
        """Return a new writable storage of *size* bytes (a multiple of 4096), all zero."""
        raise NotImplementedError

    def make_readonly(self) -> Storage | None:
        """Return a storage of 64 KiB that refuses changes, or ``None`` if there is no such thing."""
        return None

    def test_size_is_as_made(self) -> None:
        storage = self.make(SIZE)
        _check(storage.size == SIZE, "size")
        _check(storage.writable, "writable")
        _check(bool(storage.name), "a storage has a name")
        storage.close()

    def test_alignments_are_powers_of_two(self) -> None:
        storage = self.make(SIZE)
        for unit in storage.align:
            _check(unit > 0 and unit & (unit - 1) == 0, f"alignment {unit}")
        storage.close()

    def test_fresh_storage_reads_as_zeros(self) -> None:
        storage = self.make(SIZE)
        _check(read(storage, 0, SIZE) == bytes(SIZE), "zeros")
        storage.close()

    def test_written_bytes_read_back_at_any_alignment(self) -> None:
        storage = self.make(SIZE)
        image = bytearray(SIZE)
        spans = ((0, 1), (511, 2), (512, 512), (4095, 4098), (1000, 30000), (8192, 8192), (SIZE - 1, 1), (3, 4093))
        for seed, (offset, length) in enumerate(spans):
            data = pattern(length, seed)
            storage.write(offset, [data])
            image[offset : offset + length] = data
            _check(read(storage, 0, SIZE) == image, f"after {length} bytes at {offset}")
        _check(read(storage, 4097, 12345) == image[4097 : 4097 + 12345], "unaligned read")
        storage.close()

    def test_vectors_are_gathered_and_scattered_in_order(self) -> None:
        storage = self.make(SIZE)
        data = pattern(12000)
        storage.write(100, [data[:1], b"", data[1:700], memoryview(data)[700:]])
        parts = [bytearray(3), bytearray(0), bytearray(4093), bytearray(7904)]
        storage.read_into(100, parts)
        _check(b"".join(parts) == data, "vector")
        storage.close()

    def test_many_buffers_make_one_transfer(self) -> None:
        storage = self.make(SIZE)
        data = pattern(3000)
        storage.write(7, [data[i : i + 1] for i in range(3000)])
        parts = [bytearray(1) for _ in range(3000)]
        storage.read_into(7, parts)
        _check(b"".join(parts) == data, "3000 buffers")
        storage.close()

    def test_typed_buffers_count_in_bytes(self) -> None:
        storage = self.make(SIZE)
        storage.write(8, [memoryview(pattern(64)).cast("Q")])
        target = memoryview(bytearray(64)).cast("I")
        storage.read_into(8, [target])
        _check(target.tobytes() == pattern(64), "typed")
        storage.close()

    def test_empty_transfers_do_nothing(self) -> None:
        storage = self.make(SIZE)
        storage.write(5, [])
        storage.write(5, [b""])
        storage.read_into(5, [])
        storage.zero(5, 0)
        storage.discard(5, 0)
        _check(storage.size == SIZE, "size")
        storage.close()

    def test_reading_past_the_end_gives_zeros(self) -> None:
        storage = self.make(SIZE)
        storage.write(SIZE - 10, [pattern(10)])
        buffer = bytearray(b"x" * 5000)
        storage.read_into(SIZE - 10, [buffer])
        _check(bytes(buffer) == pattern(10) + bytes(4990), "tail")
        buffer = bytearray(b"x" * 5000)
        storage.read_into(SIZE + 12345, [buffer])
        _check(bytes(buffer) == bytes(5000), "behind")
        storage.close()

    def test_zero_makes_exactly_the_range_zero(self) -> None:
        for allocate in (False, True):
            storage = self.make(SIZE)
            image = bytearray(pattern(SIZE))
            storage.write(0, [image])
            for offset, length in ((0, 4096), (5000, 1), (8191, 8194), (SIZE - 700, 700)):
                storage.zero(offset, length, allocate=allocate)
                image[offset : offset + length] = bytes(length)
                _check(read(storage, 0, SIZE) == image, f"zero {length} at {offset}")
            _check(storage.size == SIZE, "size")
            storage.close()

    def test_discard_touches_nothing_outside_the_range(self) -> None:
        storage = self.make(SIZE)
        image = pattern(SIZE)
        storage.write(0, [image])
        storage.discard(5000, 20000)
        storage.discard(SIZE - 100, 100000)
        _check(read(storage, 0, 5000) == image[:5000], "before")
        _check(read(storage, 25000, SIZE - 25100) == image[25000:-100], "behind")
        _check(storage.size == SIZE, "size")
        storage.close()

    def test_extents_cover_the_range_exactly_and_data_is_never_called_a_hole(self) -> None:
        storage = self.make(SIZE)
        storage.write(20000, [pattern(3000)])
        for offset, length in ((0, SIZE), (1, 20000), (20500, 10), (100, 0), (SIZE - 5, 50), (SIZE + 5, 50)):
            position = offset
            for kind, start, count in storage.extents(offset, length):
                _check(start == position and count > 0, f"gap at {position}")
                _check(kind in ("data", "zero", "hole"), kind)
                if kind != "data":
                    _check(read(storage, start, count) == bytes(count), f"{kind} with data")
                position = start + count
            _check(position == offset + length, "cover")
        storage.close()

    def test_flush_succeeds_and_keeps_data(self) -> None:
        storage = self.make(SIZE)
        storage.write(1, [pattern(5000)])
        storage.flush()
        storage.flush()
        _check(read(storage, 1, 5000) == pattern(5000), "data")
        storage.close()

    def test_writing_past_the_end_grows_or_fails_without_a_trace(self) -> None:
        storage = self.make(SIZE)
        data = pattern(5001)
        if self.growable:
            storage.write(SIZE + 777, [data])
            _check(storage.size == SIZE + 777 + 5001, f"grown to {storage.size}")
            _check(read(storage, SIZE, 777) == bytes(777), "gap")
            _check(read(storage, SIZE + 777, 5001) == data, "data")
        else:
            with _raises(StorageError):
                storage.write(SIZE + 4096, [data])
            _check(storage.size == SIZE, "size")
        storage.close()

    def test_zero_past_the_end_grows_or_fails(self) -> None:
        for allocate in (False, True):
            storage = self.make(SIZE)
            storage.write(SIZE - 4, [b"abcd"])
            if self.growable:
                storage.zero(SIZE - 2, 9001, allocate=allocate)
                _check(storage.size == SIZE + 8999, f"grown to {storage.size}")
                _check(read(storage, SIZE - 4, 9003) == b"ab" + bytes(9001), "zeros")
            else:
                with _raises(StorageError):
                    storage.zero(SIZE - 2, 9001, allocate=allocate)
            storage.close()

    def test_resize_gives_zeros_even_where_data_was(self) -> None:
        storage = self.make(SIZE)
        storage.write(0, [pattern(SIZE)])
        if self.growable:
            storage.resize(5000)
            _check(storage.size == 5000, "shrunk")
            storage.resize(SIZE)
            _check(storage.size == SIZE, "grown")
            _check(read(storage, 0, SIZE) == pattern(SIZE)[:5000] + bytes(SIZE - 5000), "zeros")
        else:
            storage.resize(SIZE)
            with _raises(StorageError):
                storage.resize(SIZE + 4096)
        storage.close()

    def test_impossible_ranges_are_refused(self) -> None:
        storage = self.make(SIZE)
        for offset in (-1, -(1 << 63)):
            with _raises(OutOfRange):
                storage.read_into(offset, [bytearray(1)])
            with _raises(OutOfRange):
                storage.write(offset, [b"x"])
            with _raises(OutOfRange):
                storage.zero(offset, 1)
        for call in (storage.write, storage.read_into):
            with _raises(OutOfRange, StorageError):
                call((1 << 63) - 1, [bytearray(4096)])
                raise StorageError(5)  # reading zeros there is allowed too
        storage.close()

    def test_parallel_writers_do_not_disturb_each_other(self) -> None:
        storage = self.make(SIZE)
        parts = [(index * 1021, pattern(1021, index)) for index in range(60)]
        with ThreadPoolExecutor(4) as pool:
            for _ in pool.map(lambda part: storage.write(part[0], [part[1]]), parts):
                pass
        for offset, data in parts:
            _check(read(storage, offset, 1021) == data, f"part at {offset}")
        storage.close()

    def test_fd_map_tells_where_the_bytes_are(self) -> None:
        import os

        storage = self.make(SIZE)
        storage.write(0, [pattern(SIZE)])
        segments = storage.fd_map()
        if segments is not None:
            position = 0
            for segment in segments:
                _check(segment.start == position, "segments follow each other")
                count = min(segment.length, SIZE - position)
                data = os.pread(segment.fd, count, segment.position)
                _check(data == pattern(SIZE)[position : position + count], "bytes")
                position += count
            _check(position == SIZE, "cover")
        storage.close()

    def test_close_twice_is_harmless(self) -> None:
        storage = self.make(SIZE)
        storage.close()
        storage.close()

    def test_readonly_storage_refuses_changes(self) -> None:
        storage = self.make_readonly()
        if storage is None:
            return
        _check(not storage.writable, "writable")
        with _raises(ReadOnly):
            storage.write(0, [b"x"])
        with _raises(ReadOnly):
            storage.zero(0, 1)
        with _raises(ReadOnly):
            storage.discard(0, 1)
        with _raises(ReadOnly):
            storage.resize(1)
        storage.flush()
        _check(storage.size == SIZE, "size")
        storage.close()
