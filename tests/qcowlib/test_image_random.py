# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Random work on one image, against a byte model and against qemu-img reading the result."""

from __future__ import annotations

import random
import subprocess
import threading
from pathlib import Path

import pytest

import qcowlib

pytestmark = pytest.mark.real("qemu-img")

SIZE = (2 << 20) + 3 * 512

GEOMETRIES = [
    "",
    "cluster_size=512",
    "cluster_size=4096,refcount_bits=1",
    "extended_l2=on",
    "extended_l2=on,cluster_size=16k",
    "compat=0.10",
    "lazy_refcounts=on",
    "refcount_bits=64,cluster_size=1024",
    "cluster_size=2M",
    "preallocation=metadata",
]


def qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True)


def make(folder: Path, options: str, backing: int | None, rng: random.Random) -> tuple[Path, bytearray]:
    """Create an image with qemu-img; returns its path and what a guest reads."""
    model = bytearray(SIZE)
    path = folder / "image.qcow2"
    words: list[str | Path] = ["create", "-q", "-f", "qcow2"]
    if options:
        words += ["-o", options]
    if backing is not None:
        data = rng.randbytes(4096) * (backing // 4096)
        (folder / "base").write_bytes(data)
        model[: min(backing, SIZE)] = data[:SIZE]
        words += ["-b", "base", "-F", "raw"]
    qemu_img(*words, path, str(SIZE))
    return path, model


class Work:
    """One random session; every operation is applied to the image and to the model."""

    def __init__(self, path: Path, model: bytearray, rng: random.Random) -> None:
        self.path = path
        self.model = model
        self.rng = rng
        self.image = qcowlib.open(path, "r+")

    def place(self, lengths: list[int], aligned: float) -> tuple[int, int]:
        offset = self.rng.randrange(SIZE)
        if self.rng.random() < aligned:
            offset = offset // 65536 * 65536
        return offset, min(self.rng.choice(lengths), SIZE - offset)

    def write(self) -> None:
        offset, length = self.place([1, 511, 512, 4096, 65536, 200000, 1000000], 0.2)
        data = bytes([self.rng.randrange(1, 256)]) * length
        assert self.image.pwrite(data, offset) == length
        self.model[offset : offset + length] = data

    def zero(self) -> None:
        offset, length = self.place([512, 4096, 65536, 131072, 524288], 0.7)
        self.image.zero(length, offset, unmap=self.rng.random() < 0.5)
        self.model[offset : offset + length] = bytes(length)

    def discard(self) -> None:
        """Whole clusters become zeros, or keep their bytes where the format cannot say zero."""
        offset, length = self.place([512, 65536, 131072, 524288], 0.7)
        self.image.discard(length, offset)
        size = self.image.cluster_size
        assert size is not None
        after = self.image.pread(SIZE, 0)
        for at in range(0, SIZE, size):
            end = min(at + size, SIZE)
            inside = at >= offset and (end <= offset + length)
            if not inside or after[at:end] != bytes(end - at):
                assert after[at:end] == self.model[at:end]
        self.model[:] = after

    def flush(self) -> None:
        self.image.flush()

    def reopen(self) -> None:
        self.image.close()
        self.image = qcowlib.open(self.path, "r+")

    def read(self) -> None:
        offset, length = self.place([1, 512, 4096, 200000, SIZE], 0.2)
        assert self.image.pread(length, offset) == bytes(self.model[offset : offset + length])

    def run(self, count: int) -> None:
        kinds = [self.write] * 4 + [self.zero, self.discard, self.flush, self.read, self.reopen]
        for _ in range(count):
            self.rng.choice(kinds)()
        self.image.close()


@pytest.mark.parametrize("backing", [None, 3 << 20, 1 << 20], ids=["alone", "longer-base", "shorter-base"])
@pytest.mark.parametrize("options", GEOMETRIES)
def test_random_work_reads_back_here_and_in_qemu(tmp_path: Path, options: str, backing: int | None) -> None:
    if backing is not None and "preallocation" in options:
        options = "extended_l2=on," + options
    rng = random.Random(f"{options} {backing}")
    path, model = make(tmp_path, options, backing, rng)
    Work(path, model, rng).run(60)
    with qcowlib.open(path) as image:
        assert image.pread(SIZE, 0) == bytes(model)
    qemu_img("check", path)
    qemu_img("convert", "-O", "raw", path, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == bytes(model)


def test_info_and_check_of_an_open_image(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "1M")
    with qcowlib.open(path, "r+") as image:
        image.pwrite(b"x" * 100000, 0)
        image.create_snapshot("s")
        info = image.info()
        assert (info.format, info.virtual_size, info.cluster_size) == ("qcow2", 1 << 20, 4096)
        assert [entry.name for entry in info.snapshots] == ["s"]
        report = image.check()
        assert report.clean
        assert report.allocated_clusters == 25


def test_repair_of_an_open_image_keeps_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    with qcowlib.open(path, "r+") as image:
        image.pwrite(b"x" * 100000, 0)
        image.flush()
        # A leak: the count of a free cluster is one.
        with path.open("r+b") as file:
            file.truncate(40 << 16)
            file.seek(0x20000 + 2 * 30)
            file.write(b"\0\1")
        assert image.check().leaks == 1
    with qcowlib.open(path, "r+") as image:
        image.pwrite(b"y" * 100000, 200000)
        report = image.check(repair="all")
        assert (report.leaks_fixed, report.leaks) == (1, 0)
        image.pwrite(b"z" * 100000, 400000)
        assert image.pread(100000, 0) + image.pread(100000, 200000) == b"x" * 100000 + b"y" * 100000
    qemu_img("check", path)


def test_many_small_reads_in_one_call(tmp_path: Path) -> None:
    path, model = make(tmp_path, "cluster_size=4k", 1 << 20, random.Random(7))
    rng = random.Random(8)
    Work(path, model, rng).run(30)
    offsets = [rng.randrange(SIZE - 1000) for _ in range(500)] + [0, 1000, 2000, SIZE - 1000]
    buffer = bytearray(1000 * len(offsets))
    with qcowlib.open(path) as image:
        assert image.preadinto_many(buffer, offsets, 1000) == len(buffer)
        for number, offset in enumerate(offsets):
            assert buffer[1000 * number : 1000 * number + 1000] == model[offset : offset + 1000]
        with pytest.raises(qcowlib.OutOfRange):
            image.preadinto_many(buffer, [SIZE - 999], 1000)
        with pytest.raises(qcowlib.UsageError):
            image.preadinto_many(bytearray(10), [0], 1000)


def test_closing_waits_for_readers_and_late_ones_get_an_error(tmp_path: Path) -> None:
    path, _ = make(tmp_path, "", None, random.Random(1))
    with qcowlib.open(path, "r+") as image:
        image.pwrite(b"x" * SIZE, 0)
    image = qcowlib.open(path)
    started = threading.Barrier(5)
    wrong: list[bytes] = []

    def read() -> None:
        started.wait()
        while True:
            try:
                data = image.pread(SIZE, 0)
            except qcowlib.Error:
                return
            if data != b"x" * SIZE:
                wrong.append(data[:16])

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    started.wait()
    image.close()
    # A file that gets the same descriptor must not be read in place of the image.
    with (tmp_path / "other").open("wb+") as other:
        other.write(b"y" * SIZE)
        for thread in threads:
            thread.join()
    assert wrong == []
