# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Command lines, valid and not: what we print and return is what the real qemu-img prints and returns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.real("qemu-img", "qemu-io")

HERE = Path(__file__).parent
TABLES = sorted(HERE.glob("lines/*.txt"))


@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.stem)
def test_lines_do_the_same(table: Path, pair: Any) -> None:
    """Each line of a table runs on what the lines before it left; ``!`` lines only prepare.

    What the file occupies on the host is left out of lines with ``~``.
    """
    compared = 0
    for line in table.read_text().splitlines():
        if line.startswith("!"):
            pair.setup(line[1:])
        elif not line.startswith("#"):
            pair.compare(line)
            compared += 1
    assert compared > 5
