# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""How large the benchmarks are: ``QCOWLIB_BENCH=full`` as published, otherwise tiny."""

from __future__ import annotations

import os
from typing import NamedTuple

FULL = os.environ.get("QCOWLIB_BENCH") == "full"


class Scale(NamedTuple):
    """Sizes of one run, in bytes and operations."""

    scattered: int
    scattered_clusters: int
    full: int
    copy: int
    data: int
    operations: int
    overlays: int
    rounds: int
    pool_volumes: int = 7
    pool_chain: int = 3


SCALE = (
    Scale(64 << 30, 65536, 1 << 40, 4 << 30, 1 << 30, 20000, 1000, 3, 350, 20)
    if FULL
    else Scale(1 << 30, 256, 1 << 30, 8 << 20, 8 << 20, 50, 5, 1)
)
