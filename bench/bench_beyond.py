# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What qemu-img has no command for, beside the command of it that reads or writes the same.

A difference beside a comparison, a survey beside a map, a seal beside a
comparison of all data, salvage beside ``convert --salvage``, a folder beside one
command for each image.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import pytest
from scale import Scale

import qcowlib

MIB = 1 << 20
BOTH = pytest.mark.parametrize("who", peers.installed("qcowlib", "qemu-img"))


@pytest.fixture(scope="module")
def disk(bench_dir: Path, half_zero: Path) -> Path:
    """A qcow2 image of the data that is half zeros."""
    path = bench_dir / "beyond.qcow2"
    qcowlib.convert(half_zero, path, source_format="raw", cache="unsafe")
    return path


@pytest.fixture(scope="module")
def changed(bench_dir: Path, disk: Path) -> Path:
    """An overlay of it with a few changes."""
    path = bench_dir / "changed.qcow2"
    qcowlib.create(path, None, backing=disk.name, backing_format="qcow2")
    with qcowlib.open(path, "r+") as image:
        for number in range(64):
            image.pwrite(number.to_bytes(8, "big") * 512, number * image.size // 64)
    return path


@BOTH
def bench_diff(benchmark: Any, measure: Callable[..., None], disk: Path, changed: Path, who: str) -> None:
    """Two points of a chain; the peer ends at the first difference, so it compares what is equal."""
    benchmark.group = "diff of an overlay and its base"

    def run() -> None:
        if who == "qcowlib":
            assert len(qcowlib.diff(disk, changed)) == 64
        else:
            peers.qemu_img("compare", "-q", "-f", "qcow2", "-F", "qcow2", disk, disk)

    measure(run, who=who)


@BOTH
def bench_apply(
    benchmark: Any, measure: Callable[..., None], bench_dir: Path, disk: Path, changed: Path, who: str
) -> None:
    """The changes of an overlay into a copy of its base; the peer commits them."""
    benchmark.group = "apply 64 changes"
    stream = io.BytesIO()
    qcowlib.write_diff(disk, changed, stream)
    target, over = bench_dir / "applied.qcow2", bench_dir / "over.qcow2"

    def fresh() -> None:
        shutil.copy(disk, target)
        shutil.copy(changed, over)
        peers.qemu_img("rebase", "-u", "-b", target.name, "-F", "qcow2", over)
        stream.seek(0)

    def run() -> None:
        if who == "qcowlib":
            qcowlib.apply(stream, target)
        else:
            peers.qemu_img("commit", "-q", over)

    measure(run, who=who, setup=fresh)
    peers.must_equal(changed, target)
    target.unlink()
    over.unlink()


@BOTH
def bench_survey(benchmark: Any, measure: Callable[..., None], full: Path, who: str) -> None:
    benchmark.group = "picture of a full image"

    def run() -> None:
        if who == "qcowlib":
            assert qcowlib.survey(full).panels
        else:
            peers.qemu_img_output("map", "--output=json", full)

    measure(run, who=who, slow=who != "qcowlib")


@pytest.mark.parametrize("job", ["seal", "verify"])
@BOTH
def bench_seal(
    benchmark: Any, measure: Callable[..., None], bench_dir: Path, disk: Path, scale: Scale, job: str, who: str
) -> None:
    """Hashes of all data; the peer reads as much twice, from two images."""
    benchmark.group = f"{job}, all data"
    other, sealed = bench_dir / "other-beyond.qcow2", bench_dir / "beyond.seal"
    shutil.copy(disk, other)
    qcowlib.seal(disk, sealed)

    def run() -> None:
        if who != "qcowlib":
            peers.qemu_img("compare", "-q", "-f", "qcow2", "-F", "qcow2", disk, other)
        elif job == "seal":
            qcowlib.seal(disk, sealed)
        else:
            assert qcowlib.verify(disk, sealed)

    measure(run, who=who, amount=scale.copy // MIB, unit="MiB")
    other.unlink()


@BOTH
def bench_salvage(benchmark: Any, measure: Callable[..., None], bench_dir: Path, disk: Path, who: str) -> None:
    benchmark.group = "salvage of a sound image"
    target = bench_dir / "salvaged.qcow2"

    def run() -> None:
        if who == "qcowlib":
            assert qcowlib.salvage(disk, target, cache="unsafe")
        else:
            peers.qemu_img("convert", "--salvage", "-t", "unsafe", "-O", "qcow2", disk, target)

    measure(run, who=who, setup=lambda: target.unlink(missing_ok=True))
    peers.must_equal(disk, target)
    target.unlink()


@BOTH
def bench_check_folder(benchmark: Any, measure: Callable[..., None], bench_dir: Path, scale: Scale, who: str) -> None:
    """Many images in one call; the peer is started for each."""
    benchmark.group = "check of many images"
    folder = bench_dir / "many"
    folder.mkdir()
    base = folder / "base.qcow2"
    qcowlib.create(base, 1 << 30)
    count = max(scale.overlays // 10, 2)
    names = [folder / f"{number}.qcow2" for number in range(count)]
    qcowlib.create_overlays(base, names, backing_format="qcow2")

    def look(path: str) -> bool:
        with qcowlib.open(path, backing=False) as image:
            return image.check().clean

    def run() -> None:
        if who == "qcowlib":
            assert all(answer.value for answer in qcowlib.many(look, qcowlib.images_in([folder])))
        else:
            for name in (base, *names):
                peers.qemu_img("check", "-q", name)

    measure(run, who=who, amount=count + 1)
    shutil.rmtree(folder)
