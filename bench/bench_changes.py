# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Changes of one image: growth, repair, dirty bitmaps merged and removed; and dd.

Ours are calls in this process, a peer is a whole command.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import images
import peers
import pytest
from scale import SCALE

import qcowlib

BOTH = pytest.mark.parametrize("who", peers.installed("qcowlib", "qemu-img"))
GIB = 1 << 30


@pytest.fixture(scope="module")
def part(bench_dir: Path) -> Path:
    """Scattered clusters, with two bitmaps that have recorded some writes."""
    path = bench_dir / "part.qcow2"
    images.scattered_image(path, SCALE.scattered, SCALE.scattered_clusters // 32)
    with qcowlib.open(path, "r+") as image:
        for name in ("one", "two"):
            image.add_bitmap(name)
        for place in range(64):
            image.pwrite(b"changed ", place * (SCALE.scattered // 64))
    return path


@pytest.fixture
def lay(part: Path, tmp_path: Path) -> Callable[[], None]:
    """Return what lays a fresh copy at ``tmp_path / "image"``."""
    return lambda: images.durable_copy(part, tmp_path / "image")


def opened(path: Path, change: Callable[[qcowlib.Image], object]) -> Callable[[], None]:
    """Return what opens *path*, changes it and closes it, as a command does."""

    def run() -> None:
        with qcowlib.open(path, "r+") as image:
            change(image)

    return run


@BOTH
def bench_grow(benchmark: Any, measure: Callable[..., None], lay: Callable[[], None], tmp_path: Path, who: str) -> None:
    benchmark.group = "resize, grow with metadata"
    path, size = tmp_path / "image", SCALE.scattered + 16 * GIB
    run = {
        "qcowlib": opened(path, lambda image: image.resize(size, preallocation="metadata")),
        "qemu-img": lambda: peers.qemu_img("resize", "-q", "--preallocation=metadata", path, str(size)),
    }[who]
    measure(run, who=who, setup=lay)
    peers.must_be_clean(path)


@BOTH
def bench_repair(
    benchmark: Any, measure: Callable[..., None], lay: Callable[[], None], tmp_path: Path, who: str
) -> None:
    """Clusters that nothing points to any more, as a cut can leave them."""
    benchmark.group = "check -r leaks"
    path = tmp_path / "image"

    def leaking() -> None:
        lay()
        with path.open("r+b") as file:
            file.seek(40)
            table = int.from_bytes(file.read(8), "big")
            file.seek(table)
            entry = next(place for place in range(SCALE.scattered >> 29) if any(file.read(8)))
            file.seek(table + 8 * entry)
            file.write(bytes(8))

    run = {
        "qcowlib": opened(path, lambda image: image.check(repair="leaks")),
        "qemu-img": lambda: peers.qemu_img("check", "-q", "-r", "leaks", path),
    }[who]
    measure(run, who=who, setup=leaking)
    peers.must_be_clean(path)


@BOTH
@pytest.mark.parametrize("step", ["merge", "remove"])
def bench_bitmap(
    benchmark: Any, measure: Callable[..., None], lay: Callable[[], None], tmp_path: Path, step: str, who: str
) -> None:
    benchmark.group = f"bitmap --{step}"
    path = tmp_path / "image"
    words: list[str | Path] = ["--merge", "two", path, "one"] if step == "merge" else ["--remove", path, "one"]
    change: Callable[[qcowlib.Image], object] = (
        (lambda image: image.merge_bitmap("one", "two"))
        if step == "merge"
        else (lambda image: image.remove_bitmap("one"))
    )
    measure(
        {"qcowlib": opened(path, change), "qemu-img": lambda: peers.qemu_img("bitmap", *words)}[who],
        who=who,
        setup=lay,
    )
    peers.must_be_clean(path)


@BOTH
def bench_dd(benchmark: Any, measure: Callable[..., None], bench_dir: Path, half_zero: Path, who: str) -> None:
    benchmark.group = "dd bs=1M"
    target = bench_dir / "dd.qcow2"
    run = {
        "qcowlib": lambda: qcowlib.dd(half_zero, target, block_size=1 << 20, source_format="raw", format="qcow2"),
        "qemu-img": lambda: peers.qemu_img(
            "dd", "-O", "qcow2", "-f", "raw", "bs=1M", f"if={half_zero}", f"of={target}"
        ),
    }[who]
    measure(run, who=who, amount=half_zero.stat().st_size, unit="byte", setup=lambda: target.unlink(missing_ok=True))
    peers.must_be_clean(target)
    target.unlink()
