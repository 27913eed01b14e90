# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Reading compressed clusters: many by one call, and what is said of a damaged one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import qcowlib
from qcowlib.errors import CorruptImage
from qcowlib.image import Image
from qcowlib.ondisk import unpack_compressed

CLUSTER = 4096
COUNT = 200


def compressible(seed: int, cluster: int) -> bytes:
    chance = random.Random(seed)
    return (chance.randbytes(chance.randrange(1, cluster // 3)) + bytes(cluster))[:cluster]


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Path, bytes]:
    """An image with compressed clusters in random host order, plain ones and holes between."""
    path = tmp_path / "packed.qcow2"
    content = bytearray(COUNT * CLUSTER)
    qcowlib.create(path, len(content), cluster_size=CLUSTER)
    order = random.Random(1).sample(range(COUNT), COUNT)
    with qcowlib.open(path, "r+") as image:
        for number in order:
            data = compressible(number, CLUSTER)
            place = number * CLUSTER
            if number % 7 == 0:
                continue
            content[place : place + CLUSTER] = data
            if number % 5 == 0:
                image.pwrite(data, place)
            else:
                image.write_compressed(data, place)
    return path, bytes(content)


@pytest.mark.parametrize("start, length", [(0, COUNT * CLUSTER), (1, COUNT * CLUSTER - 2), (CLUSTER, 3 * CLUSTER)])
def test_compressed_clusters_in_any_host_order_read_right(packed: tuple[Path, bytes], start: int, length: int) -> None:
    path, content = packed
    with qcowlib.open(path) as image:
        assert image.pread(length, start) == content[start : start + length]


def spoil(image: Image, path: Path, guest: int) -> None:
    _, _, _, entry, _ = image.map(guest, CLUSTER)[0]
    offset, _ = unpack_compressed(entry, CLUSTER.bit_length() - 1)
    with path.open("r+b") as file:
        file.seek(offset)
        # The reserved block type of deflate.
        file.write(b"\xff\xff\xff\xff")


def test_a_damaged_cluster_among_many_is_named(packed: tuple[Path, bytes]) -> None:
    path, content = packed
    guest = 51 * CLUSTER
    with qcowlib.open(path) as image:
        spoil(image, path, guest)
        with pytest.raises(CorruptImage, match=f"guest offset {guest:#x} "):
            image.pread(len(content), 0)
        assert image.pread(guest, 0) == content[:guest]
