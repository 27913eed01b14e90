# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Helper programs of a manager, which must not outlive its right to change.

Invariant: S2 for programs that check no token.  Each is started with a valid
token only; ends at the token's deadline by itself, even when this process is
stopped; ends with this process, by the kernel; and holds the lease's
connection, so that the lease is not free before it is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from storage_pool.errors import ProcessError
from storage_pool.process import Completed, SystemRunner

from .errors import LeaseLost
from .lease_watch import LeaseToken

__all__ = ["GuardedRunner"]

_DIE_WITH_PARENT: Final = ("setpriv", "--pdeathsig", "KILL", "--")


class GuardedRunner:
    """A :class:`~storage_pool.process.ProcessRunner` bound to one token.

    *inherit* gives the descriptors that keep the lease.
    """

    def __init__(
        self,
        token: LeaseToken,
        clock: Callable[[], float],
        inherit: Callable[[], Sequence[int]],
        make: Callable[..., SystemRunner] = SystemRunner,
    ) -> None:
        self._token = token
        self._clock = clock
        self._inner = make(inherit=inherit)

    def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        report_variable: str | None = None,
        timeout_s: float = 60.0,
    ) -> Completed:
        """See :class:`~storage_pool.process.ProcessRunner`.  Raises: LeaseLost, ProcessError."""
        self._token.check()
        left_s = min(timeout_s, self._token.watch.deadline_s - self._clock())
        if left_s <= 0:
            raise LeaseLost("the right to change ends now, no program was started")
        # "timeout" ends with us, and what it runs ends with it.
        limit = ("timeout", "--signal=KILL", f"{left_s:.3f}")
        bound = (*_DIE_WITH_PARENT, *limit, *_DIE_WITH_PARENT, *argv)
        done = self._inner.run(bound, env=env, report_variable=report_variable, timeout_s=left_s + 1.0)
        if not self._token.valid or done.returncode in (-9, 137):
            raise ProcessError(f"{argv[0]} was ended, its time or the lease was over", returncode=done.returncode)
        return done._replace(argv=tuple(argv))

    def kill(self) -> None:
        """End all programs now: the lease is lost."""
        self._inner.kill()
