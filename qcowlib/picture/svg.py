# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A picture as SVG: a grid for each panel, its legend, and what each area is when pointed at.

Invariant: text from images is escaped; the size of the drawing depends on the
number of cells, not on the image.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from qcowlib.errors import printable
from qcowlib.picture.panels import Panel, Picture
from qcowlib.picture.shade import STEPS, Shade, panel_shades, row_length, shade_text
from qcowlib.units import human_size

__all__ = ["STYLE", "escape", "grid", "svg"]

WIDTH: Final = 1024
_LEFT: Final = 92
_MARGIN: Final = 24
_TICKS: Final = 9
_LINE: Final = "\n"

#: Colours of text and ground, light and dark.
STYLE: Final = """
.qm{--ground:#ffffff;--ink:#1f2328;--soft:#59636e;--line:#d1d9e0;background:var(--ground);color:var(--ink)}
@media (prefers-color-scheme:dark){.qm{--ground:#0d1117;--ink:#e6edf3;--soft:#9198a1;--line:#3d444d}}
.qm text{font:13px system-ui,sans-serif;fill:var(--ink)}
.qm text.h{font-size:17px;font-weight:600}
.qm text.s{fill:var(--soft);font-size:12px}
.qm rect{shape-rendering:crispEdges}
.qm rect.g{fill:none;stroke:var(--line)}
.qm rect.n{fill-opacity:.13}
"""


def escape(text: str) -> str:
    """Return *text* for XML, without characters that a document must not have."""
    return (
        printable(text)
        .replace("&", "&amp;")
        .replace("<", "&lt;")
        .replace(">", "&gt;")
        .replace('"', "&quot;")
        .encode("utf-8", "replace")
        .decode()
    )


def _bands(panel: Panel, row: int) -> Iterator[tuple[int, int, Shade]]:
    """Yield (first cell, count, shade) of neighbours in one row that look the same."""
    shades = panel_shades(panel)
    first = 0
    while first < len(shades):
        end = first + 1
        limit = min((first // row + 1) * row, len(shades))
        while end < limit and shades[end] == shades[first]:
            end += 1
        yield first, end - first, shades[first]
        first = end


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def grid(panel: Panel, top: int) -> tuple[str, int]:
    """Return the drawing of *panel*'s cells from the height *top* on, and the height behind it."""
    row = row_length(len(panel.cells))
    rows = max(1, -(-len(panel.cells) // row))
    width = (WIDTH - _LEFT - _MARGIN) / row
    # Cells are never higher than wide by much: an image of few cells is a low strip.
    height = min(max(width, 4.0), 24.0)
    lines = []
    for first, count, shade in _bands(panel, row):
        category = panel.categories[shade.category]
        look = ' class="n"' if category.empty else ""
        opacity = (
            "" if category.empty or shade.step == STEPS else f' fill-opacity="{0.25 + 0.75 * shade.step / STEPS:g}"'
        )
        lines.append(
            f'<rect x="{_number(_LEFT + first % row * width)}" y="{_number(top + first // row * height)}" '
            f'width="{_number(count * width)}" height="{_number(height)}" fill="{category.colour}"{look}{opacity}>'
            f"<title>{_LINE.join(map(escape, shade_text(panel, first, count)))}</title></rect>"
        )
    bottom = top + rows * height
    lines.append(
        f'<rect class="g" x="{_LEFT}" y="{top}" width="{WIDTH - _LEFT - _MARGIN}" height="{_number(bottom - top)}"/>'
    )
    every = max(1, -(-rows // _TICKS))
    for number in range(0, rows, every):
        offset = human_size(number * row * panel.cell_bytes)
        lines.append(
            f'<text class="s" x="{_LEFT - 8}" y="{_number(top + number * height + min(height, 12))}" '
            f'text-anchor="end">{offset}</text>'
        )
    return "\n".join(lines), round(bottom + 0.5)


def _legend(panel: Panel, top: int) -> tuple[str, int]:
    lines, left = [], _LEFT
    for category, total in zip(panel.categories, panel.totals, strict=True):
        if not total:
            continue
        text = f"{category.label} {human_size(total)}"
        width = 28 + 7 * len(text)
        if left + width > WIDTH - _MARGIN and left > _LEFT:
            left, top = _LEFT, top + 20
        look = ' class="n"' if category.empty else ""
        lines.append(f'<rect x="{left}" y="{top - 10}" width="12" height="12" fill="{category.colour}"{look}/>')
        lines.append(f'<rect class="g" x="{left}" y="{top - 10}" width="12" height="12"/>')
        lines.append(f'<text x="{left + 18}" y="{top}">{escape(text)}</text>')
        left += width
    return "\n".join(lines), top + 12


def svg(picture: Picture) -> str:
    """Return *picture* as one SVG document."""
    facts = ", ".join(f"{name} {value}" for name, value in picture.facts)
    parts = [
        f'<text class="h" x="{_MARGIN}" y="34">{escape(picture.path)}</text>',
        f'<text class="s" x="{_MARGIN}" y="54">{escape(picture.format)}, {escape(facts)}</text>',
    ]
    height = 62
    for panel in picture.panels:
        height += 30
        parts.append(
            f'<text class="h" x="{_LEFT}" y="{height}">{escape(panel.title)} '
            f'<tspan style="font-weight:400;font-size:13px">{escape(panel.note)}; '
            f"a cell is {human_size(panel.cell_bytes)}</tspan></text>"
        )
        drawn, height = grid(panel, height + 10)
        legend, height = _legend(panel, height + 20)
        parts += [drawn, legend]
    height += _MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="qm" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img" aria-label="Map of {escape(picture.path)}">\n<style>{STYLE}</style>\n'
        f'<rect width="{WIDTH}" height="{height}" style="fill:var(--ground)"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )
