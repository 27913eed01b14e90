# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
from array import array
from typing import Final

from _typeshed import ReadableBuffer, WriteableBuffer

FREE: Final = 0
DATA_CLUSTER: Final = 1
TABLE_CLUSTER: Final = 2
BLOCK_CLUSTER: Final = 3
FIXED: Final = 4

def mark_table(kinds: WriteableBuffer, table: ReadableBuffer, cluster_bits: int, stride: int) -> bool: ...
def add_counts(kinds: WriteableBuffer, block: ReadableBuffer, order: int, first: int) -> bool: ...
def assign(
    kinds: ReadableBuffer, end: int, kind: int, places: array[int], free: int, source: int, limit: int
) -> tuple[int, int, int]: ...
def moves(places: array[int], end: int, first: int, limit: int) -> list[tuple[int, int, int]]: ...
def repoint(
    words: WriteableBuffer, stride: int, compressed: bool, cluster_bits: int, end: int, places: array[int]
) -> int: ...
def copy_counts(source: ReadableBuffer, at: int, target: WriteableBuffer, to: int, count: int, order: int) -> None: ...
def clear_counts(block: WriteableBuffer, at: int, count: int, order: int) -> None: ...
