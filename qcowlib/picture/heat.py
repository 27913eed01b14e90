# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A picture in characters: for a terminal with colours, or as letters for anything else.

Invariant: the same cells either way; colours add nothing that letters do not say.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from qcowlib.picture.panels import Category, Panel, Picture
from qcowlib.picture.shade import STEPS, Shade, panel_shades
from qcowlib.units import human_size

__all__ = ["LABEL", "heat"]

#: Columns that the offset of a row takes.
LABEL: Final = 11
_BLOCKS: Final = " ░▒▓█"


def _rgb(category: Category) -> str:
    red, green, blue = (int(category.colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"\x1b[38;2;{red};{green};{blue}m"


def _coloured(shades: list[Shade], categories: tuple[Category, ...]) -> str:
    parts, last = [], -1
    for shade in shades:
        category = categories[shade.category]
        if shade.category != last:
            parts.append(_rgb(category))
            last = shade.category
        parts.append("·" if category.empty else _BLOCKS[shade.step * 4 // STEPS])
    return "".join(parts) + "\x1b[0m"


def _row(shades: list[Shade], categories: tuple[Category, ...], colour: bool) -> str:
    if colour:
        return _coloured(shades, categories)
    return "".join(categories[shade.category].letter for shade in shades)


def _legend(panel: Panel, colour: bool) -> str:
    parts = []
    for category, total in zip(panel.categories, panel.totals, strict=True):
        if total:
            mark = f"{_rgb(category)}{'·' if category.empty else '█'}\x1b[0m" if colour else category.letter
            parts.append(f"{mark} {category.label} {human_size(total)}")
    return "   ".join(parts)


def heat(picture: Picture, width: int, *, colour: bool) -> Iterator[str]:
    """Yield lines that draw *picture*, at most *width* columns wide for the cells and their offsets."""
    row = 1
    while row * 2 <= max(width - LABEL, 8):
        row *= 2
    for panel in picture.panels:
        yield f"{panel.title}, {panel.note}; a character is {human_size(panel.cell_bytes)}"
        shades = panel_shades(panel)
        for first in range(0, len(shades), row):
            line = _row(shades[first : first + row], panel.categories, colour)
            yield f"{human_size(first * panel.cell_bytes):>{LABEL - 1}} {line}".rstrip()
        yield _legend(panel, colour)
        yield ""
