# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Guest I/O in process: random reads and writes of mapped data, allocating writes, sequential reads."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import images
import peers
import pytest
from scale import Scale

import qcowlib

BLOCK = 4096
MiB = 1 << 20


@pytest.fixture(scope="session")
def filled(bench_dir: Path, scale: Scale) -> Path:
    """A qcow2 image with every cluster in use, half as large as those to copy."""
    path, raw = bench_dir / "filled.qcow2", bench_dir / "filled.raw"
    images.dense_raw(raw, scale.copy // 2)
    qcowlib.convert(raw, path, source_format="raw", format="qcow2")
    raw.unlink()
    return path


def data_offsets(scale: Scale, count: int, seed: int = 4) -> list[int]:
    """Return *count* random block offsets in the filled image."""
    chance = random.Random(seed)
    return [chance.randrange(scale.copy // 2 // BLOCK) * BLOCK for _ in range(count)]


@pytest.mark.benchmark(group="random read, 4 KiB")
@pytest.mark.parametrize("who", peers.installed("qcowlib", "libqcow", "dissect", "libnbd"))
def bench_random_read(measure: Callable[..., None], filled: Path, scale: Scale, who: str) -> None:
    offsets = data_offsets(scale, scale.operations)
    with peers.reader(who, filled) as read:

        def run() -> None:
            for offset in offsets:
                read(BLOCK, offset)

        measure(run, who=who, amount=len(offsets), unit="read")
        assert bytes(read(8, 3 * MiB)) == (3).to_bytes(8, "big")  # type: ignore[call-overload]


@pytest.mark.parametrize("who", peers.installed("qemu-img bench"))
@pytest.mark.parametrize("depth", [1, 16])
def bench_strided_read(
    benchmark: Any, measure: Callable[..., None], filled: Path, scale: Scale, who: str, depth: int
) -> None:
    benchmark.group = "random read, 4 KiB"
    step = "53248"  # 13 blocks: no two requests in one cluster follow each other
    command = ["bench", "-f", "qcow2", "-c", str(scale.operations), "-d", str(depth), "-s", "4096", "-S", step, filled]
    measure(lambda: peers.qemu_img(*command), who=f"{who} -d {depth}", amount=scale.operations, unit="read")


@pytest.mark.parametrize("way", ["single", "batched"])
@pytest.mark.parametrize("threads", [1, 4])
def bench_random_read_threads(
    benchmark: Any, measure: Callable[..., None], filled: Path, scale: Scale, threads: int, way: str
) -> None:
    benchmark.group = "random read, 4 KiB"
    count = scale.operations // threads
    parts = [data_offsets(scale, count, seed) for seed in range(threads)]
    who = f"qcowlib, {way}, {threads} thread{'s' if threads > 1 else ''}"
    with qcowlib.open(filled) as image, ThreadPoolExecutor(threads) as pool:

        def part(offsets: list[int]) -> bytearray:
            if way == "batched":
                many = bytearray(len(offsets) * BLOCK)
                image.preadinto_many(many, offsets, BLOCK)
                return many[-BLOCK:]
            buffer = bytearray(BLOCK)
            for offset in offsets:
                image.preadinto(buffer, offset)
            return buffer

        measure(lambda: list(pool.map(part, parts)), who=who, amount=count * threads, unit="read")
        assert [part(offsets) for offsets in parts] == [image.pread(BLOCK, offsets[-1]) for offsets in parts]


@pytest.mark.benchmark(group="random write, 4 KiB, mapped")
@pytest.mark.parametrize("who", peers.installed("qcowlib", "libnbd", "qemu-img bench"))
def bench_random_write(measure: Callable[..., None], filled: Path, scale: Scale, who: str) -> None:
    offsets = data_offsets(scale, scale.operations)
    data = b"w" * BLOCK
    if who == "qemu-img bench":
        command = ["bench", "-w", "-f", "qcow2", "-c", str(scale.operations), "-d", "16", "-s", str(BLOCK)]
        command += ["-t", "writeback", "-S", str(13 * BLOCK), "--flush-interval", str(scale.operations)]
        measure(lambda: peers.qemu_img(*command, filled), who=who, amount=scale.operations, unit="write")
        return
    if who == "qcowlib":
        opened: Any = qcowlib.open(filled, "r+")
    else:
        opened = peers.nbd_export(filled)
    with opened as image:

        def run() -> None:
            for offset in offsets:
                image.pwrite(data, offset)
            image.flush()

        measure(run, who=who, amount=len(offsets), unit="write")
        assert bytes(image.pread(BLOCK, offsets[-1])) == data


@pytest.mark.benchmark(group="random write, 4 KiB, mapped")
def bench_random_write_threads(measure: Callable[..., None], filled: Path, scale: Scale) -> None:
    threads = 4
    count = scale.operations // threads
    parts = [data_offsets(scale, count, seed) for seed in range(threads)]
    data = b"t" * BLOCK
    with qcowlib.open(filled, "r+") as image, ThreadPoolExecutor(threads) as pool:

        def part(offsets: list[int]) -> None:
            for offset in offsets:
                image.pwrite(data, offset)

        def run() -> None:
            list(pool.map(part, parts))
            image.flush()

        measure(run, who=f"qcowlib, {threads} threads", amount=count * threads, unit="write")
        assert all(image.pread(BLOCK, offset) == data for offset in parts[-1])


@pytest.mark.parametrize("who", peers.installed("qcowlib", "libnbd", "qemu-img bench"))
@pytest.mark.parametrize("order", ["sequential", "random"])
def bench_allocating_write(
    benchmark: Any, measure: Callable[..., None], bench_dir: Path, scale: Scale, order: str, who: str
) -> None:
    path = bench_dir / "grow.qcow2"
    count = scale.operations
    places = range(count) if order == "sequential" else random.Random(5).sample(range(count * 16), count)
    offsets = [place * BLOCK for place in places]
    data = b"w" * BLOCK
    benchmark.group = f"allocating write, 4 KiB, {order}"

    def fresh() -> None:
        path.unlink(missing_ok=True)
        qcowlib.create(path, count * 16 * BLOCK)

    def run() -> None:
        if who == "qemu-img bench":
            step = [] if order == "sequential" else ["-S", str(13 * BLOCK)]
            limits = ["-c", str(count), "-d", "16", "-s", str(BLOCK), "--flush-interval", str(count)]
            peers.qemu_img("bench", "-w", "-t", "writeback", "-f", "qcow2", *limits, *step, path)
            return
        opened: Any = qcowlib.open(path, "r+") if who == "qcowlib" else peers.nbd_export(path)
        with opened as image:
            for offset in offsets:
                image.pwrite(data, offset)
            image.flush()

    measure(run, who=who, amount=count, unit="write", setup=fresh, slow=who == "libnbd")
    peers.must_be_clean(path)
    path.unlink()


@pytest.mark.benchmark(group="sequential read, 1 MiB")
@pytest.mark.parametrize("who", peers.installed("qcowlib", "libqcow", "dissect", "libnbd"))
def bench_sequential_read(measure: Callable[..., None], filled: Path, scale: Scale, who: str) -> None:
    size = min(scale.copy // 2, 512 * MiB)
    with peers.reader(who, filled) as read:

        def run() -> None:
            for offset in range(0, size, MiB):
                read(MiB, offset)

        measure(run, who=who, amount=size, unit="byte")
