# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""JSON as qemu-img writes it, and the indented human form of the same data.

Invariant: keys come in the order of QEMU's hash table of 512 buckets, which
scripts have come to depend on; the order is a function of the keys alone
(within a bucket, of their order of insertion).
"""

from __future__ import annotations

from qcowlib.errors import printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from qcowlib.info import Json as Json

__all__ = ["compact", "human", "ordered", "pretty"]

_ESCAPES = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _bucket(key: str) -> int:
    data = key.encode("utf-8", "surrogateescape")
    value = 0x238F13AF * len(data)
    for index, byte in enumerate(data):
        value += byte << (index * 5 % 24)
    return (1103515243 * value + 12345) % 512


def ordered(items: Mapping[str, Json]) -> list[tuple[str, Json]]:
    """Return the items in hash-table order."""
    newest_first = list(items.items())[::-1]
    return sorted(newest_first, key=lambda item: _bucket(item[0]))


def _string(text: str) -> str:
    if text.isascii() and text.isprintable() and '"' not in text and "\\" not in text:
        return f'"{text}"'
    parts = []
    for char in text:
        code = ord(char)
        if char in _ESCAPES:
            parts.append(_ESCAPES[char])
        elif 0x20 <= code < 0x7F:
            parts.append(char)
        elif 0xD800 <= code <= 0xDFFF:
            parts.append("\\uFFFD")
        elif code > 0xFFFF:
            code -= 0x10000
            parts.append(f"\\u{0xD800 + (code >> 10):04X}\\u{0xDC00 + (code & 0x3FF):04X}")
        else:
            parts.append(f"\\u{code:04X}")
    return '"' + "".join(parts) + '"'


def _scalar(value: Json) -> str:
    if isinstance(value, str):
        return _string(value)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def compact(value: Json) -> str:
    """Return *value* on one line, as in ``json:{...}`` file names."""
    return "".join(_render(value, None))


def pretty(value: Json) -> str:
    """Return *value* over several lines, four spaces a level, with a final newline."""
    return "".join(_render(value, 0)) + "\n"


def _render(value: Json, level: int | None) -> list[str]:
    if isinstance(value, (str, int)) or value is None:
        return [_scalar(value)]
    mapping = isinstance(value, dict)
    opening, closing = ("{", "}") if mapping else ("[", "]")
    pairs: list[tuple[str | None, Json]] = []
    if isinstance(value, dict):
        pairs.extend(ordered(value))
    else:
        pairs.extend((None, item) for item in value)
    inner = None if level is None else level + 1
    before = "" if inner is None else "\n" + "    " * inner
    parts = [opening]
    for index, (key, item) in enumerate(pairs):
        if index:
            parts.append(", " if inner is None else ",")
        parts.append(before)
        if key is not None:
            parts += [_string(key), ": "]
        parts += _render(item, inner)
    if level is not None:
        parts.append("\n" + "    " * level)
    parts.append(closing)
    return parts


def human(value: Json, level: int) -> str:
    """Return *value* as indented lines: ``key: scalar``, ``key:`` above nested ones, ``[i]:`` in lists."""
    parts: list[str] = []
    if value is None or isinstance(value, (str, int)):
        return f"{'    ' * level}{human_scalar(value)}\n"
    if isinstance(value, dict):
        entries = [(key.replace("-", " "), item) for key, item in ordered(value)]
    else:
        entries = [(f"[{index}]", item) for index, item in enumerate(value)]
    for label, item in entries:
        nested = not (item is None or isinstance(item, (str, int)))
        text = f"\n{human(item, level + 1)}" if nested else f" {human_scalar(item)}\n"
        parts.append(f"{'    ' * level}{label}:{text}")
    return "".join(parts)


def human_scalar(value: Json) -> str:
    """Return a scalar as people read it; what an image says cannot move the cursor or begin a line."""
    return printable(value) if isinstance(value, str) else _scalar(value)
