# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Errors of storage domains, below :class:`qcowlib.errors.Error`.

Invariant: as there, each is one line that names the object it is about, and
text that was read from storage is escaped before it enters a message.
"""

from __future__ import annotations

import errno

from qcowlib.errors import Error, UsageError, printable

__all__ = [
    "AlreadyExists",
    "Illegal",
    "IllegalSpec",
    "IllegalSpecKind",
    "InvalidName",
    "LvmError",
    "MetadataError",
    "NoSpace",
    "NotAuthorized",
    "NotFound",
    "ProcessError",
    "UnsupportedVersion",
    "printable",
]


class InvalidName(UsageError):
    """A UUID, tag, key, value or path that must not become part of a domain."""


class UnsupportedVersion(UsageError):
    """The operation, type or block size does not exist in this domain version."""


class IllegalSpecKind:
    """Which rule of the table of legal volumes was broken (see :class:`IllegalSpec`)."""

    FORMAT = "format"
    TYPE = "type"
    DISK_TYPE = "disk type"
    BITMAPS = "bitmaps"
    SIZE = "size"


class IllegalSpec(UsageError):
    """A volume that may not be made; ``kind`` is one of :class:`IllegalSpecKind`."""

    def __init__(self, message: str, *, kind: str, path: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, path=path, hint=hint)
        self.kind = kind


class NotFound(Error, LookupError):
    """A domain, volume, image, lease or slot that is not there."""


class AlreadyExists(Error, FileExistsError):
    """Something of this name is there already."""


class Illegal(Error):
    """The state of an object forbids the operation (an ILLEGAL volume, a shared one, one with children)."""


class MetadataError(Error, ValueError):
    """Metadata that is damaged, incomplete, too long or contradicts itself.

    ``problems`` lists every single finding where a reader collects them.
    """

    def __init__(
        self, message: str, *, path: str | None = None, hint: str | None = None, problems: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message, path=path, hint=hint)
        self.problems = problems


class NoSpace(Error, OSError):
    """The domain, an area of it or a table in it is full."""

    def __init__(self, message: str, *, path: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, path=path, hint=hint)
        self.errno = errno.ENOSPC


class NotAuthorized(Error, PermissionError):
    """The caller's token does not allow a change (it expired, or is for another domain)."""


class ProcessError(Error):
    """A helper program failed, could not start or did not end in time."""

    def __init__(
        self,
        message: str,
        *,
        returncode: int | None = None,
        stderr: str = "",
        path: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, path=path, hint=hint)
        self.returncode = returncode
        self.stderr = stderr


class LvmError(ProcessError):
    """An LVM command failed; the message has LVM's own words."""
