# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
from _typeshed import ReadableBuffer, WriteableBuffer

def load(*, libdeflate: str = "libdeflate.so.0", libz: str = "libz.so.1", libzstd: str = "libzstd.so.1") -> int: ...
def zstd_version() -> int: ...
def decompress(kind: int, allow: int, source: ReadableBuffer, target: WriteableBuffer) -> int: ...
def decompress_many(
    kind: int,
    allow: int,
    cluster: int,
    pieces: ReadableBuffer,
    source: ReadableBuffer,
    target: WriteableBuffer,
    start: int,
) -> tuple[int, int]: ...
def compress_zstd(level: int, source: ReadableBuffer, target: WriteableBuffer) -> int: ...
