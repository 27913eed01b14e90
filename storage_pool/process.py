# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Running helper programs.

Invariant: never a shell; the environment is built, not inherited; every run
has a deadline after which the whole process group is killed; what is kept of
the output is bounded, and so is the number of processes at once.  This is the
only module of the package that may start processes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import IO, NamedTuple, Protocol

from .errors import ProcessError, printable

__all__ = ["Completed", "ProcessRunner", "SystemRunner"]

#: Bytes kept of each output stream; a report of 2,000 volumes is about 2 MB.
OUTPUT_LIMIT = 64 << 20
#: Processes of one runner at once; more LVM commands only wait for each other's locks.
PROCESS_LIMIT = 10
#: Exit status of helpers that kill what they run.
_KILLED = 137


class Completed(NamedTuple):
    """How a program ended; *report* is what it wrote to the report descriptor."""

    argv: tuple[str, ...]
    returncode: int
    stdout: bytes
    stderr: bytes
    report: bytes

    def message(self) -> str:
        """Return the last non-empty line of standard error, printable."""
        lines = [line.strip() for line in self.stderr.decode("utf-8", "backslashreplace").splitlines() if line.strip()]
        return printable(lines[-1]) if lines else f"exit status {self.returncode}"


class ProcessRunner(Protocol):
    """Runs one program to its end."""

    def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        report_variable: str | None = None,
        timeout_s: float = 60.0,
    ) -> Completed:
        """Run *argv* and return how it ended, whatever the exit status.

        *env* is added to a minimal environment.  With *report_variable* the
        program gets an open descriptor, whose number is in the variable of
        that name, and what it writes there is ``Completed.report``.

        Raises: ProcessError when it cannot be started or misses the deadline.
        """


class SystemRunner:
    """The real one; runs *limit* programs at once, further callers wait.

    Programs also get the descriptors that *inherit* returns.
    """

    __slots__ = ("_closed", "_env", "_guard", "_inherit", "_killed", "_running", "slots")

    def __init__(
        self,
        path: str = "/usr/sbin:/usr/bin:/sbin:/bin",
        *,
        limit: int = PROCESS_LIMIT,
        inherit: Callable[[], Sequence[int]] = tuple,
    ) -> None:
        self._env = {"PATH": path, "LC_ALL": "C"}
        self._inherit = inherit
        self._running: set[int] = set()
        #: Groups that were killed, of which something may be stuck in the kernel.
        self._killed: set[int] = set()
        self._guard = threading.Lock()
        self._closed = False
        self.slots = threading.BoundedSemaphore(limit)

    def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        report_variable: str | None = None,
        timeout_s: float = 60.0,
    ) -> Completed:
        """See :meth:`ProcessRunner.run`."""
        variables = {**self._env, **(env or {})}
        with self.slots, contextlib.ExitStack() as stack:
            # Files instead of pipes: a program with much to say on two
            # descriptors cannot block, and nothing has to be read meanwhile.
            out, err, report = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
            passed = tuple(self._inherit())
            if report_variable is not None:
                passed = (*passed, report.fileno())
                variables[report_variable] = str(report.fileno())
            process = self._start(argv, (out, err), variables, passed)
            try:
                returncode = _wait(process, argv[0], timeout_s)
            finally:
                if process.returncode in (None, -signal.SIGKILL, _KILLED):
                    self._killed.add(process.pid)
                self._running.discard(process.pid)
            streams = []
            for stream in (out, err, report):
                stream.seek(0)
                streams.append(stream.read(OUTPUT_LIMIT))
        return Completed(tuple(argv), returncode, *streams)

    def _start(
        self, argv: Sequence[str], streams: tuple[IO[bytes], IO[bytes]], env: Mapping[str, str], passed: Sequence[int]
    ) -> subprocess.Popen[bytes]:
        # One that is being started is either not started or known to be running.
        with self._guard:
            if self._closed:
                raise ProcessError(f"{printable(argv[0])} was not started, the time for it is over")
            try:
                process = subprocess.Popen(
                    list(argv),
                    stdin=subprocess.DEVNULL,
                    stdout=streams[0],
                    stderr=streams[1],
                    env=env,
                    pass_fds=passed,
                    start_new_session=True,
                    close_fds=True,
                )
            except (OSError, ValueError) as error:
                raise ProcessError(f"cannot run {printable(argv[0])}: {printable(str(error))}") from error
            self._running.add(process.pid)
        return process

    def close(self) -> bool:
        """Start no more programs, and end those that run; their callers see how they ended.

        Returns whether none is left, nor anything that they started; one that
        is stuck in the kernel ends when its I/O returns.  Ask again by another call.
        """
        with self._guard:
            self._closed = True
            running = set(self._running)
        for pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        groups = running | self._killed
        return not groups or groups.isdisjoint(_groups_alive())


def _groups_alive() -> set[int]:
    """Return the process groups in which something lives."""
    found = set()
    for name in os.listdir("/proc"):  # noqa: PTH208
        if not name.isdecimal():
            continue
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            # The name of the program, in parentheses, may hold anything.
            state, _parent, group = file.read().rpartition(b")")[2].split()[:3]
            if state not in (b"Z", b"X"):
                found.add(int(group))
    return found


def _wait(process: subprocess.Popen[bytes], name: str, timeout_s: float) -> int:
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        raise ProcessError(
            f"{printable(name)} did not end within {timeout_s:g} seconds and was killed",
            hint="The storage may not answer; see the kernel log.",
        ) from None
    finally:
        if process.returncode is None:
            # The group: a helper of the helper must not go on either.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            # A process stuck in the kernel dies only when its I/O returns.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)
