# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Processes that are scripted or watched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from storage_pool.process import Completed, ProcessRunner

__all__ = ["RecordingRunner", "ScriptedRunner", "completed"]

Answer = Callable[[Sequence[str]], Completed]


def completed(
    argv: Sequence[str], returncode: int = 0, *, report: bytes = b"", stderr: bytes = b"", stdout: bytes = b""
) -> Completed:
    """Return how a scripted program ended."""
    return Completed(tuple(argv), returncode, stdout, stderr, report)


class ScriptedRunner:
    """Answers every program by *answer* and remembers what was run."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.runs: list[tuple[str, ...]] = []

    def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        report_variable: str | None = None,
        timeout_s: float = 60.0,
    ) -> Completed:
        """See :class:`~storage_pool.process.ProcessRunner`."""
        self.runs.append(tuple(argv))
        return self._answer(argv)


class RecordingRunner:
    """Runs programs by *inner*, remembers them, and dies where told.

    ``kill_before`` is a predicate; what it accepts is not run but raises
    :class:`KeyboardInterrupt`, as a process that is killed there.
    """

    def __init__(self, inner: ProcessRunner) -> None:
        self._inner = inner
        self.runs: list[tuple[str, ...]] = []
        self.kill_before: Callable[[Sequence[str]], bool] | None = None

    def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        report_variable: str | None = None,
        timeout_s: float = 60.0,
    ) -> Completed:
        """See :class:`~storage_pool.process.ProcessRunner`."""
        if self.kill_before is not None and self.kill_before(argv):
            raise KeyboardInterrupt
        self.runs.append(tuple(argv))
        return self._inner.run(argv, env=env, report_variable=report_variable, timeout_s=timeout_s)
