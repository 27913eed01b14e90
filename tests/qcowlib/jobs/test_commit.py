# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Commit against qemu-img commit, and what a cut or a second call does."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

import qcowlib
from qcowlib.jobs.commit import commit
from qcowlib.storage.file import FileStorage
from tests.conftest import LONG
from tests.qcowlib.jobs.samples import SOURCE_OPTIONS, qcow2_image, qemu_img, raw_image

MiB = 1 << 20


def content(path: Path, format: str = "qcow2") -> bytes:
    with qcowlib.open(path, format=format) as image:
        return image.pread(image.size, 0)


def chain(rng: random.Random, folder: Path, base_format: str, depth: int) -> list[tuple[Path, str]]:
    """A chain with layers of different sizes, the base first."""
    folder.mkdir()
    layers = [(folder / "layer0", base_format)]
    if base_format == "raw":
        raw_image(rng, layers[0][0], rng.choice([MiB, 3 * MiB + 512]))
    else:
        qcow2_image(rng, layers[0][0], rng.choice([MiB, 3 * MiB + 512]), rng.choice(SOURCE_OPTIONS), None)
    for number in range(1, depth):
        path = folder / f"layer{number}"
        below, format = layers[-1]
        size = rng.choice([MiB, 3 * MiB + 512, 5 * MiB])
        qemu_img("create", "-q", "-f", "qcow2", "-b", below.name, "-F", format, path, size)
        with qcowlib.open(path, "r+") as image:
            for _ in range(rng.randrange(8)):
                offset = rng.randrange(size) // 512 * 512
                length = min(size - offset, rng.choice([512, 4096, 65536, 300000 // 512 * 512]))
                if rng.random() < 0.6:
                    image.pwrite(rng.randbytes(length), offset)
                else:
                    image.zero(length, offset)
        layers.append((path, "qcow2"))
    return layers


@pytest.mark.real("qemu-img")
@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("base_format", ["raw", "qcow2"])
@pytest.mark.parametrize("seed", range(3 * LONG))
def test_result_is_that_of_qemu_img(tmp_path: Path, base_format: str, depth: int, seed: int) -> None:
    rng = random.Random(f"{base_format} {depth} {seed}")
    layers = chain(rng, tmp_path / "ours", base_format, depth)
    shutil.copytree(tmp_path / "ours", tmp_path / "theirs")
    top = layers[-1][0]
    guest = content(top)
    options: dict[str, Any] = {}
    words: list[str] = []
    lowest = seed % 3 == 1
    if lowest:
        options["base"] = layers[0][0]
        words = ["-b", str(tmp_path / "theirs" / "layer0")]
    elif seed % 3 == 2:
        options["empty"] = False
        words = ["-d"]
    qemu_img("commit", "-q", *words, tmp_path / "theirs" / top.name)
    commit(top, workers=rng.choice([1, 3]), **options)
    for path, format in layers:
        if format == "qcow2":
            qemu_img("check", path)
    target, format = layers[0] if lowest else layers[-2]
    assert content(target, format)[: len(guest)] == guest
    assert content(top) == guest
    qemu_img("compare", "-f", format, "-F", format, target, tmp_path / "theirs" / target.name)


@pytest.mark.real("qemu-img")
def test_emptied_overlay_is_as_short_as_a_new_one_and_a_second_call_changes_nothing(tmp_path: Path) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    base.write_bytes(bytes(4 * MiB))
    qcowlib.create(top, 4 * MiB, backing="base", backing_format="raw")
    empty = top.stat().st_size
    with qcowlib.open(top, "r+") as image:
        image.pwrite(b"x" * (3 * MiB), 500000)
    commit(top)
    assert base.read_bytes() == bytes(500000) + b"x" * (3 * MiB) + bytes(4 * MiB - 500000 - 3 * MiB)
    assert top.stat().st_size <= (empty + 65535) // 65536 * 65536
    with qcowlib.open(top) as image:
        assert {extent.depth for extent in image.extents()} == {1}
    commit(top)
    qemu_img("check", top)


def test_image_without_backing_file_is_refused(tmp_path: Path) -> None:
    qcowlib.create(tmp_path / "image", MiB)
    with pytest.raises(qcowlib.UsageError, match="does not have a backing file"):
        commit(tmp_path / "image")


def test_base_outside_the_chain_is_refused(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(bytes(MiB))
    qcowlib.create(tmp_path / "top", MiB, backing="base", backing_format="raw")
    with pytest.raises(qcowlib.UsageError, match="Did not find 'other' in the backing chain"):
        commit(tmp_path / "top", base="other")


def test_base_in_use_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    qcowlib.create(tmp_path / "base", MiB)
    qcowlib.create(tmp_path / "top", MiB, backing="base", backing_format="qcow2")
    with qcowlib.open(tmp_path / "top", "r+") as image:
        image.pwrite(b"x" * 4096, 0)
    before = (tmp_path / "base").read_bytes()
    with qcowlib.open(tmp_path / "base"), pytest.raises(qcowlib.Busy):
        commit(tmp_path / "top")
    assert (tmp_path / "base").read_bytes() == before
    assert content(tmp_path / "top")[:4096] == b"x" * 4096


def test_cancelled_commit_is_finished_by_the_next(tmp_path: Path) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    base.write_bytes(b"b" * 16 * MiB)
    qcowlib.create(top, 16 * MiB, backing="base", backing_format="raw")
    with qcowlib.open(top, "r+") as image:
        image.pwrite(b"t" * 12 * MiB, MiB)
    calls = 0

    def cancel() -> bool:
        nonlocal calls
        calls += 1
        return calls > 3

    with pytest.raises(qcowlib.Cancelled):
        commit(top, cancel=cancel, workers=1)
    guest = b"b" * MiB + b"t" * 12 * MiB + b"b" * 3 * MiB
    assert content(top) == guest
    commit(top)
    assert base.read_bytes() == guest


def test_storage_writes_what_was_copied_while_more_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    start = FileStorage.start_writeback

    def told(self: FileStorage) -> None:
        asked.append(Path(self.name).name)
        start(self)

    monkeypatch.setattr(FileStorage, "start_writeback", told)
    data = random.Random(1).randbytes(1 << 20)
    qcowlib.create(tmp_path / "base", 40 << 20)
    qcowlib.create(tmp_path / "top", None, backing="base", backing_format="qcow2")
    with qcowlib.open(tmp_path / "top", "r+") as image:
        for offset in range(0, image.size, len(data)):
            image.pwrite(data, offset)
    commit(tmp_path / "top")
    assert asked == ["base"] * 2
    with qcowlib.open(tmp_path / "base") as image:
        assert image.pread(len(data), 39 << 20) == data
