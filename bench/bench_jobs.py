# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Jobs on images that exist: snapshots, resize, commit, rebase, compare, and flattening a chain.

Overlays hold scattered clusters of 64 KiB; ours are calls in this process, a
peer is a whole command.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import images
import peers
import pytest
from scale import Scale

import qcowlib
from qcowlib.jobs.commit import commit
from qcowlib.jobs.rebase import rebase

CLUSTER = 65536
LAYERS = 8

BOTH = pytest.mark.parametrize("who", peers.installed("qcowlib", "qemu-img"))


def _fill(path: Path, clusters: list[int]) -> None:
    with qcowlib.open(path, "r+", cache="unsafe") as image:
        for cluster in clusters:
            image.pwrite(cluster.to_bytes(8, "big") * (CLUSTER // 8), cluster * CLUSTER)


@pytest.fixture(scope="session")
def chain(bench_dir: Path, scale: Scale) -> list[Path]:
    """Base first: images of scattered clusters, each over the one before; the names of bases are relative."""
    chance = random.Random(6)
    paths: list[Path] = []
    for number in range(LAYERS):
        path = bench_dir / f"layer-{number}.qcow2"
        if paths:
            qcowlib.create(path, None, backing=paths[-1].name, backing_format="qcow2")
        else:
            qcowlib.create(path, scale.scattered)
        _fill(path, chance.sample(range(scale.scattered // CLUSTER), max(1, scale.scattered_clusters // 16)))
        paths.append(path)
    return paths


@pytest.fixture(scope="session")
def overlay(bench_dir: Path, chain: list[Path], scale: Scale) -> Path:
    """Scattered clusters over the first of the chain."""
    path = bench_dir / "overlay.qcow2"
    qcowlib.create(path, None, backing=chain[0].name, backing_format="qcow2")
    count = max(1, scale.scattered_clusters // 8)
    _fill(path, random.Random(7).sample(range(scale.scattered // CLUSTER), count))
    return path


@BOTH
@pytest.mark.parametrize("step", ["create", "apply", "delete"])
def bench_snapshot(
    benchmark: Any, measure: Callable[..., None], bench_dir: Path, overlay: Path, step: str, who: str
) -> None:
    benchmark.group = f"snapshot, {step}"
    path = bench_dir / "snapshot.qcow2"
    opened: list[qcowlib.Image] = []

    def fresh() -> None:
        for image in opened:
            image.close()
        opened.clear()
        images.durable_copy(overlay, path)
        if who == "qcowlib":
            opened.append(qcowlib.open(path, "r+"))
            if step != "create":
                opened[0].create_snapshot("s")
        elif step != "create":
            peers.qemu_img("snapshot", "-c", "s", path)

    def run() -> None:
        if who == "qcowlib":
            image = opened[0]
            {"create": image.create_snapshot, "apply": image.apply_snapshot, "delete": image.delete_snapshot}[step]("s")
        else:
            peers.qemu_img("snapshot", {"create": "-c", "apply": "-a", "delete": "-d"}[step], "s", path)

    measure(run, who=who, setup=fresh)
    for image in opened:
        image.close()
    peers.must_be_clean(path)
    path.unlink()


@BOTH
def bench_resize(benchmark: Any, measure: Callable[..., None], bench_dir: Path, overlay: Path, who: str) -> None:
    """To a fourth of the size: three of four clusters go."""
    benchmark.group = "resize, shrink"
    path = bench_dir / "smaller.qcow2"
    with qcowlib.open(overlay) as image:
        size = image.size // 4

    def run() -> None:
        if who == "qcowlib":
            with qcowlib.open(path, "r+") as image:
                image.resize(size, shrink=True)
        else:
            peers.qemu_img("resize", "-q", "--shrink", path, str(size))

    measure(run, who=who, setup=lambda: images.durable_copy(overlay, path))
    peers.must_be_clean(path)
    path.unlink()


@BOTH
def bench_commit(
    benchmark: Any, measure: Callable[..., None], bench_dir: Path, chain: list[Path], overlay: Path, who: str
) -> None:
    benchmark.group = "commit, scattered"
    base, top = bench_dir / "commit-base.qcow2", bench_dir / "commit.qcow2"

    def fresh() -> None:
        images.durable_copy(chain[0], base)
        images.durable_copy(overlay, top)
        rebase(top, base.name, backing_format="qcow2", unsafe=True)

    def run() -> None:
        if who == "qcowlib":
            commit(top)
        else:
            peers.qemu_img("commit", "-q", top)

    measure(run, who=who, setup=fresh)
    peers.must_be_clean(base)
    peers.must_be_clean(top)
    peers.must_equal(overlay, base)
    top.unlink()
    base.unlink()


@BOTH
def bench_rebase(benchmark: Any, measure: Callable[..., None], bench_dir: Path, chain: list[Path], who: str) -> None:
    """The top of the chain onto the first: what those between hold is copied up."""
    benchmark.group = "rebase, scattered"
    top = bench_dir / "rebased.qcow2"

    def run() -> None:
        if who == "qcowlib":
            rebase(top, chain[0].name, backing_format="qcow2")
        else:
            peers.qemu_img("rebase", "-b", chain[0].name, "-F", "qcow2", top)

    measure(run, who=who, setup=lambda: images.durable_copy(chain[-1], top))
    peers.must_be_clean(top)
    peers.must_equal(chain[-1], top)
    top.unlink()


@BOTH
def bench_flatten(benchmark: Any, measure: Callable[..., None], bench_dir: Path, chain: list[Path], who: str) -> None:
    benchmark.group = f"flatten {LAYERS} layers"
    flat = bench_dir / "flat.qcow2"

    def run() -> None:
        if who == "qcowlib":
            qcowlib.convert(chain[-1], flat, cache="unsafe")
        else:
            peers.qemu_img("convert", "-O", "qcow2", chain[-1], flat)

    measure(run, who=who, setup=lambda: flat.unlink(missing_ok=True))
    peers.must_equal(chain[-1], flat)
    flat.unlink()


@BOTH
def bench_merge(benchmark: Any, measure: Callable[..., None], bench_dir: Path, chain: list[Path], who: str) -> None:
    """All layers into the first; the peer commits to it in one command, then tells nobody."""
    benchmark.group = f"merge {LAYERS} layers"
    folder = bench_dir / "merged"

    def fresh() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for path in chain:
            images.durable_copy(path, folder / path.name)

    def run() -> None:
        if who == "qcowlib":
            qcowlib.merge(folder / chain[-1].name)
        else:
            peers.qemu_img("commit", "-q", "-b", folder / chain[0].name, folder / chain[-1].name)

    measure(run, who=who, setup=fresh)
    peers.must_be_clean(folder / chain[0].name)
    peers.must_equal(chain[-1], folder / chain[0].name)
    shutil.rmtree(folder)


@BOTH
def bench_compact(benchmark: Any, measure: Callable[..., None], bench_dir: Path, chain: list[Path], who: str) -> None:
    """A flat image that lost its first half; the peer copies it to a new file."""
    benchmark.group = "compact"
    worn, used, new = (bench_dir / f"compact-{name}.qcow2" for name in ("worn", "used", "new"))
    qcowlib.convert(chain[-1], worn, cache="unsafe")
    with qcowlib.open(worn, "r+") as image:
        image.discard(image.size // 2, 0)

    def run() -> None:
        if who == "qcowlib":
            qcowlib.compact(used)
        else:
            peers.qemu_img("convert", "-O", "qcow2", used, new)

    measure(run, who=who, setup=lambda: images.durable_copy(worn, used))
    peers.must_be_clean(used)
    peers.must_equal(worn, used)
    for path in (worn, used, new):
        path.unlink(missing_ok=True)


@BOTH
def bench_compare(benchmark: Any, measure: Callable[..., None], bench_dir: Path, half_zero: Path, who: str) -> None:
    benchmark.group = "compare, raw with qcow2"
    other = bench_dir / "other.qcow2"
    qcowlib.convert(half_zero, other, source_format="raw", cache="unsafe")

    def run() -> None:
        if who == "qcowlib":
            assert qcowlib.compare(half_zero, other, format_a="raw", format_b="qcow2")
        else:
            peers.qemu_img("compare", "-q", "-f", "raw", "-F", "qcow2", half_zero, other)

    measure(run, who=who, amount=half_zero.stat().st_size, unit="byte")
    other.unlink()
