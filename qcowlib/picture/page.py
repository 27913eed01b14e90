# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A picture as one HTML page that needs nothing else: the drawing and the numbers behind it.

Invariant: text from images is escaped, and the page loads and runs nothing.
"""

from __future__ import annotations

from qcowlib.picture.panels import Panel, Picture
from qcowlib.picture.svg import escape, svg
from qcowlib.units import human_size

__all__ = ["page"]

_STYLE = """
:root{color-scheme:light dark}
body{margin:0 auto;max-width:1072px;padding:16px 24px;font:15px/1.5 system-ui,sans-serif;background:#fff;color:#1f2328}
svg{max-width:100%;height:auto}
table{border-collapse:collapse;margin:4px 0 24px}
caption{text-align:left;font-weight:600;padding:8px 0 4px}
th,td{padding:4px 16px 4px 0;border-bottom:1px solid #d1d9e0;text-align:left;font-weight:400}
td.n{text-align:right;font-variant-numeric:tabular-nums}
i{display:inline-block;width:12px;height:12px;margin-right:8px;border:1px solid #8c959f}
@media (prefers-color-scheme:dark){body{background:#0d1117;color:#e6edf3}th,td{border-color:#3d444d}}
"""


def _row(label: str, colour: str, total: int, whole: int) -> str:
    share = f"{100 * total / whole:.1f} %" if whole else ""
    return (
        f'<tr><th scope="row"><i style="background:{colour}"></i>{escape(label)}</th>'
        f'<td class="n">{human_size(total)}</td><td class="n">{total}</td><td class="n">{share}</td></tr>'
    )


def _table(panel: Panel) -> str:
    rows = [
        _row(category.label, category.colour, total, panel.total)
        for category, total in zip(panel.categories, panel.totals, strict=True)
        if total
    ]
    return f"<table><caption>{escape(panel.title)}, {escape(panel.note)}</caption>{''.join(rows)}</table>"


def page(picture: Picture) -> str:
    """Return *picture* as one HTML document."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(picture.path)}</title><style>{_STYLE}</style></head>\n<body>\n"
        f"{svg(picture)}\n{''.join(map(_table, picture.panels))}\n</body></html>\n"
    )
