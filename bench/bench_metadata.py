# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Walking all metadata: map and check on a scattered and on a full image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peers
import pytest

import qcowlib
from qcowlib.qcow2.check import check
from qcowlib.storage.file import FileStorage


def _extents(path: Path) -> int:
    with qcowlib.open(path, backing=False) as image:
        return sum(1 for _ in image.extents())


@pytest.mark.parametrize("who", peers.installed("qcowlib", "qcow", "qemu-img"))
@pytest.mark.parametrize("which", ["scattered", "full"])
def bench_map(
    benchmark: object, measure: Callable[..., None], request: pytest.FixtureRequest, which: str, who: str
) -> None:
    path: Path = request.getfixturevalue(which)
    benchmark.group = f"map, {which}"  # type: ignore[attr-defined]
    run = {
        "qcowlib": lambda: _extents(path),
        "qcow": lambda: peers.qcow("map", "--output=json", path),
        "qemu-img": lambda: peers.qemu_img("map", "--output=json", path),
    }[who]
    measure(run, who=who)


def _check(path: Path) -> object:
    storage = FileStorage.open(path)
    try:
        return check(storage)
    finally:
        storage.close()


@pytest.mark.parametrize("who", peers.installed("qcowlib", "qcow", "qemu-img"))
@pytest.mark.parametrize("which", ["scattered", "full"])
def bench_check(
    benchmark: object, measure: Callable[..., None], request: pytest.FixtureRequest, which: str, who: str
) -> None:
    path: Path = request.getfixturevalue(which)
    benchmark.group = f"check, {which}"  # type: ignore[attr-defined]
    run = {
        "qcowlib": lambda: _check(path),
        "qcow": lambda: peers.qcow("check", path),
        "qemu-img": lambda: peers.qemu_img("check", path),
    }[who]
    measure(run, who=who)
