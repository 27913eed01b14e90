# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Convert in each direction, compressed and not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import pytest

import qcowlib

DIRECTIONS = {
    "raw to qcow2": ("raw", "qcow2"),
    "qcow2 to raw": ("qcow2", "raw"),
    "qcow2 to qcow2": ("qcow2", "qcow2"),
}


@pytest.fixture(scope="session")
def half_zero_qcow2(bench_dir: Path, half_zero: Path) -> Path:
    """The half zero image as qcow2."""
    path = bench_dir / "half.qcow2"
    qcowlib.convert(half_zero, path, source_format="raw", format="qcow2")
    return path


@pytest.mark.parametrize("who", peers.installed("qcowlib", "qemu-img"))
@pytest.mark.parametrize("direction", DIRECTIONS)
def bench_convert(
    benchmark: Any,
    measure: Callable[..., None],
    bench_dir: Path,
    half_zero: Path,
    half_zero_qcow2: Path,
    direction: str,
    who: str,
) -> None:
    source_format, format = DIRECTIONS[direction]
    source = half_zero if source_format == "raw" else half_zero_qcow2
    target = bench_dir / f"converted.{format}"
    benchmark.group = f"convert, {direction}"

    def run() -> None:
        if who == "qcowlib":
            # As qemu-img does by default: nothing waits for the disk.
            qcowlib.convert(source, target, source_format=source_format, format=format, cache="unsafe")
        else:
            peers.qemu_img("convert", "-f", source_format, "-O", format, source, target)

    measure(run, who=who, amount=half_zero.stat().st_size, unit="byte", setup=lambda: target.unlink(missing_ok=True))
    peers.must_equal(half_zero, target)
    target.unlink()


@pytest.mark.parametrize("who", peers.installed("qcowlib", "qcowlib small", "qemu-img", "qemu-img -W"))
@pytest.mark.parametrize("method", ["zlib", "zstd"])
def bench_compress(
    benchmark: Any, measure: Callable[..., None], bench_dir: Path, realistic: Path, method: str, who: str
) -> None:
    target = bench_dir / "compressed.qcow2"
    benchmark.group = f"convert -c, {method}"

    def run() -> None:
        if who.startswith("qcowlib"):
            qcowlib.convert(
                realistic, target, source_format="raw", compress=True, compression_type=method, cache="unsafe",
                level="small" if who.endswith("small") else "fast",
            )  # fmt: skip
        else:
            options = ["-W", "-m", "4"] if who.endswith("-W") else []
            peers.qemu_img(
                "convert", "-c", *options, "-f", "raw", "-O", "qcow2",
                "-o", f"compression_type={method}", realistic, target,
            )  # fmt: skip

    size = realistic.stat().st_size
    measure(run, who=who, amount=size, unit="byte", setup=lambda: target.unlink(missing_ok=True), slow=True)
    benchmark.extra_info["file size"] = target.stat().st_size
    peers.must_equal(realistic, target)
    target.unlink()


@pytest.mark.parametrize("who", peers.installed("qcowlib", "qemu-img", "qemu-img -W"))
@pytest.mark.parametrize("method", ["zlib", "zstd"])
def bench_decompress(
    benchmark: Any, measure: Callable[..., None], bench_dir: Path, realistic: Path, method: str, who: str
) -> None:
    source, target = bench_dir / f"{method}.qcow2", bench_dir / "plain.raw"
    benchmark.group = f"decompress, {method}"
    qcowlib.convert(realistic, source, source_format="raw", compress=True, compression_type=method)

    def run() -> None:
        if who == "qcowlib":
            qcowlib.convert(source, target, format="raw", cache="unsafe")
        else:
            options = ["-W", "-m", "4"] if who.endswith("-W") else []
            peers.qemu_img("convert", *options, "-O", "raw", source, target)

    measure(run, who=who, amount=realistic.stat().st_size, unit="byte", setup=lambda: target.unlink(missing_ok=True))
    peers.must_equal(realistic, target)
    target.unlink()
    source.unlink()
