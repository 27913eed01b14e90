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


def _walk(path: Path) -> int:
    """Look up the whole image; returns the bytes that were mapped."""
    mapped = offset = 0
    with qcowlib.open(path, backing=False) as image:
        while offset < image.size:
            runs = image.map(offset, image.size - offset)
            mapped += runs.end - offset
            offset = runs.end
    return mapped


@pytest.mark.parametrize("who", peers.installed("qcowlib", "qcow", "qemu-img"))
@pytest.mark.parametrize("which", ["scattered", "full"])
def bench_map(
    benchmark: object, measure: Callable[..., None], request: pytest.FixtureRequest, which: str, who: str
) -> None:
    path: Path = request.getfixturevalue(which)
    benchmark.group = f"map, {which}"  # type: ignore[attr-defined]
    run = {
        "qcowlib": lambda: _walk(path),
        "qcow": lambda: peers.qcow("map", "--output=json", path),
        "qemu-img": lambda: peers.qemu_img_output("map", "--output=json", path),
    }[who]
    measure(run, who=who)
    if who == "qcowlib":
        with qcowlib.open(path) as image:
            assert _walk(path) == image.size
    elif who == "qcow" and peers.installed("qemu-img"):
        assert peers.qcow("map", "--output=json", path) == peers.qemu_img_output("map", "--output=json", path)


@pytest.mark.parametrize("who", peers.installed("qcowlib", "qcow", "qemu-img"))
@pytest.mark.parametrize("which", ["scattered", "full"])
def bench_measure(
    benchmark: object, measure: Callable[..., None], request: pytest.FixtureRequest, which: str, who: str
) -> None:
    path: Path = request.getfixturevalue(which)
    benchmark.group = f"measure, {which}"  # type: ignore[attr-defined]
    run = {
        "qcowlib": lambda: qcowlib.measure(path),
        "qcow": lambda: peers.qcow("measure", "-O", "qcow2", path),
        "qemu-img": lambda: peers.qemu_img_output("measure", "-O", "qcow2", path),
    }[who]
    measure(run, who=who)
    text = peers.qcow("measure", "-O", "qcow2", path)
    assert f"required size: {qcowlib.measure(path).required}\n" in text.decode()
    assert not peers.installed("qemu-img") or text == peers.qemu_img_output("measure", "-O", "qcow2", path)


def _check(path: Path) -> None:
    storage = FileStorage.open(path)
    try:
        report = check(storage)
    finally:
        storage.close()
    assert not report.corruptions and not report.leaks


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
