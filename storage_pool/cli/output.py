# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What a command prints: one JSON document, or lines and tables for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from qcowlib.errors import printable

__all__ = ["Output"]


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

    def flush(self) -> None:
        """Hand everything to the system."""
        sys.stdout.flush()
