# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Incremental backup: chains of overlays that are the disk of each day, and no more than what changed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import qcowlib
from qcowlib.qcow2.create import CreateOptions, create
from qcowlib.storage.memory import MemoryStorage
from tests.qcowlib.jobs.samples import qemu_img

MiB = 1 << 20


def change(image: qcowlib.Image, rng: random.Random, model: bytearray) -> None:
    """Some writes, zeros and discards, and now and then another size."""
    if rng.random() < 0.4:
        size = rng.choice([3, 4, 6, 8]) * MiB - rng.choice([0, 512])
        image.resize(size, shrink=True)
        model[:] = model[:size].ljust(size, b"\0")
    for _ in range(rng.randint(1, 8)):
        offset = rng.randrange(len(model))
        length = min(rng.choice([1, 512, 5000, 70000, 300000]), len(model) - offset)
        kind = rng.choice(["write", "write", "zero", "zeros written"])
        data = rng.randbytes(length) if kind == "write" else bytes(length)
        if kind == "zero":
            image.zero(length, offset)
        else:
            image.pwrite(data, offset)
        model[offset : offset + length] = data


def allocated(path: Path) -> int:
    with qcowlib.open(path, backing=False) as image:
        return sum(extent.length for extent in image.extents() if extent.kind != "hole")


@pytest.mark.real("qemu-img")
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_a_chain_of_increments_is_the_disk_of_each_day(tmp_path: Path, cluster_size: int, compress: bool) -> None:
    rng = random.Random(cluster_size + compress)
    disk = tmp_path / "disk"
    model = bytearray(4 * MiB)
    qcowlib.create(disk, len(model), cluster_size=rng.choice([4096, 65536]))
    with qcowlib.open(disk, "r+") as image:
        change(image, rng, model)
        image.add_bitmap("day0", 4096)
        qcowlib.convert(image, tmp_path / "day0")
        qcowlib.convert(image, tmp_path / "restored", format="raw")
    last = tmp_path / "day0"
    for day in range(1, 5):
        with qcowlib.open(disk, "r+") as image:
            change(image, rng, model)
            image.add_bitmap(f"day{day}", 4096)
            image.disable_bitmap(f"day{day - 1}")
            changed = sum(length for _, length in image.bitmap_extents(f"day{day - 1}"))
            target = tmp_path / f"day{day}"
            bound = qcowlib.measure_backup(image, f"day{day - 1}", cluster_size=cluster_size)
            qcowlib.backup(
                image, target, f"day{day - 1}", backing=last.name, backing_format="qcow2",
                cluster_size=cluster_size, compress=compress,
            )  # fmt: skip
            image.remove_bitmap(f"day{day - 1}")
        assert target.stat().st_size <= bound.required <= bound.fully_allocated
        assert allocated(target) <= changed + 2 * cluster_size * (changed // 4096 + 1)
        with qcowlib.open(target) as image:
            assert image.pread(len(model) + 1, 0) == bytes(model)
        planned = qcowlib.plan_restore(target, tmp_path / "restored", target_format="raw")
        assert planned.data + planned.zeros == allocated(target)
        assert planned[2:] == ((tmp_path / "restored").stat().st_size, len(model))
        qcowlib.restore(target, tmp_path / "restored", target_format="raw")
        assert (tmp_path / "restored").read_bytes() == bytes(model)
        assert "No errors" in qemu_img("check", target).stdout
        last = target
    assert "identical" in qemu_img("compare", last, disk).stdout


def test_several_bitmaps_are_one_backup(tmp_path: Path) -> None:
    disk, base, target = (tmp_path / name for name in ("disk", "base", "target"))
    qcowlib.create(disk, 8 * MiB)
    qcowlib.create(base, 8 * MiB, format="raw")
    with qcowlib.open(disk, "r+") as image:
        image.add_bitmap("one", 65536)
        image.pwrite(b"1" * 10, 0)
        image.disable_bitmap("one")
        image.add_bitmap("two", 512)
        image.pwrite(b"2" * 10, 65536 + 5)
        image.pwrite(b"3" * 10, 5 * MiB)
        image.disable_bitmap("two")
        qcowlib.backup(image, target, ["one", "two"], backing="base", backing_format="raw")
    with qcowlib.open(target) as image, qcowlib.open(disk) as source:
        assert bool(qcowlib.compare(image, source))
    with qcowlib.open(target, backing=False) as image:
        found = [(extent.start, extent.length) for extent in image.extents() if extent.kind != "hole"]
    assert found == [(0, 2 * 65536), (5 * MiB, 65536)]


def test_only_what_a_bitmap_recorded_is_restored_and_cut_jobs_are_finished_by_another_call(tmp_path: Path) -> None:
    disk, base, target = (tmp_path / name for name in ("disk", "base", "target"))
    qcowlib.create(disk, 8 * MiB)
    with qcowlib.open(disk, "r+") as image:
        image.pwrite(b"old" * MiB, 0)
        qcowlib.convert(image, base, format="raw")
        image.add_bitmap("b")
        image.pwrite(b"new" * 1_390_000, 4 * MiB)
        image.zero(MiB, 0)
        qcowlib.backup(image, target, "b", backing="base", backing_format="raw", check_backing=False)
    calls = iter(range(100))
    with pytest.raises(qcowlib.Cancelled):
        qcowlib.restore(target, base, target_format="raw", cancel=lambda: next(calls) > 0)
    qcowlib.restore(target, base, target_format="raw")
    with qcowlib.open(disk) as source, qcowlib.open(base, format="raw") as restored:
        assert bool(qcowlib.compare(source, restored))


def test_what_cannot_be_a_backup_is_refused_before_a_file_is_made(tmp_path: Path) -> None:
    file = MemoryStorage()
    create(file, CreateOptions(size=MiB))
    target = tmp_path / "target"
    (tmp_path / "base").write_bytes(bytes(512))
    with qcowlib.open(file, "r+", format="qcow2") as image:
        image.add_bitmap("b")
        where = {"backing": "base", "backing_format": "raw"}
        for bitmap, options, text in (
            ("x", {}, "'x' not found"),
            ([], {}, "at least one"),
            ("b", {"compat": "0.10"}, "version 3"),
            ("b", {"data_file": "d"}, "one plain file"),
            ("b", {"cluster_size": 1000}, "power of two"),
            ("b", {"backing": "nothing"}, "No such file"),
        ):
            with pytest.raises(qcowlib.Error, match=text):
                qcowlib.backup(image, target, bitmap, **{**where, **options})  # type: ignore[arg-type]
            assert not target.exists()


def test_a_failed_backup_leaves_no_file(tmp_path: Path) -> None:
    file = MemoryStorage()
    create(file, CreateOptions(size=8 * MiB))
    with qcowlib.open(file, "r+", format="qcow2") as image:
        image.add_bitmap("b")
        image.pwrite(b"x" * 8 * MiB, 0)
        calls = iter(range(100))
        with pytest.raises(qcowlib.Cancelled):
            qcowlib.backup(
                image, tmp_path / "target", "b", backing="base", backing_format="raw", check_backing=False,
                cancel=lambda: next(calls) > 0,
            )  # fmt: skip
    assert not (tmp_path / "target").exists()


def test_an_advanced_bitmap_serves_every_round(tmp_path: Path) -> None:
    rng = random.Random(4)
    disk, last = tmp_path / "disk", tmp_path / "day0"
    model = bytearray(4 * MiB)
    qcowlib.create(disk, len(model))
    with qcowlib.open(disk, "r+") as image:
        change(image, rng, model)
        image.add_bitmap("nightly", 4096)
    qcowlib.convert(disk, last)
    for day in range(1, 5):
        with qcowlib.open(disk, "r+") as image:
            change(image, rng, model)
            recorded = sum(length for _, length in image.bitmap_extents("nightly"))
        target = tmp_path / f"day{day}"
        changed = qcowlib.backup(
            disk, target, "nightly", backing=last.name, backing_format="qcow2", advance=True, cluster_size=4096
        )
        assert changed == recorded
        with qcowlib.open(target) as image:
            assert image.pread(len(model) + 1, 0) == bytes(model)
        with qcowlib.open(disk) as image:
            assert list(image.bitmap_extents("nightly")) == []
            assert image.bitmaps()[0].enabled
        last = target


def test_a_bitmap_is_advanced_only_where_nothing_can_be_lost(tmp_path: Path) -> None:
    disk, base, target = (tmp_path / name for name in ("disk", "base", "target"))
    qcowlib.create(disk, MiB)
    qcowlib.create(base, MiB, format="raw")
    where = {"backing": "base", "backing_format": "raw", "advance": True}
    with qcowlib.open(disk, "r+") as image:
        image.add_bitmap("on")
        image.add_bitmap("off")
        image.pwrite(b"x", 0)
        image.disable_bitmap("off")
    for bitmap, options, text in (
        (["on", "off"], {}, "'off' is disabled"),
        ("on", {"cache": "unsafe"}, "not durable"),
        ("none", {}, "not found"),
    ):
        with pytest.raises(qcowlib.UsageError, match=text):
            qcowlib.backup(disk, target, bitmap, **where, **options)  # type: ignore[arg-type]
        assert not target.exists()
    with qcowlib.open(disk) as image, pytest.raises(qcowlib.UsageError, match="read-only"):
        qcowlib.backup(image, target, "on", **where)  # type: ignore[arg-type]
    with pytest.raises(qcowlib.Cancelled):
        qcowlib.backup(disk, target, "on", **where, cancel=lambda: True)  # type: ignore[arg-type]
    with qcowlib.open(disk) as image:
        assert list(image.bitmap_extents("on")) == [(0, 65536)]


def test_what_is_no_increment_is_not_restored(tmp_path: Path) -> None:
    base, whole, top = (tmp_path / name for name in ("base", "whole", "top"))
    qcowlib.create(base, MiB, format="raw")
    qcowlib.create(whole, MiB)
    qcowlib.create(top, MiB, backing="base", backing_format="raw")
    for increment, format in ((whole, "qcow2"), (base, "raw")):
        with pytest.raises(qcowlib.UsageError, match="not an increment"):
            qcowlib.restore(increment, base, format=format, target_format="raw")
    with qcowlib.open(top) as image, pytest.raises(qcowlib.UsageError, match="without its backing file"):
        qcowlib.restore(image, base, target_format="raw")
