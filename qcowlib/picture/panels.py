# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What a picture of an image is made of: grids of cells that hold bytes by category.

Invariant: values only, made once and never changed; the cells of a panel add
up to the bytes it covers, whoever draws it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from qcowlib.info import Json

__all__ = ["KINDS", "OWNERS", "PIECES", "Category", "Panel", "Picture", "depths"]


class Category(NamedTuple):
    """One kind of byte: what a legend calls it, its colour, and whether it is something at all.

    *letter* stands for it where there is no colour.  What is *empty* never
    hides something in the same cell; what is *loud* is shown wherever it is.
    """

    label: str
    colour: str
    letter: str
    empty: bool = False
    loud: bool = False


class Panel(NamedTuple):
    """A grid: cell *i* covers *cell_bytes* bytes from ``i * cell_bytes`` on of *total* bytes.

    ``cells[i][c]`` is the bytes of category *c* in cell *i*, ``totals[c]`` those of all cells.
    """

    title: str
    note: str
    total: int
    cell_bytes: int
    categories: tuple[Category, ...]
    cells: Sequence[tuple[int, ...]]

    @property
    def totals(self) -> tuple[int, ...]:
        """Bytes by category."""
        return tuple(sum(column) for column in zip(*self.cells, strict=True)) or (0,) * len(self.categories)

    def to_dict(self) -> dict[str, Json]:
        """Return it as JSON takes it: bytes by label, all and by cell."""
        labels = [category.label for category in self.categories]
        return {
            "title": self.title,
            "total": self.total,
            "cell-bytes": self.cell_bytes,
            "totals": dict(zip(labels, self.totals, strict=True)),
            "categories": labels,
            "cells": [list(cell) for cell in self.cells],
        }


class Picture(NamedTuple):
    """All panels of one image; sizes in bytes, *facts* are lines for people."""

    path: str
    format: str
    size: int
    facts: tuple[tuple[str, str], ...]
    panels: tuple[Panel, ...]

    def to_dict(self) -> dict[str, Json]:
        """Return it as JSON takes it."""
        return {
            "filename": self.path,
            "format": self.format,
            "virtual-size": self.size,
            "panels": [panel.to_dict() for panel in self.panels],
        }


# Told apart with the usual kinds of colour blindness (after Okabe and Ito), on light and on dark ground.
_NOTHING = Category("nothing stored", "#8c959f", ".", empty=True)
_ZERO = Category("zeros", "#c9b458", "0", empty=True)

#: By the kinds of :mod:`qcowlib.driver`, in their order.
KINDS = (
    _NOTHING,
    _ZERO,
    Category("data", "#0072b2", "#"),
    Category("compressed", "#cc79a7", "c"),
    Category("behind the end of the layer", "#8c959f", ".", empty=True),
    Category("holes in the file", "#56b4e9", "-"),
)

#: By length of the pieces that are stored one behind the other.
PIECES = (
    _NOTHING,
    Category("pieces of 1 MiB and more", "#009e73", "="),
    Category("pieces of 64 KiB and more", "#e69f00", "+"),
    Category("smaller pieces", "#d55e00", "!"),
)

#: What refers to a place of the file.
OWNERS = (
    Category("free", "#8c959f", ".", empty=True),
    Category("header, L1, snapshot table, bitmaps", "#7b4fb5", "H"),
    Category("L2 tables", "#e69f00", "L"),
    Category("refcounts", "#f0e442", "R"),
    Category("data", "#0072b2", "#"),
    Category("compressed data", "#cc79a7", "c"),
    Category("data shared with snapshots", "#009e73", "s"),
    Category("data of snapshots alone", "#56b4e9", "o"),
    Category("leaked", "#d55e00", "!", loud=True),
)

_DEPTH_COLOURS = ("#0072b2", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#56b4e9", "#7b4fb5", "#5b6770")


def depths(names: Sequence[str]) -> tuple[Category, ...]:
    """Return the categories for the layers called *names*: nothing, then one a layer, the last for all deeper ones."""
    most = len(_DEPTH_COLOURS)
    labels = [*names[: most - 1], f"{names[most - 1]} and below"] if len(names) > most else list(names)
    layers = [
        Category(label, colour, str(n)) for n, (label, colour) in enumerate(zip(labels, _DEPTH_COLOURS, strict=False))
    ]
    return (_NOTHING, *layers)
