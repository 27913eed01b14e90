# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Regular files and block devices as a :class:`~qcowlib.storage.base.Storage`.

Invariants: what is opened is a regular file or a block device, decided on the
open descriptor; nothing else is ever read or written.  After one failed
barrier every later barrier on the same storage fails with the same error,
because the kernel may have dropped the pages and a later success proves
nothing about them (promise L5); reads go on.

Cache modes as qemu names them:

============ ======= ============== =========================
mode         direct  write-through  barriers
============ ======= ============== =========================
writeback    no      no             fdatasync
writethrough no      each write     fdatasync
none         yes     no             fdatasync
directsync   yes     each write     fdatasync
unsafe       no      no             none
============ ======= ============== =========================

Direct I/O accepts any request: :mod:`.direct` bounces what is not aligned.
This module is on the start-up path of every command and imports little.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator, Sequence

from qcowlib.errors import GateDenied, OutOfRange, ReadOnly, StorageError, UsageError, printable
from qcowlib.storage.base import Alignment, FdSegment, StorageExtent

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    from qcowlib.storage.direct import DirectIO

__all__ = ["CACHE_MODES", "MAX_OFFSET", "FileStorage", "open_beneath", "sync_directory"]

MAX_OFFSET = (1 << 63) - 1

#: Mode -> (direct, write-through, barriers).
CACHE_MODES: dict[str, tuple[bool, bool, bool]] = {
    "writeback": (False, False, True),
    "writethrough": (False, True, True),
    "none": (True, False, True),
    "directsync": (True, True, True),
    "unsafe": (False, False, False),
}

_BLKGETSIZE64 = 0x80081272
_BLKSSZGET = 0x1268
_BLKDISCARD = 0x1277
_IOV_MAX = 1024
_ZEROS_MAX = 1 << 20
# A filesystem or device that cannot do it, as opposed to one that failed.
_UNSUPPORTED = frozenset((errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOTTY, errno.ENODEV))


def _views(buffers: Sequence[ReadableBuffer]) -> tuple[list[memoryview], int]:
    """Return byte views of *buffers* that are not empty, and their total length."""
    views = []
    total = 0
    for buffer in buffers:
        view = memoryview(buffer)
        if view.nbytes:
            views.append(view if view.format == "B" and view.ndim == 1 else view.cast("B"))
            total += view.nbytes
    return views, total


def advance(views: list[memoryview], count: int) -> list[memoryview]:
    """Return *views* without their first *count* bytes."""
    for index, view in enumerate(views):
        if count < view.nbytes:
            return [view[count:], *views[index + 1 :]] if count else views[index:]
        count -= view.nbytes
    return []


def clear(views: list[memoryview]) -> None:
    """Fill *views* with zeros."""
    for view in views:
        view[:] = bytes(view.nbytes)


class FileStorage:
    """A regular file or block device; see :class:`~qcowlib.storage.base.Storage` for each method.

    Made by :meth:`open`, :meth:`create` or :meth:`from_fd`.  The descriptor
    belongs to the storage.
    """

    __slots__ = (
        "_align",
        "_barriers",
        "_direct",
        "_failed",
        "_fd",
        "_flags",
        "_is_block",
        "_name",
        "_stat",
        "_writable",
    )

    def __init__(self, fd: int, name: str, *, cache: str = "writeback") -> None:
        """Take ownership of *fd*, on errors too.

        Raises: UsageError for an unknown cache mode or an append-only
        descriptor, StorageError when it is not a regular file or block device.
        """
        self._fd = fd
        self._name = name
        self._failed: StorageError | None = None
        self._direct: DirectIO | None = None
        try:
            self._setup(cache)
        except BaseException:
            self._fd = -1
            os.close(fd)
            raise

    def _setup(self, cache: str) -> None:
        if cache not in CACHE_MODES:
            raise UsageError(f"Invalid cache option: {printable(cache)}", path=self._name)
        direct, through, self._barriers = CACHE_MODES[cache]
        self._flags = os.RWF_DSYNC if through else 0
        status = self._stat = os.fstat(self._fd)
        _refuse_special(status.st_mode, self._name)
        self._is_block = stat.S_ISBLK(status.st_mode)
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        access = flags & os.O_ACCMODE
        if access == os.O_WRONLY:
            raise UsageError("the descriptor is not open for reading", path=self._name)
        if flags & os.O_APPEND:
            # Linux appends positioned writes on such a descriptor, wherever they belong.
            raise UsageError("the descriptor is open for appending", path=self._name)
        self._writable = access == os.O_RDWR
        self._align = Alignment(zero=status.st_blksize, discard=status.st_blksize)
        if direct or flags & os.O_DIRECT:
            self._setup_direct(flags)

    def _setup_direct(self, flags: int) -> None:
        from qcowlib.storage.direct import DirectIO, probe

        if not flags & os.O_DIRECT:
            try:
                fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | os.O_DIRECT)
            except OSError as error:
                text = f"Could not open '{printable(self._name)}': filesystem does not support O_DIRECT"
                code = error.errno or errno.EINVAL
                raise StorageError(code, path=self._name, operation="open", message=text) from error
        offset, memory = probe(self._fd, self._sector() if self._is_block else None)
        self._align = self._align._replace(offset=offset, memory=memory)
        self._direct = DirectIO(self._fd, offset, self._flags)

    def _sector(self) -> int:
        return int.from_bytes(fcntl.ioctl(self._fd, _BLKSSZGET, bytes(4)), "little")

    @classmethod
    def open(
        cls,
        path: str | bytes | os.PathLike[str] | int,
        *,
        writable: bool = False,
        cache: str = "writeback",
        dir_fd: int | None = None,
    ) -> FileStorage:
        """Open an existing file or device; an ``int`` is a descriptor, see :meth:`from_fd`.

        Opening never blocks (FIFO, lease) and never makes a terminal ours.
        Raises: StorageError with qemu's text and the errno.
        """
        if isinstance(path, int):
            return cls.from_fd(path, cache=cache)
        name = os.fsdecode(path)
        try:
            # Devices act when opened: look first.  What counts is the later look at the descriptor.
            _refuse_special(os.stat(name, dir_fd=dir_fd).st_mode, name)
            fd = os.open(name, _open_flags(writable), dir_fd=dir_fd)
        except (OSError, ValueError) as error:
            raise _open_error(error, name) from error
        return cls(fd, name, cache=cache)

    @classmethod
    def create(
        cls,
        path: str | bytes | os.PathLike[str],
        *,
        cache: str = "writeback",
        exclusive: bool = False,
        mode: int = 0o644,
    ) -> FileStorage:
        """Open for writing, made empty if missing; an existing file keeps its content.

        The caller locks it and then resizes to zero, so that an image in use
        is not destroyed.  With *exclusive* an existing file is an error.
        """
        name = os.fsdecode(path)
        flags = _open_flags(True) | os.O_CREAT | (os.O_EXCL if exclusive else 0)
        try:
            if os.path.exists(name):  # noqa: PTH110
                _refuse_special(os.stat(name).st_mode, name)  # noqa: PTH116
            fd = os.open(name, flags, mode)
        except (OSError, ValueError) as error:
            raise _open_error(error, name, create=True) from error
        return cls(fd, name, cache=cache)

    @classmethod
    def from_fd(cls, fd: int, *, name: str | None = None, cache: str = "writeback") -> FileStorage:
        """Use a duplicate of *fd*; the caller keeps and closes its own.  Access mode as opened.

        The two share one file offset, which :meth:`extents` moves, and the
        direct flag, which the cache modes ``none`` and ``directsync`` set.
        """
        name = f"fd:{fd}" if name is None else name
        try:
            own = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
        except (OSError, OverflowError, ValueError) as error:
            raise _open_error(error, name) from error
        return cls(own, name, cache=cache)

    @property
    def name(self) -> str:
        return self._name

    @property
    def size(self) -> int:
        if self._is_block:
            return int.from_bytes(fcntl.ioctl(self._fd, _BLKGETSIZE64, bytes(8)), "little")
        return os.fstat(self._fd).st_size

    @property
    def writable(self) -> bool:
        return self._writable

    @property
    def align(self) -> Alignment:
        return self._align

    @property
    def is_block(self) -> bool:
        """Whether it is a block device, whose size is not ours to change."""
        return self._is_block

    @property
    def identity(self) -> tuple[int, int]:
        """What makes two storages the same file: device and inode, or 0 and device number."""
        if self._is_block:
            return 0, self._stat.st_rdev
        return self._stat.st_dev, self._stat.st_ino

    def fileno(self) -> int:
        """Return the descriptor, which stays the storage's."""
        return self._fd

    def read_into(self, offset: int, buffers: Sequence[WriteableBuffer]) -> None:
        views, total = _views(buffers)
        self._check_range(offset, total)
        try:
            if self._direct is not None:
                self._direct.read(offset, views, total)
                return
            while views:
                count = os.preadv(self._fd, views[:_IOV_MAX], offset)
                if count == total:
                    return
                if count == 0:
                    clear(views)
                    return
                views = advance(views, count)
                offset += count
                total -= count
        except OSError as error:
            raise StorageError.from_os(error, path=self._name, operation="read", offset=offset) from error

    def write(self, offset: int, buffers: Sequence[ReadableBuffer]) -> None:
        self._check_writable()
        views, total = _views(buffers)
        self._check_range(offset, total)
        if self._flags:
            self._check_not_failed()
        try:
            if self._direct is not None:
                self._direct.write(offset, views, total)
                return
            while views:
                count = os.pwritev(self._fd, views[:_IOV_MAX], offset, self._flags)
                if count == total:
                    return
                if count == 0:
                    raise OSError(errno.ENOSPC, "no progress")
                views = advance(views, count)
                offset += count
                total -= count
        except OSError as error:
            raise self._write_failed(error, "write", offset) from error

    def zero(self, offset: int, length: int, *, allocate: bool = False) -> None:
        self._check_writable()
        self._check_range(offset, length)
        if self._flags:
            self._check_not_failed()
        if length == 0:
            return
        try:
            if not (self._zero_device if self._is_block else self._zero_file)(offset, length, allocate):
                self._write_zeros(offset, offset + length)
            if self._flags:
                self._sync()
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise self._write_failed(error, "zero", offset) from error

    def discard(self, offset: int, length: int) -> None:
        self._check_writable()
        self._check_range(offset, length)
        end = min(offset + length, self.size)
        try:
            if self._is_block:
                unit = self._sector()
                start, end = -(-offset // unit) * unit, end // unit * unit
                if start < end:
                    span = start.to_bytes(8, "little") + (end - start).to_bytes(8, "little")
                    fcntl.ioctl(self._fd, _BLKDISCARD, span)
            elif offset < end:
                from qcowlib.storage.syscalls import KEEP_SIZE, PUNCH_HOLE, fallocate

                fallocate(self._fd, PUNCH_HOLE | KEEP_SIZE, offset, end - offset)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise self._write_failed(error, "discard", offset) from error

    def start_writeback(self) -> None:
        """Begin to write out what a later flush would have to wait for; a hint, which promises nothing."""
        if self._barriers and self._writable:
            from qcowlib.storage.syscalls import start_writeback

            start_writeback(self._fd)

    def flush(self) -> None:
        self._check_not_failed()
        if not self._barriers or not self._writable:
            return
        try:
            self._sync()
        except OSError as error:
            self._failed = StorageError.from_os(error, path=self._name, operation="flush")
            raise self._failed from error

    def extents(self, offset: int, length: int) -> Iterator[StorageExtent]:
        self._check_range(offset, length)
        end = offset + length
        if self._is_block:
            if length:
                yield StorageExtent("data", offset, length)
            return
        position = offset
        while position < end:
            data = self._seek(position, end, os.SEEK_DATA)
            if data > position:
                yield StorageExtent("hole", position, data - position)
            # A file that changes under us still ends the loop: each turn moves on.
            position = data
            if position < end:
                hole = self._seek(position, end, os.SEEK_HOLE)
                if hole <= position:
                    hole = end
                yield StorageExtent("data", position, hole - position)
                position = hole

    def _seek(self, position: int, end: int, whence: int) -> int:
        try:
            return min(os.lseek(self._fd, position, whence), end)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return end
            if error.errno == errno.EINVAL:
                return position if whence == os.SEEK_DATA else end
            raise StorageError.from_os(error, path=self._name, operation="seek", offset=position) from error

    def resize(self, size: int) -> None:
        self._check_writable()
        self._check_range(size, 0)
        if self._is_block:
            current = self.size
            if size != current:
                verb = "grow" if size > current else "resize"
                raise StorageError(
                    errno.EINVAL, path=self._name, operation="resize", message=f"Cannot {verb} device files"
                )
            return
        try:
            os.ftruncate(self._fd, size)
        except OSError as error:
            raise self._write_failed(error, "resize", size) from error

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        if self._direct is not None:
            self._direct.close()
        try:
            os.close(fd)
        except OSError as error:
            raise StorageError.from_os(error, path=self._name, operation="close") from error

    def fd_map(self) -> Sequence[FdSegment] | None:
        if self._direct is not None or self._flags:
            return None
        return (FdSegment(0, self.size if self._is_block else MAX_OFFSET, self._fd, 0),)

    def _sync(self) -> None:
        os.fdatasync(self._fd)

    def _check_writable(self) -> None:
        if not self._writable:
            raise ReadOnly("opened for reading", path=self._name)

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > MAX_OFFSET:
            raise OutOfRange(f"range {offset}+{length} is outside any file", path=self._name)

    def _check_not_failed(self) -> None:
        failed = self._failed
        if failed is not None:
            code = failed.errno or errno.EIO
            raise StorageError(code, path=self._name, operation=failed.operation, message=failed.message)

    def _write_failed(self, error: OSError, operation: str, offset: int) -> StorageError:
        wrapped = StorageError.from_os(error, path=self._name, operation=operation, offset=offset)
        # Each write is a barrier too in the write-through modes.
        if self._flags and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and self._failed is None:
            self._failed = wrapped
        return wrapped

    def _zero_file(self, offset: int, length: int, allocate: bool) -> bool:
        """Zero by allocation calls; return whether one was possible."""
        from qcowlib.storage.syscalls import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, fallocate

        grows = offset + length > os.fstat(self._fd).st_size
        if allocate:
            modes: tuple[tuple[int, ...], ...] = ((ZERO_RANGE,), (PUNCH_HOLE | KEEP_SIZE, 0))
        else:
            modes = ((PUNCH_HOLE | KEEP_SIZE,), (ZERO_RANGE,))
        for steps in modes:
            try:
                for step in steps:
                    fallocate(self._fd, step, offset, length)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                continue
            if grows and not allocate:
                self._grow(offset + length)
                fallocate(self._fd, steps[0], offset, length)
            return True
        return False

    def _grow(self, end: int) -> None:
        """Make the file reach *end*.

        By a zero byte, not by ftruncate: that would cut off what another
        thread wrote past *end* since the size was read.
        """
        if self._direct is not None:
            self._direct.grow(end)
        elif os.fstat(self._fd).st_size < end:
            os.pwrite(self._fd, b"\0", end - 1)

    def _zero_device(self, offset: int, length: int, allocate: bool) -> bool:
        from qcowlib.storage.syscalls import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, fallocate

        if offset + length > self.size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        unit = self._sector()
        start, end = -(-offset // unit) * unit, (offset + length) // unit * unit
        if start >= end:
            return False
        for mode in (ZERO_RANGE,) if allocate else (PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE):
            try:
                fallocate(self._fd, mode | KEEP_SIZE, start, end - start)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                continue
            self._write_zeros(offset, start)
            self._write_zeros(end, offset + length)
            return True
        return False

    def _write_zeros(self, offset: int, end: int) -> None:
        zeros = memoryview(bytes(min(max(end - offset, 0), _ZEROS_MAX)))
        while offset < end:
            count = min(end - offset, _ZEROS_MAX)
            self.write(offset, [zeros[:count]])
            offset += count


def _open_flags(writable: bool) -> int:
    return (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


def _refuse_special(mode: int, name: str) -> None:
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        text = f"'file' driver requires '{printable(name)}' to be a regular file"
        raise StorageError(errno.EINVAL, path=name, operation="open", message=text)


def _open_error(error: Exception, name: str, *, create: bool = False) -> StorageError:
    """Return qemu's wording for *error*; a path with a NUL in it is a path that does not exist."""
    if isinstance(error, StorageError):
        return error
    code = (error.errno or errno.EIO) if isinstance(error, OSError) else errno.ENOENT
    verb = "create" if create else "open"
    return StorageError(
        code, path=name, operation=verb, message=f"Could not {verb} '{printable(name)}': {os.strerror(code)}"
    )


def open_beneath(dir_fd: int, relative: str, *, writable: bool = False) -> int:
    """Open *relative* below the directory *dir_fd* and return its descriptor.

    No component may be a symbolic link, ``..`` or absolute, so the result lies
    inside the directory whoever renames what meanwhile.  The last component
    must be a regular file or a block device.

    Raises: GateDenied when the name leads elsewhere or to something special,
    StorageError when the system refuses.
    """
    parts = [part for part in relative.split("/") if part not in ("", ".")]
    if not parts or relative.startswith("/") or ".." in parts or "\0" in relative:
        raise GateDenied(f"'{printable(relative)}' is not a name inside the folder", path=relative)
    held = -1
    try:
        here = dir_fd
        for part in parts[:-1]:
            step = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=here)
            if held >= 0:
                os.close(held)
            held = here = step
        mode = os.stat(parts[-1], dir_fd=here, follow_symlinks=False).st_mode
        fd = os.open(parts[-1], _open_flags(writable) | os.O_NOFOLLOW, dir_fd=here) if _plain(mode) else -1
        if fd >= 0 and not _plain(os.fstat(fd).st_mode):
            os.close(fd)
            fd = -1
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise GateDenied(f"'{printable(relative)}' leads through a link", path=relative) from error
        raise _open_error(error, relative) from error
    finally:
        if held >= 0:
            os.close(held)
    if fd < 0:
        raise GateDenied(f"'{printable(relative)}' is not a regular file or block device", path=relative)
    return fd


def _plain(mode: int) -> bool:
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


def sync_directory(path: str) -> None:
    """Make the entry of the file *path* in its folder durable (after create or rename)."""
    folder = os.path.dirname(path) or "."
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise StorageError.from_os(error, path=folder, operation="flush") from error
