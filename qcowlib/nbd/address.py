# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Where a server listens: a Unix socket, loopback TCP, or a descriptor that somebody else listens on.

Invariant: nobody but the owner can connect to a Unix socket made here, from
the moment its name exists; TCP never leaves the machine; a socket file is
removed by the one that made it, a file of any other kind by nobody.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import tempfile
from collections.abc import Mapping
from typing import Final
from urllib.parse import quote

from qcowlib.errors import Busy, StorageError, UsageError

__all__ = ["Listener", "activated_descriptor"]

_FIRST_FD: Final = 3  # as systemd passes descriptors
_LOOPBACK: Final = "127.0.0.1"
_BACKLOG: Final = 64


def activated_descriptor(environment: Mapping[str, str]) -> int | None:
    """Return the descriptor that socket activation passed to this process, if any.

    Raises: UsageError when it passed several.
    """
    if environment.get("LISTEN_PID") != str(os.getpid()):
        return None
    count = environment.get("LISTEN_FDS", "")
    if count != "1":
        raise UsageError(f"socket activation passed {count[:8] or 'no'} descriptors; one is expected")
    return _FIRST_FD


class Listener:
    """A listening socket; one of *path*, *port* and *fd*, or else a new Unix socket in a private folder.

    *port* 0 takes any free one.  Raises: UsageError, Busy when somebody listens there, StorageError.
    """

    def __init__(self, *, path: str | None = None, port: int | None = None, fd: int | None = None) -> None:
        if sum(value is not None for value in (path, port, fd)) > 1:
            raise UsageError("a server listens on a socket, on a port or on a descriptor, not on several")
        self.path: str | None = None
        self.port: int | None = None
        self._folder: str | None = None
        if fd is not None:
            self.socket = _adopt(fd)
        elif port is not None:
            self.socket = _loopback(port)
        else:
            if path is None:
                self._folder = tempfile.mkdtemp(prefix="qcow-nbd-")
                path = os.path.join(self._folder, "socket")
            try:
                self.socket = _unix(path)
            except BaseException:
                self._remove_folder()
                raise
            self._made: tuple[int, int] | None = _identity(path)
        name = self.socket.getsockname()
        if self.socket.family == socket.AF_UNIX:
            self.path = path if path is not None else os.fsdecode(name)
        else:
            self.port = name[1]

    def uri(self, export: str = "") -> str:
        """Return the address of *export* as NBD clients take it."""
        name = quote(export, safe="")
        if self.path is not None:
            return f"nbd+unix:///{name}?socket={quote(os.path.abspath(self.path))}"  # noqa: PTH100
        return f"nbd://{_LOOPBACK}:{self.port}/{name}"

    def close(self) -> None:
        """Stop listening; remove what was made for it.  A second call does nothing."""
        self.socket.close()
        made = getattr(self, "_made", None)
        if made is not None and self.path is not None and _identity(self.path) == made:
            with contextlib.suppress(OSError):
                os.unlink(self.path)  # noqa: PTH108
        self._made = None
        self._remove_folder()

    def _remove_folder(self) -> None:
        if self._folder is not None:
            with contextlib.suppress(OSError):
                os.rmdir(self._folder)  # noqa: PTH106
            self._folder = None


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _adopt(fd: int) -> socket.socket:
    try:
        adopted = socket.socket(fileno=os.dup(fd))
    except OSError as error:
        raise StorageError.from_os(error, path=f"descriptor {fd}", operation="listen") from None
    listens = adopted.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if not listens or adopted.family not in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6):
        adopted.close()
        raise UsageError(f"descriptor {fd} is not a listening stream socket")
    adopted.setblocking(True)
    return adopted


def _loopback(port: int) -> socket.socket:
    if not 0 <= port < 1 << 16:
        raise UsageError(f"{port} is not a TCP port")
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((_LOOPBACK, port))
        made.listen(_BACKLOG)
    except OSError as error:
        made.close()
        raise StorageError.from_os(error, path=f"{_LOOPBACK}:{port}", operation="listen") from None
    return made


def _unix(path: str) -> socket.socket:
    _clear_stale(path)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Source: Linux gives the name the mode of the socket; there is no moment in which others may connect.
        os.fchmod(made.fileno(), stat.S_IRUSR | stat.S_IWUSR)
        made.bind(path)
        made.listen(_BACKLOG)
    except (OSError, ValueError) as error:
        made.close()
        if isinstance(error, OSError) and error.errno is not None:
            raise StorageError.from_os(error, path=path, operation="listen") from None
        raise UsageError("the name is too long for a Unix socket", path=path) from None
    return made


def _clear_stale(path: str) -> None:
    """Remove a socket that nobody listens on any more."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
    except (OSError, ValueError):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            with contextlib.suppress(OSError):
                os.unlink(path)  # noqa: PTH108
            return
        except OSError:
            return
    raise Busy("somebody listens there already", path=path)
