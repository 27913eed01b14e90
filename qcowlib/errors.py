# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The one small hierarchy of errors.

Invariant: everything that this library raises on purpose derives from
:class:`Error`, also from the builtin class a caller would expect, and is one
line of text that names the file it is about.  Text that comes out of an image
is escaped by :func:`printable` before it enters a message, so that no image
can forge a second line or a terminal sequence.
"""

from __future__ import annotations

import errno as _errno
import os

__all__ = [
    "Busy",
    "Cancelled",
    "CorruptImage",
    "Error",
    "FormatError",
    "GateDenied",
    "OutOfRange",
    "ReadOnly",
    "SecretError",
    "StorageError",
    "UnsupportedFeature",
    "UsageError",
    "printable",
]


def printable(text: str | bytes) -> str:
    """Return *text* on one line: control and undecodable characters as escapes."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


class Error(Exception):
    """Base of all errors; ``str()`` is one line.

    *path* is the file it is about, *hint* a second sentence for people (what
    to do about it).  Neither is needed to understand the message.
    """

    def __init__(self, message: str, *, path: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.path = path
        self.hint = hint

    def __str__(self) -> str:
        name = "" if self.path is None else printable(self.path)
        return self.message if name in self.message else f"{name}: {self.message}"


class FormatError(Error, ValueError):
    """The bytes are not a valid image of the format they are opened as."""


class UnsupportedFeature(FormatError):
    """A valid image that needs a feature this library (or this build) lacks."""


class CorruptImage(FormatError):
    """Metadata that contradicts itself, met while using an image."""


class UsageError(Error, ValueError):
    """Arguments that cannot be right, whatever the image holds."""


class OutOfRange(UsageError):
    """An offset or length outside the image."""


class ReadOnly(Error, PermissionError):
    """A change was asked of something opened for reading."""


class GateDenied(Error, PermissionError):
    """The reference policy does not allow to open what an image names."""


class SecretError(Error, PermissionError):
    """A key is missing or wrong."""


class Busy(Error, BlockingIOError):
    """Somebody else holds the image; *pid* is the holder where known, and then ``str()`` names it."""

    def __init__(
        self, message: str, *, path: str | None = None, hint: str | None = None, pid: int | None = None
    ) -> None:
        super().__init__(message, path=path, hint=hint)
        self.pid = pid

    def __str__(self) -> str:
        text = super().__str__()
        return text if self.pid is None else f"{text} (process {self.pid} holds it)"


class Cancelled(Error):
    """A long job was cancelled by its caller; what it made is not complete."""


class StorageError(Error, OSError):
    """The operating system refused an operation; ``errno`` is kept.

    *operation* is the failed call (``read``, ``write``, ``flush`` ...),
    *offset* the byte it concerned where there is one.
    """

    def __init__(
        self,
        code: int,
        *,
        path: str | None = None,
        operation: str = "",
        offset: int | None = None,
        message: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.operation = operation
        self.offset = offset
        text = message or os.strerror(code)
        if message is None and operation:
            where = "" if offset is None else f" at byte {offset}"
            text = f"{operation} failed{where}: {text}"
        super().__init__(text, path=path, hint=hint)
        self.errno = code
        self.strerror = os.strerror(code)

    @classmethod
    def from_os(
        cls, error: OSError, *, path: str | None = None, operation: str = "", offset: int | None = None
    ) -> StorageError:
        """Wrap *error*, keeping its errno (EIO where it has none)."""
        return cls(error.errno or _errno.EIO, path=path, operation=operation, offset=offset)
