# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Images to measure on, made without the library that is measured.

Invariant: a function gives the same image for the same arguments (realistic
data apart, which comes from files of this machine).
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import sys
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

KiB, MiB, GiB, TiB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
CLUSTER = 64 * KiB
COPIED = 1 << 63


def _big_endian(values: array[int]) -> bytes:
    if sys.byteorder == "little":
        values.byteswap()
    return values.tobytes()


def mapped_image(path: Path, size: int, order: Iterable[int], count: int) -> None:
    """Write a qcow2 image of *size* bytes with *count* allocated clusters of 64 KiB.

    *order* gives their guest clusters in host order; the data clusters are a hole of the file.
    """
    entries, per_block = CLUSTER // 8, CLUSTER // 2
    l1_size = -(-size // (CLUSTER * entries))
    l1_clusters = -(-l1_size * 8 // CLUSTER)
    fixed = 1 + l1_clusters + l1_size + count
    blocks = tables = 0
    while True:
        wanted = -(-(fixed + blocks + tables) // per_block)
        if wanted == blocks:
            break
        blocks, tables = wanted, -(-wanted * 8 // CLUSTER)
    l1 = (1 + tables + blocks) * CLUSTER
    l2 = l1 + l1_clusters * CLUSTER
    data = l2 + l1_size * CLUSTER
    table = array("Q", bytes(l1_size * CLUSTER))
    host = data | COPIED
    for cluster in order:
        table[cluster] = host
        host += CLUSTER
    total = data // CLUSTER + count
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQIIB7x",
        b"QFI\xfb", 3, 0, 0, 16, size, 0, l1_size, l1, CLUSTER, tables, 0, 0, 0, 0, 0, 4, 112, 0,
    )  # fmt: skip
    with open(path, "wb") as file:
        file.write(header)
        file.seek(CLUSTER)
        file.write(_big_endian(array("Q", [(1 + tables + i) * CLUSTER for i in range(blocks)])))
        file.seek((1 + tables) * CLUSTER)
        file.write(b"\0\1" * total)
        file.seek(l1)
        file.write(_big_endian(array("Q", [(l2 + i * CLUSTER) | COPIED for i in range(l1_size)])))
        file.seek(l2)
        file.write(_big_endian(table))
        file.truncate(data + count * CLUSTER)


def scattered_image(path: Path, size: int, count: int) -> None:
    """A qcow2 image whose *count* allocated clusters lie in random order at random places."""
    mapped_image(path, size, random.Random(1).sample(range(size // CLUSTER), count), count)


def durable_copy(source: Path, target: Path) -> None:
    """Copy a file, on to the storage: or the first barrier of the job would have to write out the copy."""
    target.unlink(missing_ok=True)
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())


def full_image(path: Path, size: int) -> None:
    """A qcow2 image with every cluster allocated, in guest order."""
    mapped_image(path, size, range(size // CLUSTER), size // CLUSTER)


def machine_files(limit: int) -> Iterator[bytes]:
    """Yield contents of files of this machine, at most *limit* bytes in all."""
    for top in ("/usr/bin", "/usr/lib", "/usr/share", "/usr/include"):
        for folder, folders, names in os.walk(top):
            folders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                if path.is_symlink() or not path.is_file() or not os.access(path, os.R_OK):
                    continue
                content = path.read_bytes()[:limit]
                limit -= len(content)
                yield content
                if limit <= 0:
                    return


def realistic_raw(path: Path, size: int) -> None:
    """A raw image of *size* bytes: files of this machine at 4 KiB steps, holes between, half of it empty."""
    chance = random.Random(2)
    with open(path, "wb") as file:
        for content in machine_files(size // 2):
            file.write(content)
            step = -file.tell() % 4096
            if chance.random() < 0.02:
                step += chance.randrange(1, 64) * CLUSTER
            file.seek(step, os.SEEK_CUR)
            if file.tell() >= size:
                break
        file.truncate(size)


def half_zero_raw(path: Path, size: int) -> None:
    """A raw image of *size* bytes, each second MiB random bytes, the others written zeros."""
    piece = random.Random(3).randbytes(MiB)
    with open(path, "wb") as file:
        for number in range(size // (2 * MiB)):
            file.write(number.to_bytes(8, "big") + piece[8:] + bytes(MiB))


def dense_raw(path: Path, size: int) -> None:
    """A raw image of *size* bytes without a zero cluster."""
    piece = random.Random(3).randbytes(MiB)
    with open(path, "wb") as file:
        for number in range(size // MiB):
            file.write(number.to_bytes(8, "big") + piece[8:])
