# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The sidecar file of a seal: a hash of each unit of the guest's disk that is not all zeros.

Big-endian, front to back::

    header  64   "QCOWSEAL", u32 version 1, u32 length 64, u64 guest bytes, u32 unit, u32 bytes of a hash (16),
                 u64 number of hashes, u64 number of runs, 12 bytes 0, u32 CRC-32 of the 60 bytes before
    hashes       BLAKE2b of each unit, in order; the last unit counts as filled up with zeros
    runs    16   u64 first unit, u64 how many hashes are of it and those behind it
    digest  32   BLAKE2b-256 of the header and of the BLAKE2b-256 of hashes and runs

Invariants: a seal is replaced whole or not at all; one that is damaged is
refused before anything is judged by it; reading it takes no more memory than
it has bytes, and those are mapped, not copied.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from struct import Struct
from typing import Final

from qcowlib.errors import CorruptImage, StorageError
from qcowlib.storage.file import sync_directory
from qcowlib.units import ceil_div

__all__ = ["DIGEST", "Seal", "SealWriter", "unit_hash"]

_MAGIC: Final = b"QCOWSEAL"
_VERSION: Final = 1
_HEADER: Final = Struct(">8sIIQIIQQ12sI")
_RUN: Final = Struct(">QQ")
#: Bytes of a hash.
DIGEST: Final = 16
_SUM: Final = 32
_MAX_SIZE: Final = 1 << 63


def unit_hash(data: memoryview, unit: int) -> bytes:
    """Return the hash of one unit, of which *data* is all but zeros at its end."""
    digest = hashlib.blake2b(data, digest_size=DIGEST)
    if len(data) < unit:
        digest.update(bytes(unit - len(data)))
    return digest.digest()


class SealWriter:
    """Writes a seal beside *path* and puts it there at the end; hashes must come in order."""

    def __init__(self, path: str, size: int, unit: int) -> None:
        """Raises: StorageError."""
        self.path = path
        self._size, self._unit = size, unit
        self._runs: list[list[int]] = []
        self._count = 0
        self._body = hashlib.blake2b(digest_size=_SUM)
        self._new = f"{path}.new"
        try:
            self._file = open(self._new, "w+b")  # noqa: SIM115 - closed by finish or abandon
            self._file.write(bytes(_HEADER.size))
        except OSError as error:
            raise StorageError.from_os(error, path=path, operation="write") from error

    def add(self, number: int, digest: bytes) -> None:
        """The unit *number* has this hash.  Raises: StorageError."""
        if self._runs and sum(self._runs[-1]) == number:
            self._runs[-1][1] += 1
        else:
            self._runs.append([number, 1])
        self._count += 1
        self._put(digest)

    def _put(self, data: bytes) -> None:
        self._body.update(data)
        try:
            self._file.write(data)
        except OSError as error:
            raise StorageError.from_os(error, path=self.path, operation="write") from error

    def finish(self) -> str:
        """Put the seal in its place, durably; returns its digest in hexadecimal.  Raises: StorageError."""
        for first, count in self._runs:
            self._put(_RUN.pack(first, count))
        head = _HEADER.pack(
            _MAGIC, _VERSION, _HEADER.size, self._size, self._unit, DIGEST, self._count, len(self._runs), b"", 0
        )[:-4]
        head += zlib.crc32(head).to_bytes(4, "big")
        digest = hashlib.blake2b(head + self._body.digest(), digest_size=_SUM)
        try:
            self._file.write(digest.digest())
            self._file.seek(0)
            self._file.write(head)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._new, self.path)  # noqa: PTH105
        except OSError as error:
            raise StorageError.from_os(error, path=self.path, operation="write") from error
        sync_directory(self.path)
        return digest.hexdigest()

    def abandon(self) -> None:
        """Leave what was there."""
        self._file.close()
        with suppress(OSError):
            os.unlink(self._new)  # noqa: PTH108


class Seal:
    """A seal, mapped and found whole; *size* is guest bytes, *unit* bytes a hash, *digest* names its content."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises: StorageError; CorruptImage for a file that is no seal, or a damaged one."""
        self.path = os.fspath(path)
        try:
            with open(self.path, "rb") as file:
                length = os.fstat(file.fileno()).st_size
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if length else b""
        except OSError as error:
            raise StorageError.from_os(error, path=self.path, operation="open") from error
        except ValueError as error:
            raise StorageError(22, path=self.path, operation="open") from error
        self._view = memoryview(self._map)
        try:
            self._parse()
        except BaseException:
            self.close()
            raise

    def _parse(self) -> None:
        if len(self._view) < _HEADER.size + _SUM or bytes(self._view[:8]) != _MAGIC:
            raise CorruptImage("this is no seal", path=self.path)
        head = bytes(self._view[: _HEADER.size])
        _, version, length, size, unit, digest, count, runs, zeros, crc = _HEADER.unpack(head)
        if zlib.crc32(head[:-4]) != crc:
            raise CorruptImage("the seal is damaged", path=self.path)
        if (version, length, digest) != (_VERSION, _HEADER.size, DIGEST) or any(zeros):
            raise CorruptImage(f"the seal has version {version}, which is not known", path=self.path)
        if size >= _MAX_SIZE or unit & (unit - 1) or not 512 <= unit <= 1 << 21:
            raise CorruptImage("the seal names a size or a unit that no image has", path=self.path)
        hashes = _HEADER.size + count * DIGEST
        end = hashes + runs * _RUN.size
        if len(self._view) != end + _SUM:
            raise CorruptImage("the seal has another length than it says", path=self.path)
        body = hashlib.blake2b(self._view[_HEADER.size : end], digest_size=_SUM).digest()
        whole = hashlib.blake2b(head + body, digest_size=_SUM)
        if whole.digest() != bytes(self._view[end:]):
            raise CorruptImage("the seal is damaged", path=self.path)
        self.size: int = size
        self.unit: int = unit
        self.digest = whole.hexdigest()
        self.count: int = count
        self._set_runs(hashes, runs)

    def _set_runs(self, start: int, count: int) -> None:
        """Read the runs; each begins behind the one before and ends inside the disk."""
        self._starts: list[int] = []
        self._counts: list[int] = []
        self._before: list[int] = []
        total = end = 0
        last = ceil_div(self.size, self.unit)
        for number in range(count):
            first, length = _RUN.unpack_from(self._view, start + number * _RUN.size)
            if first < end or not 0 < length <= last - first or total + length > self.count:
                raise CorruptImage("the seal names units that the disk does not have", path=self.path)
            self._starts.append(first)
            self._counts.append(length)
            self._before.append(total)
            total += length
            end = first + length
        if total != self.count:
            raise CorruptImage("the seal has another number of hashes than it says", path=self.path)

    def hash_of(self, number: int) -> bytes | None:
        """Return the hash of unit *number*; ``None`` for one that is all zeros."""
        at = bisect_right(self._starts, number) - 1
        if at < 0 or number >= self._starts[at] + self._counts[at]:
            return None
        place = _HEADER.size + (self._before[at] + number - self._starts[at]) * DIGEST
        return bytes(self._view[place : place + DIGEST])

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yield ``(first unit, count)`` of what is not all zeros."""
        return iter(zip(self._starts, self._counts, strict=True))

    def close(self) -> None:
        """Let go of the file."""
        self._view.release()
        if isinstance(self._map, mmap.mmap):
            self._map.close()

    def __enter__(self) -> Seal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
