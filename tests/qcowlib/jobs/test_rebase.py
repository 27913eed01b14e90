# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Rebase against qemu-img rebase: the same content and allocation on another backing file."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

import qcowlib
from qcowlib.jobs.rebase import rebase
from qcowlib.qcow2.directories import read_header
from qcowlib.storage.file import FileStorage
from tests.conftest import LONG
from tests.qcowlib.jobs.samples import SOURCE_OPTIONS, qcow2_image, qemu_img, raw_image

MiB = 1 << 20


def content(path: Path) -> bytes:
    with qcowlib.open(path) as image:
        return image.pread(image.size, 0)


def backing_of(path: Path) -> tuple[bytes | None, bytes | None]:
    storage = FileStorage.open(path)
    try:
        header = read_header(storage)
    finally:
        storage.close()
    return header.backing_file, header.backing_format


def scene(rng: random.Random, folder: Path) -> None:
    """``top`` on ``mid`` on ``old``, beside them ``new``, partly like ``old``."""
    folder.mkdir()
    size = rng.choice([2 * MiB, 3 * MiB + 512])
    raw_image(rng, folder / "old", size)
    data = bytearray((folder / "old").read_bytes()[: rng.choice([size, size // 1024 * 512])])
    for _ in range(6):
        offset = rng.randrange(len(data))
        data[offset : offset + 700] = rng.randbytes(min(700, len(data) - offset))
    (folder / "new").write_bytes(data[: len(data) // 512 * 512])
    options = rng.choice(SOURCE_OPTIONS)
    qcow2_image(rng, folder / "mid", size, options, folder / "old")
    words = ["-o", options] if options else []
    qemu_img("create", "-q", "-f", "qcow2", *words, "-b", "mid", "-F", "qcow2", folder / "top", size + MiB)
    with qcowlib.open(folder / "top", "r+") as image:
        for _ in range(4):
            image.pwrite(rng.randbytes(5000), rng.randrange(size))


def held_by_top(path: Path) -> list[list[int]]:
    """What the top layer has allocated, data or zeros, as [start, end]."""
    ranges: list[list[int]] = []
    for row in json.loads(qemu_img("map", "--output=json", path).stdout):
        if row["depth"] == 0 and row["present"]:
            if ranges and ranges[-1][1] == row["start"]:
                ranges[-1][1] += row["length"]
            else:
                ranges.append([row["start"], row["start"] + row["length"]])
    return ranges


@pytest.mark.real("qemu-img")
@pytest.mark.parametrize("target", ["new", "old", ""])
@pytest.mark.parametrize("seed", range(4 * LONG))
def test_result_is_that_of_qemu_img(tmp_path: Path, target: str, seed: int) -> None:
    rng = random.Random(f"{target} {seed}")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    scene(rng, ours)
    shutil.copytree(ours, theirs)
    before = content(ours / "top")
    words = ["-b", target, "-F", "raw"] if target else ["-b", ""]
    qemu_img("rebase", *words, theirs / "top")
    rebase(ours / "top", target or None, "raw" if target else None, workers=rng.choice([1, 3]))
    assert content(ours / "top") == before
    assert backing_of(ours / "top") == ((target.encode(), b"raw") if target else (None, None))
    qemu_img("check", ours / "top")
    assert held_by_top(ours / "top") == held_by_top(theirs / "top")


@pytest.mark.real("qemu-img")
def test_unsafe_changes_the_header_alone(tmp_path: Path) -> None:
    qcowlib.create(tmp_path / "top", MiB, backing="gone", backing_format="raw", check_backing=False)
    rebase(tmp_path / "top", "elsewhere/base", "qcow2", unsafe=True)
    assert backing_of(tmp_path / "top") == (b"elsewhere/base", b"qcow2")
    assert "elsewhere/base" in qemu_img("info", tmp_path / "top").stdout


def test_session_goes_on_with_the_new_header(tmp_path: Path) -> None:
    """A lazy image writes header fields when it is closed: not those of the old header."""
    (tmp_path / "base").write_bytes(b"b" * MiB)
    qcowlib.create(tmp_path / "top", MiB, backing="base", backing_format="raw", lazy_refcounts=True)
    rebase(tmp_path / "top", None)
    assert backing_of(tmp_path / "top") == (None, None)
    (tmp_path / "base").unlink()
    assert content(tmp_path / "top") == b"b" * MiB


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_zeros_of_the_old_base_hide_data_of_the_new_one(tmp_path: Path, compat: str) -> None:
    (tmp_path / "old").write_bytes(bytes(MiB))
    (tmp_path / "new").write_bytes(b"n" * (MiB - 512))
    qcowlib.create(tmp_path / "top", MiB, backing="old", backing_format="raw", compat=compat)
    rebase(tmp_path / "top", "new", "raw")
    assert content(tmp_path / "top") == bytes(MiB)


@pytest.mark.parametrize(
    ("name", "format", "message"),
    [
        ("base", None, "Could not change the backing file to 'base': backing format must be specified"),
        ("base", "vmdk", "Invalid format name: 'vmdk'"),
        ("missing", "raw", "Could not open new backing file 'missing'"),
        ("n" * 1100, "raw", "Could not change the backing file to"),
    ],
    ids=["no format", "unknown format", "missing", "too long"],
)
def test_refusals_change_nothing(tmp_path: Path, name: str, format: str | None, message: str) -> None:
    (tmp_path / "base").write_bytes(b"b" * MiB)
    qcowlib.create(tmp_path / "top", MiB, backing="base", backing_format="raw")
    before = (tmp_path / "top").read_bytes()
    with pytest.raises(qcowlib.Error, match=message):
        rebase(tmp_path / "top", name, format)
    assert (tmp_path / "top").read_bytes() == before


def test_cancelled_rebase_leaves_the_content_and_is_finished_by_the_next(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(8 * MiB)
    (tmp_path / "base").write_bytes(data)
    qcowlib.create(tmp_path / "top", 8 * MiB, backing="base", backing_format="raw")
    calls = 0

    def cancel() -> bool:
        nonlocal calls
        calls += 1
        return calls > 3

    with pytest.raises(qcowlib.Cancelled):
        rebase(tmp_path / "top", None, cancel=cancel, workers=1)
    assert backing_of(tmp_path / "top") == (b"base", b"raw")
    assert content(tmp_path / "top") == data
    rebase(tmp_path / "top", None)
    (tmp_path / "base").unlink()
    assert content(tmp_path / "top") == data
