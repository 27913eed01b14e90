# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Streams, prefixes and failures of the command.

Invariant: everything the command says goes through one :class:`Console`.
Standard output is collected and written at the flush points of qemu-img (its
order against standard error is part of the interface); standard error is
written at once.  A reader that went away never turns into an error.
"""

from __future__ import annotations

import os

__all__ = ["Console", "Failure", "usage_failure"]

#: Replaced by the console, which knows the program's name.
USAGE_HINT = "\0usage"

#: Collected output is written when it exceeds this many bytes.
_LIMIT = 1 << 16


class Failure(Exception):
    """The command ends with exit status *code* after these messages.

    Each of the *messages* is printed with the program's name in front; *hint*
    follows them as it is and brings its own newlines.
    """

    def __init__(self, *messages: str, hint: str = "", code: int = 1) -> None:
        super().__init__(*messages)
        self.messages = messages
        self.hint = hint
        self.code = code


def usage_failure(message: str) -> Failure:
    """Return the failure for a wrong command line; the console adds where to find help."""
    return Failure(message, hint=USAGE_HINT)


class Console:
    """Standard output and error of one run of the command."""

    __slots__ = ("_collected", "_size", "broken", "prog", "stdout_is_tty")

    def __init__(self, prog: str) -> None:
        self.prog = prog
        self.stdout_is_tty = os.isatty(1)
        self.broken = False
        self._collected: list[bytes] = []
        self._size = 0

    def out(self, text: str) -> None:
        """Add *text*, which brings its own newlines, to standard output."""
        data = os.fsencode(text)
        self._collected.append(data)
        self._size += len(data)
        if self._size > _LIMIT or self.stdout_is_tty:
            self.flush()

    def flush(self) -> None:
        """Write what was collected.

        Raises OSError as the system does, except for a closed pipe.
        """
        if not self._size:
            return
        data = b"".join(self._collected)
        self._collected.clear()
        self._size = 0
        if self.broken:
            return
        try:
            _write_all(1, data)
        except BrokenPipeError:
            self.broken = True

    def err(self, text: str) -> None:
        """Write *text* to standard error at once."""
        try:
            _write_all(2, os.fsencode(text))
        except OSError:
            pass  # nobody is left to tell

    def error(self, message: str, hint: str = "") -> None:
        """Print one error line, then the hint as it is."""
        if hint == USAGE_HINT:
            hint = f"Try '{self.prog} --help' for more information\n"
        self.err(f"{self.prog}: {message}\n{hint}")

    def fail(self, failure: Failure) -> int:
        """Print what *failure* says and return its exit status."""
        for message in failure.messages[:-1]:
            self.error(message)
        if failure.messages:
            self.error(failure.messages[-1], failure.hint)
        return failure.code

    def warn(self, message: str, hint: str = "") -> None:
        """Print one warning line, then the hint as it is."""
        self.error(f"warning: {message}", hint)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
