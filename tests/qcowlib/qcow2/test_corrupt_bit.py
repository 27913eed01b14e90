# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A write that would destroy metadata is refused, and the image says so to everybody (I9, I10)."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest

import qcowlib

pytestmark = pytest.mark.real("qemu-img")

COPIED = 1 << 63
L2 = 0x40000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An image with an L2 table at 0x40000 and data behind it."""
    path = tmp_path / "image"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"], check=True)
    with qcowlib.open(path, "r+") as image:
        image.pwrite(b"x" * 65536, 0)
    return path


def point_at(path: Path, offset: int) -> None:
    """Make guest cluster 1 a COPIED data cluster at host *offset*."""
    with path.open("r+b") as file:
        file.seek(L2 + 8)
        file.write(struct.pack(">Q", COPIED | offset))


@pytest.mark.parametrize(
    ("offset", "owner"),
    [
        (0x10000, "refcount table"),
        (0x20000, "refcount block"),
        (0x30000, "active L1 table"),
        (L2, "active L2 table"),
    ],
)
def test_a_write_over_metadata_is_refused_and_marks_the_image(path: Path, offset: int, owner: str) -> None:
    point_at(path, offset)
    before = path.read_bytes()[offset : offset + 65536]
    image = qcowlib.open(path, "r+")
    with pytest.raises(qcowlib.CorruptImage, match=f"overlaps with {owner}"):
        image.pwrite(b"damage", 65536)
    with pytest.raises(qcowlib.Error):
        image.pwrite(b"more", 0)
    assert image.pread(3, 0) == b"xxx"
    with pytest.raises(qcowlib.Error):
        image.close()
    assert path.read_bytes()[offset : offset + 65536] == before
    with pytest.raises(qcowlib.FormatError, match="corrupt"):
        qcowlib.open(path, "r+")
    with qcowlib.open(path) as again:
        assert again.info().corrupt
    done = subprocess.run(["qemu-img", "info", path], capture_output=True, text=True, check=True)
    assert "corrupt: true" in done.stdout


def test_an_unaligned_entry_marks_the_image(path: Path) -> None:
    point_at(path, 0x50200)
    image = qcowlib.open(path, "r+")
    with pytest.raises(qcowlib.CorruptImage, match="unaligned"):
        image.pwrite(b"damage", 65536)
    with pytest.raises(qcowlib.Error):
        image.close()
    with qcowlib.open(path) as again:
        assert again.info().corrupt


def test_counts_that_call_metadata_free_do_not_give_it_out(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(0x20000 + 2 * 3)
        file.write(b"\0\0")
    image = qcowlib.open(path, "r+")
    with pytest.raises(qcowlib.CorruptImage, match="active L1 table"):
        image.pwrite(b"y" * 65536, 131072)
    with pytest.raises(qcowlib.Error):
        image.close()
