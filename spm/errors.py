# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Errors of leases and of the pool manager, below :class:`qcowlib.errors.Error`.

Invariant: a caller that catches :class:`NotSpm` catches every way of not
(or no longer) being allowed to change a pool.
"""

from __future__ import annotations

from qcowlib.errors import Busy, Error
from storage_pool.errors import NotAuthorized

__all__ = ["LeaseError", "LeaseHeld", "LeaseLost", "MailboxError", "NotSpm", "TaskFailed"]


class NotSpm(NotAuthorized):
    """This host does not manage the pool."""


class LeaseLost(NotSpm):
    """The lease that allowed the change is gone, expired, or can no longer be proved."""


class LeaseHeld(Busy):
    """Another live host holds the lease or the host id."""


class LeaseError(Error, OSError):
    """The lease manager failed; ``code`` is its own number where it gave one."""

    def __init__(self, message: str, *, code: int = 0, path: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, path=path, hint=hint)
        self.code = code


class MailboxError(Error, ValueError):
    """A message that cannot be sent, or bytes that are none."""


class TaskFailed(Error):
    """A recorded task could neither be finished nor rolled back."""
