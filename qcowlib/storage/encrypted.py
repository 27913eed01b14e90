# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The decrypted content of a storage, as of a LUKS file.

Invariant: the storage below holds ciphertext only, in whole 512-byte sectors
numbered from the start of this view.  Writes are serialised, so that two that
touch one sector do not lose each other.  The view has a fixed size, like a
device: the sectors that were there when it was made.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qcowlib.errors import OutOfRange, StorageError
from qcowlib.luks import HEADER_BYTES, LuksHeader
from qcowlib.runtime import new_condition
from qcowlib.storage.base import Alignment, Storage, StorageExtent
from qcowlib.storage.wrapper import StorageWrapper
from qcowlib.units import SECTOR, round_down, round_up

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    from qcowlib.crypto import Cipher, Secret
    from qcowlib.luks import KeyChange

__all__ = ["EncryptedStorage", "change_keys", "create_luks", "open_luks"]

# Bytes that are transformed at once, so that no copy of a whole request is kept.
_PIECE = 1 << 20
# No key material of a header ends behind this (eight slots of 64-byte keys take 2 MiB).
_AREA_LIMIT = 16 << 20


def open_luks(storage: Storage, passphrase: Secret | str | bytes) -> EncryptedStorage:
    """Return the content of the LUKS file *storage*, which closes with it.

    Raises FormatError and CorruptImage for a bad header, SecretError for a
    passphrase that no key slot takes.
    """
    header, area = _header(storage)
    return EncryptedStorage(storage, header.payload, LuksHeader.open(area, passphrase, host_sectors=False))


def _header(storage: Storage) -> tuple[LuksHeader, bytearray]:
    """Return the header and the bytes that hold its key material too."""
    fixed = bytearray(HEADER_BYTES)
    storage.read_into(0, [fixed])
    header = LuksHeader.parse(fixed)
    area = bytearray(min(header.payload, _AREA_LIMIT, storage.size))
    storage.read_into(0, [area])
    return header, area


def change_keys(storage: Storage, change: KeyChange) -> None:
    """Change the key slots of the LUKS file *storage*; durable when this returns.

    Raises UsageError with qemu's words, SecretError, StorageError.
    """
    header, area = _header(storage)
    # Invariant: each write is durable before the next, so a key works after a power cut at any point.
    for offset, data in header.change(area, change):
        storage.write(offset, [data])
        storage.flush()


def create_luks(storage: Storage, size: int, passphrase: Secret | str | bytes, **options: str | int) -> None:
    """Make the empty *storage* a LUKS file of *size* bytes.

    *options* as of :meth:`LuksHeader.create`.  The content is not written: it
    reads as noise until it is.
    """
    area, _ = LuksHeader.create(passphrase, host_sectors=False, **options)  # type: ignore[arg-type]
    end = len(area.rstrip(b"\0"))
    storage.write(HEADER_BYTES, [memoryview(area)[HEADER_BYTES:end]])
    storage.resize(len(area) + size)
    storage.flush()
    # The header last: before it, the file is no LUKS file.
    storage.write(0, [memoryview(area)[:HEADER_BYTES]])
    storage.flush()


class EncryptedStorage(StorageWrapper):
    """*storage* from byte *start* on, through *cipher*, sectors counted from *start*; closes *storage*."""

    __slots__ = ("_cipher", "_length", "_lock", "_start")

    plain = False

    def __init__(self, storage: Storage, start: int, cipher: Cipher) -> None:
        super().__init__(storage)
        self._start = start
        self._length = round_down(max(0, storage.size - start), SECTOR)
        self._cipher = cipher
        self._lock = new_condition()

    @property
    def identity(self) -> tuple[int, int] | None:
        """The file's, so that it is known again whatever is made of its bytes."""
        return getattr(self._storage, "identity", None)

    @property
    def size(self) -> int:
        return self._length

    @property
    def align(self) -> Alignment:
        return Alignment(offset=SECTOR)

    def read_into(self, offset: int, buffers: Sequence[WriteableBuffer]) -> None:
        if offset < 0:
            raise OutOfRange(f"offset {offset} is negative", path=self.name)
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            inside = max(0, min(len(view), self._length - offset))
            for at in range(0, inside, _PIECE):
                piece = view[at : min(at + _PIECE, inside)]
                if offset % SECTOR or len(piece) % SECTOR:
                    skip = (offset + at) % SECTOR
                    piece[:] = self._sectors(offset + at - skip, skip + len(piece))[skip : skip + len(piece)]
                else:
                    self._storage.read_into(self._start + offset + at, [piece])
                    self._cipher.decrypt(piece, (offset + at) // SECTOR)
            view[inside:] = bytes(len(view) - inside)
            offset += len(view)

    def write(self, offset: int, buffers: Sequence[ReadableBuffer]) -> None:
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        self._check("write", offset, sum(view.nbytes for view in views))
        with self._lock:
            for view in views:
                for at in range(0, len(view), _PIECE):
                    self._write_piece(offset + at, view[at : at + _PIECE])
                offset += len(view)

    def zero(self, offset: int, length: int, *, allocate: bool = False) -> None:
        self._check("zero", offset, length)
        zeros = memoryview(bytes(min(length, _PIECE)))
        with self._lock:
            for at in range(0, length, _PIECE):
                self._write_piece(offset + at, zeros[: min(_PIECE, length - at)])

    def discard(self, offset: int, length: int) -> None:
        # Nothing: where free sectors are is nobody's business.
        self._check("discard", offset, 0)

    def extents(self, offset: int, length: int) -> Iterator[StorageExtent]:
        if offset < 0 or length < 0:
            raise OutOfRange(f"range {offset}+{length} is not valid", path=self.name)
        end = offset + length
        middle = min(end, max(offset, self._length))
        if offset < middle:
            yield StorageExtent("data", offset, middle - offset)
        if middle < end:
            yield StorageExtent("hole", middle, end - middle)

    def resize(self, size: int) -> None:
        """Make it *size* bytes, whole sectors; new ones read as noise until they are written, as in qemu."""
        self._check("resize", 0, 0)
        if size % SECTOR:
            raise StorageError(errno.EINVAL, path=self.name, operation="resize", message="size is not whole sectors")
        with self._lock:
            if size != self._length:
                self._storage.resize(self._start + size)
                self._length = size

    def change_keys(self, change: KeyChange) -> None:
        """Change the key slots of the LUKS file below, as :func:`change_keys`."""
        with self._lock:
            change_keys(self._storage, change)

    def _sectors(self, offset: int, length: int) -> bytearray:
        """Return the decrypted sectors from *offset* (a sector's start) that hold *length* bytes."""
        plain = bytearray(round_up(length, SECTOR))
        self._storage.read_into(self._start + offset, [plain])
        self._cipher.decrypt(plain, offset // SECTOR)
        return plain

    def _write_piece(self, offset: int, piece: memoryview) -> None:
        skip = offset % SECTOR
        start = offset - skip
        if skip or len(piece) % SECTOR:
            whole = self._sectors(start, skip + len(piece))
            whole[skip : skip + len(piece)] = piece
            self._cipher.encrypt(whole, start // SECTOR)
        else:
            whole = bytearray(len(piece))
            self._cipher.encrypt_into(piece, whole, start // SECTOR)
        self._storage.write(self._start + start, [whole])
