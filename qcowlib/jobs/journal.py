# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A small file that says how far a job is.

Invariant: it is replaced whole, and durable before the call returns, so that
what follows from it may be done then; what a reader finds is one version of it.
"""

from __future__ import annotations

import json
import os
from typing import Final

from qcowlib.errors import FormatError, StorageError, printable
from qcowlib.storage.file import sync_directory

__all__ = ["read_journal", "remove_journal", "write_journal"]

_MAX: Final = 16 << 20


def write_journal(path: str, content: dict[str, object]) -> None:
    """Replace the journal at *path* by *content*.  Raises StorageError."""
    new = f"{path}.new"
    try:
        with open(new, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(json.dumps(content, indent=1))
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)  # noqa: PTH105
    except OSError as error:
        raise StorageError.from_os(error, path=path, operation="write") from error
    sync_directory(path)


def read_journal(path: str, what: str) -> dict[str, object] | None:
    """Return the content of the journal of *what* at *path*; ``None`` where there is none.

    Raises: FormatError, StorageError.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(_MAX + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError.from_os(error, path=path, operation="read") from error
    try:
        if len(raw) > _MAX:
            raise ValueError("too long")
        content = json.loads(raw.decode("utf-8", "surrogateescape"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise FormatError(f"this is no journal of {what}: {printable(str(error))[:200]}", path=path) from error
    return content


def remove_journal(path: str) -> None:
    """Remove the journal, durably.  Raises StorageError."""
    try:
        os.unlink(path)  # noqa: PTH108
    except OSError as error:
        raise StorageError.from_os(error, path=path, operation="remove") from error
    sync_directory(path)
