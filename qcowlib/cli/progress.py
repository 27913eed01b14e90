# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Progress of long commands, in three forms.

Invariant: 0 and 100 per cent are always reported, anything between only when
it moved far enough, so that the cost does not depend on the size of the job.

compatible: ``    (N.NN/100%)`` and a carriage return on standard output, as
qemu-img; on a terminal under our own name the rate and the time left follow,
elsewhere each is a line of its own.
json: one object a line on standard error, for programs.
"""

from __future__ import annotations

import os
import time

from qcowlib.cli.jsonout import compact
from qcowlib.units import human_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from qcowlib.cli.console import Console

__all__ = ["Progress"]


class Progress:
    """Reports of one command; *step* is the smallest move worth a report, in per cent.

    *total* is the size of the work in bytes where that is known (for the
    rate).  *form* is None (compatible) or ``json``.
    """

    __slots__ = ("_after", "_console", "_enabled", "_form", "_last", "_start", "_step", "_total", "_verbose")

    def __init__(
        self, console: Console, enabled: bool, *, step: float = 1.0, total: int = 0, form: str | None = None
    ) -> None:
        self._console = console
        self._enabled = enabled
        self._form = form
        self._step = step
        self._total = total
        self._last = -1.0
        self._start = time.monotonic()
        own = not console.prog.startswith("qemu-img")
        # A pipe gets plain lines; only qemu-img's name promises what qemu-img prints there.
        self._after = "\n" if own and not console.stdout_is_tty else "\r"
        self._verbose = console.stdout_is_tty and own

    def report(self, done: float, total: float | None = None) -> None:
        """Report *done* of *total* (of 100 if None)."""
        if not self._enabled and self._form is None:
            return
        percent = done if total is None else (100.0 if total <= 0 else done * 100.0 / total)
        percent = min(max(percent, 0.0), 100.0)
        if 0 < percent < 100 and abs(percent - self._last) < self._step and self._last >= 0:
            return
        self._last = percent
        if self._form == "json":
            self._console.err(self._json(percent) + "\n")
        else:
            self._console.out(f"    ({percent:3.2f}/100%){self._details(percent)}{self._after}")
            self._console.flush()

    def within(self) -> Callable[[int, int], object]:
        """Return a function for a job's reports; the job's end is passed on once."""
        ended = False

        def report(done: int, total: int) -> None:
            nonlocal ended
            if 0 < done <= total and not ended:
                ended = done == total
                self.report(done, total)

        return report

    def end(self) -> None:
        """End the line of reports."""
        if self._enabled and self._form is None and self._after == "\r":
            self._console.out("\n")

    def _estimate(self, percent: float) -> tuple[float, float]:
        """Return bytes per second and seconds left (0 where unknown)."""
        elapsed = time.monotonic() - self._start
        if percent <= 0 or elapsed <= 0:
            return 0.0, 0.0
        return self._total * percent / 100 / elapsed, elapsed * (100 - percent) / percent

    def _json(self, percent: float) -> str:
        rate, left = self._estimate(percent)
        return compact({"percent": _Number(percent), "bytes-per-second": int(rate), "seconds-left": _Number(left)})

    def _details(self, percent: float) -> str:
        if not self._verbose:
            return ""
        rate, left = self._estimate(percent)
        speed = f" {human_size(int(rate))}/s" if rate else ""
        seconds = int(left)
        text = f"{speed} {seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02} left"
        return text.ljust(max(0, min(_width(), 100) - 22))


class _Number(int):
    """A number printed with two decimals."""

    def __new__(cls, value: float) -> _Number:
        self = super().__new__(cls, int(value))
        self._text = f"{value:.2f}"
        return self

    _text: str

    def __str__(self) -> str:
        return self._text


def _width() -> int:
    try:
        return os.get_terminal_size(1).columns
    except OSError:
        return 80
