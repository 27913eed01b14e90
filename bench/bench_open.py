# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Opening an image and learning what it is: in process, and as a whole command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peers
import pytest
from scale import Scale


@pytest.mark.benchmark(group="open and close")
@pytest.mark.parametrize("who", peers.installed("qcowlib", "libqcow", "dissect"))
def bench_open(measure: Callable[..., None], scattered: Path, scale: Scale, who: str) -> None:
    count = max(1, scale.operations // 100)

    def run() -> None:
        for _ in range(count):
            with peers.reader(who, scattered):
                pass

    measure(run, who=who, amount=count)


@pytest.mark.benchmark(group="info, one command")
@pytest.mark.parametrize("who", peers.installed("qcow", "qemu-img"))
def bench_info_command(measure: Callable[..., None], scattered: Path, who: str) -> None:
    command = peers.qcow if who == "qcow" else peers.qemu_img_output
    measure(lambda: command("info", "--output=json", scattered), who=who)


@pytest.mark.benchmark(group="info, 20 images")
@pytest.mark.parametrize("who", peers.installed("qcow", "qemu-img"))
def bench_info_many(measure: Callable[..., None], scattered: Path, who: str) -> None:
    def run() -> None:
        if who == "qcow":
            peers.qcow("info", "--output=json", *[scattered] * 20)
        else:
            for _ in range(20):
                peers.qemu_img_output("info", "--output=json", scattered)

    measure(run, who=who, amount=20, unit="image")
