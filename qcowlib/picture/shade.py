# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""How a cell with several categories is shown: by the largest that is something, darker the more of it there is.

Invariant: a cell that holds anything is never drawn as empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from qcowlib.picture.panels import Category, Panel
from qcowlib.units import human_size

__all__ = ["STEPS", "Shade", "panel_shades", "row_length", "shade_text"]

#: Shades of one colour: cells that are filled up to a quarter, a half, three quarters, more.
STEPS: Final = 4


class Shade(NamedTuple):
    """What a cell shows: a category (its number) and one of the steps from 1 to :data:`STEPS`."""

    category: int
    step: int


def _shade(cell: tuple[int, ...], categories: tuple[Category, ...]) -> Shade:
    filled = sum(count for count, category in zip(cell, categories, strict=True) if not category.empty)
    if filled == 0:
        return Shade(max(range(len(cell)), key=cell.__getitem__), STEPS)
    shown = [n for n in range(len(cell)) if cell[n] and categories[n].loud]
    shown = shown or [n for n in range(len(cell)) if not categories[n].empty]
    best = max(shown, key=cell.__getitem__)
    return Shade(best, max(1, -(-filled * STEPS // sum(cell))))


def panel_shades(panel: Panel) -> list[Shade]:
    """Return what each cell of *panel* shows."""
    return [_shade(cell, panel.categories) for cell in panel.cells]


def row_length(cells: int) -> int:
    """Return how many cells a row has: twice as wide as high, a power of two, so that rows begin at round offsets."""
    row = 1
    while row * row < cells * 2:
        row *= 2
    return min(row, max(cells, 1))


def shade_text(panel: Panel, first: int, count: int) -> Iterator[str]:
    """Yield lines that say what *count* cells from *first* on are: the range, then bytes by category."""
    start = first * panel.cell_bytes
    end = min((first + count) * panel.cell_bytes, panel.total)
    yield f"{human_size(start)} to {human_size(end)} ({start:#x}, {end - start} bytes)"
    sums = [sum(column) for column in zip(*panel.cells[first : first + count], strict=True)]
    for category, total in zip(panel.categories, sums, strict=True):
        if total:
            yield f"{category.label}: {human_size(total)}"
