# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What a command prints: one JSON document, or lines and tables for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from qcowlib.cli.console import Console
from qcowlib.cli.progress import Progress
from qcowlib.errors import printable

__all__ = ["Output"]


class _OnStderr(Console):
    """Says everything on standard error: standard output may be the data."""

    __slots__ = ()

    def out(self, text: str) -> None:
        self.err(text)


class Output:
    """Collects the answer of one command."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def document(self, value: object) -> None:
        """Print a JSON document, keys sorted."""
        json.dump(value, sys.stdout, indent=4, sort_keys=True, ensure_ascii=False)
        sys.stdout.write("\n")

    def line(self, text: str) -> None:
        """Print one line; text from storage cannot break out of it."""
        sys.stdout.write(f"{printable(text)}\n")

    def fields(self, pairs: Sequence[tuple[str, object]]) -> None:
        """Print names and values below each other."""
        width = max((len(name) for name, _ in pairs), default=0)
        for name, value in pairs:
            self.line(f"{name + ':':<{width + 1}} {value}")

    def table(self, titles: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print rows in columns."""
        cells = [[printable(str(cell)) for cell in row] for row in [titles, *rows]]
        widths = [max(len(row[column]) for row in cells) for column in range(len(titles))]
        for row in cells:
            self.line("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())

    @contextmanager
    def progress(self, wanted: bool) -> Iterator[Callable[[int, int], None]]:
        """Give what a job tells its progress to: per cent as ``qcow convert -p`` prints them, or JSON lines."""
        told = Progress(_OnStderr("qpool"), wanted, form="json" if wanted and self.as_json else None)
        told.report(0)

        def report(done: int, total: int) -> None:
            told.report(done, total)

        yield report
        told.report(100)
        told.end()

    def flush(self) -> None:
        """Hand everything to the system."""
        sys.stdout.flush()
