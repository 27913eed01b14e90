# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Images and sizes for the benchmarks.

``QCOWLIB_BENCH=full`` gives the sizes of the published table; without it they
are so small that a run proves only that the benchmarks work.  Images lie in
``QCOWLIB_BENCH_DIR`` (default: a temporary directory) and are made once a run.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import images
import pytest
from scale import SCALE, Scale


@pytest.fixture(scope="session")
def scale() -> Scale:
    """The sizes of this run."""
    return SCALE


@pytest.fixture(scope="session")
def bench_dir() -> Iterator[Path]:
    """A directory on the file system to measure, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="qcowlib-bench-", dir=os.environ.get("QCOWLIB_BENCH_DIR")) as name:
        yield Path(name)


@pytest.fixture(scope="session")
def scattered(bench_dir: Path) -> Path:
    """64 GiB virtual, 4 GiB of it allocated in pieces of 64 KiB in random order."""
    path = bench_dir / "scattered.qcow2"
    images.scattered_image(path, SCALE.scattered, SCALE.scattered_clusters)
    return path


@pytest.fixture(scope="session")
def full(bench_dir: Path) -> Path:
    """1 TiB, all clusters allocated."""
    path = bench_dir / "full.qcow2"
    images.full_image(path, SCALE.full)
    return path


@pytest.fixture(scope="session")
def half_zero(bench_dir: Path) -> Iterator[Path]:
    """A raw image, half random, half written zeros."""
    path = bench_dir / "half.raw"
    images.half_zero_raw(path, SCALE.copy)
    yield path
    path.unlink()


@pytest.fixture(scope="session")
def realistic(bench_dir: Path) -> Iterator[Path]:
    """A raw image of files of this machine."""
    path = bench_dir / "realistic.raw"
    images.realistic_raw(path, SCALE.data)
    yield path
    path.unlink()


@pytest.fixture
def measure(benchmark: Any, scale: Scale) -> Callable[..., None]:
    """Return ``measure(function, who=, amount=, unit=, setup=, slow=)``: one warm-up, then the rounds of this scale.

    *amount* operations or bytes are done by one call; *setup* runs before
    each, untimed.  What is *slow* has two rounds and no warm-up.
    """

    def run(
        function: Callable[[], object],
        *,
        who: str,
        amount: int = 1,
        unit: str = "call",
        setup: Any = None,
        slow: bool = False,
    ) -> None:
        benchmark.extra_info.update(who=who, amount=amount, unit=unit)
        rounds = min(scale.rounds, 2) if slow else scale.rounds
        benchmark.pedantic(
            function, setup=setup, rounds=rounds, iterations=1, warmup_rounds=0 if slow else min(1, rounds - 1)
        )

    return run
