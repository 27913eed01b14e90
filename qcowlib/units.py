# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Sizes: constants, rounding, and the size texts that qemu-img reads and prints.

Invariant: pure functions on integers; no value is ever rounded silently.
"""

from __future__ import annotations

__all__ = ["SECTOR", "GiB", "KiB", "MiB", "TiB", "ceil_div", "human_size", "round_down", "round_up"]

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30
TiB = 1 << 40
SECTOR = 512


def ceil_div(value: int, unit: int) -> int:
    """Return the smallest integer not below ``value / unit``."""
    return -(-value // unit)


def round_up(value: int, unit: int) -> int:
    """Return the smallest multiple of *unit* not below *value*."""
    return -(-value // unit) * unit


def round_down(value: int, unit: int) -> int:
    """Return the largest multiple of *unit* not above *value*."""
    return value // unit * unit


def human_size(value: int) -> str:
    """Return *value* bytes as qemu-img prints it: ``196 KiB``, ``1.5 GiB``.

    Source: ``%0.3g`` of value / unit; the unit goes up as soon as the number
    would reach 1000.
    """
    number = float(value)
    for prefix in ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"):
        if number < 1000 or prefix == "Ei":
            break
        number /= 1024
    return f"{number:.3g} {prefix}B"
