# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The byte locks by which qemu processes keep each other off an image.

Invariant: while an :class:`ImageLock` is held, every program that takes the
same locks (qemu, qemu-img, qemu-nbd, this library) sees what we do and what
we allow; a conflict is found on both sides whoever came first, because each
side first takes its own locks and then looks for the other's.

Each of four permissions has two bytes in the file: a lock on 100 + i says
"we use i", one on 200 + i "we let nobody else use i"; i = 0 consistent read, 1
write, 2 write unchanged, 3 resize.  All are shared locks of the open file
description, so they end with the descriptor and its duplicates.

=============== ============ ===========================
access          uses         lets nobody else
=============== ============ ===========================
read            0            1, 3 (with *reserve*)
write           0, 1, 3 (with *reserve*; else 0, 1)      1, 3 (with *reserve*)
force_share     0
create          1, 3         3
=============== ============ ===========================

*reserve* is what formats with metadata need, and the source of a copy; plain
raw images are shared.  Source: the kernel's lock table beside qemu 7.2.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from qcowlib.errors import Busy, ReadOnly, StorageError, printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, Literal

    Access = Literal["read", "write", "force_share", "create"]


__all__ = ["ImageLock", "find_holder", "lock_image"]

_READ, _WRITE, _UNCHANGED, _RESIZE = 1, 2, 4, 8
_NAMES: Final = ("consistent read", "write", "write unchanged", "resize")
_USED: Final = 100
_UNSHARED: Final = 200

# struct flock of 64-bit Linux: type, whence, start, length, pid.
_FLOCK: Final = struct.Struct("@hhqqi4x")

_MAX_PROCESSES = 4096
_MAX_DESCRIPTORS = 65536


def _permissions(access: Access, reserve: bool) -> tuple[int, int]:
    """Return (used, unshared) masks."""
    if access == "force_share":
        return _READ, 0
    if access == "create":
        return _WRITE | _RESIZE, _RESIZE
    unshared = _WRITE | _RESIZE if reserve else 0
    if access == "read":
        return _READ, unshared
    return _READ | _WRITE | (_RESIZE if reserve else 0), unshared


class ImageLock:
    """What one open file says to others; made by :func:`lock_image`."""

    __slots__ = ("_fd", "_held", "_name")

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self._name = name
        self._held: set[int] = set()

    def change(self, access: Access, *, reserve: bool = True) -> None:
        """Hold exactly what *access* needs; on an error hold what was held before.

        Raises: Busy when somebody else does not allow it, or uses what we do
        not allow; StorageError when the file cannot be locked at all.
        """
        used, unshared = _permissions(access, reserve)
        wanted = {_USED + bit for bit in range(4) if used >> bit & 1}
        wanted |= {_UNSHARED + bit for bit in range(4) if unshared >> bit & 1}
        added = wanted - self._held
        try:
            for byte in sorted(added):
                self._set(byte, fcntl.F_RDLCK)
            for bit in range(4):
                if used >> bit & 1:
                    self._test(_UNSHARED + bit, f'Failed to get "{_NAMES[bit]}" lock')
                if unshared >> bit & 1:
                    self._test(_USED + bit, f'Failed to get shared "{_NAMES[bit]}" lock')
        except BaseException:
            self._drop(added)
            raise
        self._drop(self._held - wanted)

    def release(self) -> None:
        """Hold nothing; a second call does nothing.  Closing the file releases too."""
        self._drop(set(self._held))

    def _drop(self, bytes_: set[int]) -> None:
        for byte in sorted(bytes_ & self._held):
            self._set(byte, fcntl.F_UNLCK)

    def _set(self, byte: int, kind: int) -> None:
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise self._busy(f"Failed to lock byte {byte}", byte) from error
            code = error.errno or errno.EIO
            text = f"Failed to lock byte {byte}: {os.strerror(code)}"
            raise StorageError(code, path=self._name, operation="lock", message=text) from error
        if kind == fcntl.F_UNLCK:
            self._held.discard(byte)
        else:
            self._held.add(byte)

    def _test(self, byte: int, text: str) -> None:
        query = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        answer = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, query)
        if _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
            raise self._busy(text, byte)

    def _busy(self, text: str, byte: int) -> Busy:
        hint = f"Is another process using the image [{printable(self._name)}]?"
        return Busy(text, path=self._name, hint=hint, pid=find_holder(self._fd, byte))


def lock_image(fd: int, name: str, access: Access = "read", *, reserve: bool = True) -> ImageLock:
    """Lock the image open as *fd*, at once or not at all.

    *access* ``force_share`` only says that we read, whatever others do.  It is
    for reading: the caller refuses it for anything else.

    Raises: Busy with the text of qemu, its hint, and the process where it can
    be found; ReadOnly when writing is asked of a descriptor that cannot;
    StorageError when the filesystem has no locks.
    """
    writes = access in ("write", "create")
    if writes and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise ReadOnly("opened for reading", path=name)
    lock = ImageLock(fd, name)
    lock.change(access, reserve=reserve)
    return lock


def find_holder(fd: int, byte: int) -> int | None:
    """Return the id of another process (or of ours, last) that has a lock on *byte* of the file.

    The kernel does not tell: the open files of the processes we may look at
    are searched, a bounded number of them.
    """
    status = os.fstat(fd)
    identity = (status.st_dev, status.st_ino)
    own = os.getpid()
    left = _MAX_DESCRIPTORS
    try:
        processes = [int(name) for name in os.listdir("/proc") if name.isascii() and name.isdigit()]  # noqa: PTH208
    except OSError:
        return None
    # Ours last: it holds other locks of the same file in most cases.
    for pid in sorted(processes[:_MAX_PROCESSES], key=lambda process: (process == own, process)):
        try:
            descriptors = os.listdir(f"/proc/{pid}/fd")  # noqa: PTH208
        except OSError:
            continue
        for descriptor in descriptors[:left]:
            if (pid, descriptor) != (own, str(fd)) and _holds(pid, descriptor, identity, byte):
                return pid
        left -= len(descriptors)
        if left <= 0:
            return None
    return None


def _holds(pid: int, descriptor: str, identity: tuple[int, int], byte: int) -> bool:
    try:
        status = os.stat(f"/proc/{pid}/fd/{descriptor}")  # noqa: PTH116
        if (status.st_dev, status.st_ino) != identity:
            return False
        with open(f"/proc/{pid}/fdinfo/{descriptor}", encoding="ascii", errors="replace") as file:
            lines = file.read(1 << 16).splitlines()
    except OSError:
        return False
    for line in lines:
        # lock:  1: OFDLCK ADVISORY READ -1 fe:00:2228568 203 203
        words = line.split()
        if len(words) >= 3 and words[0] == "lock:" and words[-2].isdigit():
            last = int(words[-1]) if words[-1].isdigit() else byte
            if int(words[-2]) <= byte <= last:
                return True
    return False
