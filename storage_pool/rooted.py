# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A directory tree that no name leads out of.

Invariant: the root is opened once; every path below it is walked part by part
without following symbolic links, so that whoever can write into a domain
cannot make us touch anything outside.  A file is replaced whole: written
under another name, made durable, renamed, and the directory made durable.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from typing import Final

from qcowlib.errors import Error, GateDenied, StorageError
from qcowlib.storage.file import FileStorage, open_beneath

from .errors import AlreadyExists, InvalidName, MetadataError, NotFound, printable

__all__ = ["Rooted", "detect_block_size"]

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: No file that is read whole is longer; a domain's text is some hundred bytes.
READ_LIMIT: Final = 1 << 20


def _parts(path: str) -> list[str]:
    parts = path.split("/") if path else []
    for part in parts:
        if part in ("", ".", "..") or "\0" in part:
            raise InvalidName(f"not a path inside the domain: '{printable(path[:160])}'")
    return parts


def detect_block_size(directory: str) -> int | None:
    """Return the smallest direct write that *directory* accepts, 512 or 4096.

    ``None`` where it does no direct I/O at all.
    """
    path = f"{directory}/__block_size_probe__"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            # Some systems make the file before they find that they cannot.
            if os.path.lexists(path):
                os.unlink(path)  # noqa: PTH108
            return None
        raise StorageError.from_os(error, path=path, operation="open") from error
    try:
        page = mmap.mmap(-1, 4096)
        for size in (512, 4096):
            try:
                os.pwrite(fd, memoryview(page)[:size], 0)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise StorageError.from_os(error, path=path, operation="write") from error
            else:
                return size
        return None
    finally:
        os.close(fd)
        os.unlink(path)  # noqa: PTH108


class Rooted:
    """The directory *path*, opened; paths of all methods are relative to it."""

    __slots__ = ("_fd", "path")

    def __init__(self, path: str) -> None:
        """Raises: NotFound, StorageError."""
        self.path = path
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise self._error(error, "", "open") from error

    def close(self) -> None:
        """Close the root; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def full(self, path: str) -> str:
        """Return *path* for messages and for programs."""
        return f"{self.path}/{path}" if path else self.path

    def _error(self, error: OSError | ValueError, path: str, operation: str) -> Exception:
        shown = self.full(path)
        code = error.errno if isinstance(error, OSError) else errno.EINVAL
        if code == errno.ENOENT:
            return NotFound("no such file or directory", path=shown)
        if code == errno.EEXIST:
            return AlreadyExists("it exists already", path=shown)
        if code in (errno.ELOOP, errno.ENOTDIR):
            return GateDenied("a link or file stands where a directory must be", path=shown)
        return StorageError(code or errno.EIO, path=shown, operation=operation)

    @contextlib.contextmanager
    def _directory(self, parts: list[str], path: str) -> Iterator[int]:
        """Give a descriptor of the directory at *parts*."""
        fd = os.dup(self._fd)
        try:
            for part in parts:
                below = os.open(part, _DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = below
            yield fd
        except OSError as error:
            if isinstance(error, Error):
                raise
            raise self._error(error, path, "access") from error
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _parent(self, path: str) -> Iterator[tuple[int, str]]:
        parts = _parts(path)
        if not parts:
            raise InvalidName("the root itself is no entry of the domain")
        with self._directory(parts[:-1], path) as fd:
            yield fd, parts[-1]

    # Looking

    def names(self, path: str = "") -> list[str]:
        """Return the names in a directory, sorted.  Raises: NotFound."""
        with self._directory(_parts(path), path) as fd:
            return sorted(os.listdir(fd))  # noqa: PTH208 - of a descriptor

    def stat(self, path: str) -> os.stat_result:
        """Return the state of a file, not of what it may link to.  Raises: NotFound."""
        if not path:
            return os.fstat(self._fd)
        with self._parent(path) as (fd, name):
            return os.stat(name, dir_fd=fd, follow_symlinks=False)

    def exists(self, path: str) -> bool:
        """Whether something of this name is there."""
        try:
            self.stat(path)
        except NotFound:
            return False
        return True

    def read(self, path: str, limit: int = READ_LIMIT) -> bytes:
        """Return a file's bytes.

        Raises: NotFound, MetadataError when it is longer than *limit*.
        """
        with self.open(path) as storage:
            size = storage.size
            if size > limit:
                raise MetadataError(f"{size} bytes where at most {limit} belong", path=self.full(path))
            data = bytearray(size)
            storage.read_into(0, [data])
        return bytes(data)

    @contextlib.contextmanager
    def open(self, path: str, *, writable: bool = False) -> Iterator[FileStorage]:
        """Give a file's bytes as a storage, closed afterwards."""
        storage = self.storage(path, writable=writable)
        try:
            yield storage
        finally:
            storage.close()

    def storage(self, path: str, *, writable: bool = False) -> FileStorage:
        """Open a file as a storage.  Raises: NotFound, GateDenied for what is no regular file."""
        _parts(path)
        try:
            fd = open_beneath(self._fd, path, writable=writable)
        except StorageError as error:
            raise self._error(error, path, "open") from error
        return FileStorage(fd, self.full(path))

    # Changing

    def _own(self, fd: int) -> None:
        """Give what root made to the owner of the tree, who must be able to change it."""
        root = os.fstat(self._fd)
        if os.geteuid() == 0 and (root.st_uid, root.st_gid) != (0, 0):
            os.fchown(fd, root.st_uid, root.st_gid)

    def create(self, path: str, *, size: int = 0, mode: int = 0o660) -> None:
        """Make a new file of *size* zeros.  Raises: AlreadyExists."""
        with self._parent(path) as (parent, name):
            fd = os.open(
                name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent
            )
            try:
                self._own(fd)
                os.fchmod(fd, mode)
                os.truncate(fd, size)
                os.fsync(fd)
            finally:
                os.close(fd)
            os.fsync(parent)

    def replace(self, path: str, data: bytes, *, mode: int = 0o644, before: Callable[[], None] = lambda: None) -> None:
        """Put *data* in place of a file, new or old, so that a cut leaves one or the other.

        *before* is called when all is written, right before the file is
        replaced; what it raises leaves the old one.  The new file never is
        one that another host began: what that host writes late must not
        arrive in ours.
        """
        with self._parent(path) as (parent, name):
            new = f"{name}.new"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            try:
                fd = os.open(new, flags, 0o600, dir_fd=parent)
            except FileExistsError:
                os.unlink(new, dir_fd=parent)
                fd = os.open(new, flags, 0o600, dir_fd=parent)
            try:
                self._own(fd)
                os.fchmod(fd, mode)
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
                os.fsync(fd)
            finally:
                os.close(fd)
            before()
            os.rename(new, name, src_dir_fd=parent, dst_dir_fd=parent)
            os.fsync(parent)

    def make_directory(self, path: str, *, exist_ok: bool = False) -> None:
        """Make a directory, mode 0755.  Raises: AlreadyExists."""
        with self._parent(path) as (parent, name):
            try:
                os.mkdir(name, 0o755, dir_fd=parent)
            except FileExistsError:
                if not exist_ok:
                    raise
                return
            fd = os.open(name, _DIRECTORY, dir_fd=parent)
            try:
                self._own(fd)
                os.fchmod(fd, 0o755)
            finally:
                os.close(fd)
            os.fsync(parent)

    def rename(self, old: str, new: str) -> None:
        """Rename within the tree; an existing file *new* is replaced."""
        with self._parent(old) as (source, name), self._parent(new) as (target, name_2):
            os.rename(name, name_2, src_dir_fd=source, dst_dir_fd=target)
            os.fsync(target)
            os.fsync(source)

    def link(self, old: str, new: str) -> None:
        """Make a second name for a file.  Raises: AlreadyExists."""
        with self._parent(old) as (source, name), self._parent(new) as (target, name_2):
            os.link(name, name_2, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
            os.fsync(target)

    def chmod(self, path: str, mode: int) -> None:
        """Set the mode of a regular file."""
        with self.open(path) as storage:
            os.fchmod(storage.fileno(), mode)

    def unlink(self, path: str, *, missing_ok: bool = False) -> None:
        """Remove a file or link.  Raises: NotFound unless *missing_ok*."""
        with self._parent(path) as (parent, name):
            try:
                os.unlink(name, dir_fd=parent)
            except FileNotFoundError:
                if not missing_ok:
                    raise
                return
            os.fsync(parent)

    def remove_tree(self, path: str, *, depth: int = 8) -> None:
        """Remove a directory with all it holds; a missing one is fine (another may purge too)."""
        names: list[str] = []
        with contextlib.suppress(NotFound):
            names = self.names(path)
        for name in names:
            below = f"{path}/{name}"
            # Each by itself: the other one may take this away and end before the next.
            with contextlib.suppress(NotFound):
                if depth and stat.S_ISDIR(self.stat(below).st_mode):
                    self.remove_tree(below, depth=depth - 1)
                else:
                    self.unlink(below, missing_ok=True)
        with contextlib.suppress(NotFound), self._parent(path) as (parent, name):
            os.rmdir(name, dir_fd=parent)
            os.fsync(parent)
