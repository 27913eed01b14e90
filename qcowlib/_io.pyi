# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence

from _typeshed import WriteableBuffer

from qcowlib._extent import RunList
from qcowlib.storage.base import FdSegment

class LayerFds:
    def __init__(self, count: int) -> None: ...
    def set(self, layer: int, segments: Sequence[FdSegment] | None, pad: int) -> None: ...
    def direct(self, layer: int) -> bool: ...
    def read_runs(self, runs: RunList, buffer: WriteableBuffer, base: int) -> tuple[list[int], int, int, int]: ...
