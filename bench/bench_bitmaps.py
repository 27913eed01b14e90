# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Changing what an image says of itself: bitmaps, amend, incremental backup, each on a copy of a scattered image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import images
import peers
import pytest
from scale import SCALE

import qcowlib

WHO = peers.installed("qcowlib", "qemu-img")


@pytest.fixture(scope="module")
def small(bench_dir: Path) -> Path:
    """As large for the guest as the scattered image, with a part of its clusters."""
    path = bench_dir / "small.qcow2"
    images.scattered_image(path, SCALE.scattered, SCALE.scattered_clusters // 32)
    return path


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Callable[[], None]:
    """Return what lays a fresh copy at ``tmp_path / "image"``."""

    def lay() -> None:
        images.durable_copy(small, tmp_path / "image")

    return lay


@pytest.mark.parametrize("who", WHO)
def bench_bitmap_add(
    benchmark: object, measure: Callable[..., None], copy: Callable[[], None], tmp_path: Path, who: str
) -> None:
    path = tmp_path / "image"
    benchmark.group = "bitmap --add"  # type: ignore[attr-defined]

    def ours() -> None:
        with qcowlib.open(path, "r+") as image:
            image.add_bitmap("b0")

    measure(
        {"qcowlib": ours, "qemu-img": lambda: peers.qemu_img("bitmap", "--add", path, "b0")}[who], who=who, setup=copy
    )
    with qcowlib.open(path) as image:
        assert [bitmap.name for bitmap in image.bitmaps()] == ["b0"]


@pytest.mark.parametrize("who", WHO)
def bench_amend_refcount_bits(
    benchmark: object, measure: Callable[..., None], copy: Callable[[], None], tmp_path: Path, who: str
) -> None:
    path = tmp_path / "image"
    benchmark.group = "amend refcount_bits"  # type: ignore[attr-defined]

    def ours() -> None:
        with qcowlib.open(path, "r+") as image:
            image.amend(qcowlib.AmendOptions(refcount_bits=64))

    measure(
        {"qcowlib": ours, "qemu-img": lambda: peers.qemu_img("amend", "-o", "refcount_bits=64", path)}[who],
        who=who,
        setup=copy,
    )
    with qcowlib.open(path) as image:
        assert image.info().refcount_bits == 64


@pytest.mark.parametrize("who", WHO)
def bench_incremental_backup(
    benchmark: object, measure: Callable[..., None], copy: Callable[[], None], small: Path, tmp_path: Path, who: str
) -> None:
    """A backup of what one bitmap recorded; qemu-img cannot do that offline, so it copies the whole image."""
    path, target = tmp_path / "image", tmp_path / "increment"
    benchmark.group = "backup of 1 MiB of changes"  # type: ignore[attr-defined]
    copy()
    with qcowlib.open(path, "r+") as image:
        image.add_bitmap("b0")
    with qcowlib.open(path, "r+") as image:
        image.pwrite(b"changed " * (1 << 17), 0)

    def ours() -> None:
        target.unlink(missing_ok=True)
        qcowlib.backup(path, target, "b0", backing=small, backing_format="qcow2", cache="unsafe")

    measure({"qcowlib": ours, "qemu-img": lambda: peers.qemu_img("convert", "-O", "qcow2", path, target)}[who], who=who)
    with qcowlib.open(target) as image:
        assert image.pread(8, 8) == b"changed "
