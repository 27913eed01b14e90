# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Many writes by one call leave what as many calls leave."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import qcowlib
from qcowlib.errors import OutOfRange, UsageError

SIZE = 3 << 20


def pieces_of(chance: random.Random, cluster: int) -> list[tuple[int, bytes]]:
    """Whole clusters mostly, ascending; some pieces longer, shorter, or beside the borders."""
    found, at = [], 0
    while True:
        at += chance.choice([0, 1, 2, 40]) * cluster + chance.choice([0, 0, 0, 512])
        length = chance.choice([1, 1, 1, 5, 90]) * cluster + chance.choice([0, 0, 0, 700])
        if at + length > SIZE:
            return found
        found.append((at, chance.randbytes(length)))
        at += length
        if chance.random() < 0.9:
            at = -(-at // cluster) * cluster


@pytest.mark.parametrize("changes", [{}, {"lazy_refcounts": True}, {"extended_l2": True, "cluster_size": 16384}])
@pytest.mark.parametrize("seed", range(6))
def test_pieces_in_any_places_read_back(tmp_path: Path, changes: dict[str, object], seed: int) -> None:
    chance = random.Random(seed)
    cluster = int(str(changes.get("cluster_size", 4096)))
    base, path = tmp_path / "base.raw", tmp_path / "image.qcow2"
    content = bytearray(chance.randbytes(SIZE))
    base.write_bytes(content)
    qcowlib.create(path, None, backing=base, backing_format="raw", **{"cluster_size": 4096, **changes})
    with qcowlib.open(path, "r+") as image:
        for turn in range(4):
            pieces = pieces_of(chance, cluster)
            assert image.pwrite_many(pieces) == sum(len(data) for _, data in pieces)
            for at, data in pieces:
                content[at : at + len(data)] = data
            if turn == 1:
                image.create_snapshot("one")
            assert image.pread(SIZE, 0) == content
        report = image.check()
        assert not report.corruptions and not report.leaks
    with qcowlib.open(path) as image:
        assert image.pread(SIZE, 0) == content


def test_a_piece_out_of_range_or_order_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    qcowlib.create(path, SIZE)
    with qcowlib.open(path, "r+") as image:
        with pytest.raises(OutOfRange):
            image.pwrite_many([(0, b"x"), (SIZE, b"y")])
        with pytest.raises(UsageError, match="ascend"):
            image.pwrite_many([(1, b"x"), (1, b"y")])
        assert image.pread(2, 0) == b"\0\0"
        assert image.pwrite_many([]) == 0
