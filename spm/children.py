# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Helper programs of a manager, which must not outlive its right to change.

Invariant: S2 for programs that check no token.  Each is started with a valid
token only; ends at the token's deadline by itself, even when this process is
stopped, also between its last check and the start; ends with this process, by
the kernel; and holds the lease's connection, so that the lease is not free
before it is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from qcowlib.runtime import new_condition
from storage_pool.errors import ProcessError
from storage_pool.process import Completed, SystemRunner

from .errors import LeaseLost
from .lease_watch import LeaseToken

__all__ = ["GuardedRunner", "HelperPrograms"]

_DIE_WITH_PARENT: Final = ("setpriv", "--pdeathsig", "KILL", "--")
#: Runs a program until a moment, in hundredths of a second since boot; not at all after it.
_UNTIL: Final = """\
read -r now rest </proc/uptime
left=$(($1 - ${now%.*}${now#*.}))
[ "$left" -gt 0 ] || exit 137
shift
exec timeout --signal=KILL "$((left / 100)).$((left / 10 % 10))$((left % 10))" "$@"
"""


def _uptime_s() -> float:
    with open("/proc/uptime", "rb") as file:
        return float(file.read().split()[0])


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
        # Before the check: the end is counted from here, whatever happens until the program runs.
        now_s = _uptime_s()
        self._token.check()
        left_s = min(timeout_s, self._token.watch.deadline_s - self._clock())
        if left_s <= 0:
            raise LeaseLost("the right to change ends now, no program was started")
        # "timeout" ends with us, and what it runs ends with it.
        limit = ("sh", "-c", _UNTIL, "sh", str(int((now_s + left_s) * 100)))
        bound = (*_DIE_WITH_PARENT, *limit, *_DIE_WITH_PARENT, *argv)
        done = self._inner.run(bound, env=env, report_variable=report_variable, timeout_s=left_s + 1.0)
        if not self._token.valid or done.returncode in (-9, 137):
            raise ProcessError(f"{argv[0]} was ended, its time or the lease was over", returncode=done.returncode)
        return done._replace(argv=tuple(argv))

    def kill(self) -> bool:
        """End all programs now and start no more: the term is over; returns whether none is left."""
        return self._inner.close()


class HelperPrograms:
    """One runner for each term, whoever needs one: *killers*, of the service, has that of the present term."""

    def __init__(self, make: Callable[[LeaseToken], GuardedRunner], killers: list[Callable[[], bool]]) -> None:
        self._make = make
        self._killers = killers
        self._guard = new_condition()
        self._present: tuple[LeaseToken, GuardedRunner] | None = None

    def of(self, token: LeaseToken) -> GuardedRunner:
        """Return what runs the programs of *token*'s term.  Raises: LeaseLost when that is over and another began."""
        with self._guard:
            if self._present is not None and self._present[0] is token:
                return self._present[1]
            if not token.valid:
                raise LeaseLost("this term is over, no program is run in it")
            runner = self._make(token)
            self._present = token, runner
            self._killers[:] = [runner.kill]
            return runner
