# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Creating images: each preallocation, and thin overlays by the thousand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peers
import pytest
from scale import Scale

import qcowlib


@pytest.mark.parametrize("who", peers.installed("qcowlib", "qemu-img"))
@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc", "full"])
def bench_create(
    benchmark: object, measure: Callable[..., None], bench_dir: Path, scale: Scale, who: str, preallocation: str
) -> None:
    size = {"off": scale.full, "metadata": scale.scattered}.get(preallocation, scale.copy // 4)
    benchmark.group = f"create, preallocation={preallocation}"  # type: ignore[attr-defined]
    path = bench_dir / "new.qcow2"

    def run() -> None:
        if who == "qcowlib":
            qcowlib.create(path, size, preallocation=preallocation)
        else:
            peers.qemu_img("create", "-q", "-f", "qcow2", "-o", f"preallocation={preallocation}", path, str(size))

    measure(run, who=who, setup=lambda: path.unlink(missing_ok=True))
    path.unlink()


@pytest.mark.benchmark(group="create, thin overlays")
@pytest.mark.parametrize("who", peers.installed("qcowlib", "qemu-img"))
def bench_overlays(measure: Callable[..., None], bench_dir: Path, scattered: Path, scale: Scale, who: str) -> None:
    count = scale.overlays if who == "qcowlib" else max(1, scale.overlays // 20)
    paths = [bench_dir / f"overlay-{number}.qcow2" for number in range(count)]

    def run() -> None:
        for path in paths:
            if who == "qcowlib":
                qcowlib.create(path, None, backing=scattered, backing_format="qcow2")
            else:
                peers.qemu_img("create", "-q", "-f", "qcow2", "-b", scattered, "-F", "qcow2", path)

    def clean() -> None:
        for path in paths:
            path.unlink(missing_ok=True)

    measure(run, who=who, amount=count, unit="overlay", setup=clean)
    clean()
