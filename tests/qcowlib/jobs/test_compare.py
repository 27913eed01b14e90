# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Compare against qemu-img compare: the same verdict at the same offset."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import qcowlib
from qcowlib.jobs.compare import Comparison, compare
from qcowlib.storage.memory import MemoryStorage
from tests.conftest import LONG
from tests.qcowlib.jobs.samples import make_source, qemu_img

MiB = 1 << 20


def text_of(result: Comparison) -> str:
    """What qemu-img would print."""
    warning = "Warning: Image size mismatch!\n" if result.size_differs else ""
    return {
        "identical": f"{warning}Images are identical.\n",
        "content": f"{warning}Content mismatch at offset {result.offset}!\n",
        "size": "Strict mode: Image size mismatch!\n",
        "status": f"Strict mode: Offset {result.offset} block status mismatch!\n",
    }[result.verdict]


@pytest.mark.real("qemu-img")
@pytest.mark.parametrize("seed", range(12 * LONG))
def test_verdict_is_that_of_qemu_img(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    kind = rng.choice(["raw", "qcow2", "chain"])
    source = make_source(rng, tmp_path, kind, rng.choice([MiB, 5 * MiB + 1536]))
    first = "raw" if kind == "raw" else "qcow2"
    second = rng.choice(["raw", "qcow2"])
    other = tmp_path / "other"
    qcowlib.convert(source, other, source_format=first, format=second)
    if rng.random() < 0.7:
        with qcowlib.open(other, "r+", format=second) as image:
            if rng.random() < 0.3:
                image.resize(image.size + 4096)
            for _ in range(rng.randrange(3)):
                image.pwrite(bytes([rng.randrange(256)]) * 700, rng.randrange(image.size - 700))
    answer = qemu_img("compare", "-f", first, "-F", second, source, other, check=False)
    for workers in 1, 3:
        result = compare(source, other, format_a=first, format_b=second, workers=workers)
        assert text_of(result) == answer.stdout
        assert bool(result) == (answer.returncode == 0)


@pytest.mark.real("qemu-img")
@pytest.mark.parametrize("change", ["none", "data", "zero", "size"])
def test_strict_verdict_is_that_of_qemu_img(tmp_path: Path, change: str) -> None:
    paths = tmp_path / "a", tmp_path / "b"
    for path in paths:
        qcowlib.create(path, 10 * MiB)
        with qcowlib.open(path, "r+") as image:
            image.pwrite(b"1" * 65536, 3 * MiB)
    with qcowlib.open(paths[1], "r+") as image:
        if change == "data":
            image.pwrite(b"2", 5 * MiB)
        elif change == "zero":
            image.zero(65536, 8 * MiB)
        elif change == "size":
            image.resize(11 * MiB)
    answer = qemu_img("compare", "-s", *paths, check=False)
    assert text_of(compare(*paths, strict=True)) == answer.stdout


def test_what_both_have_in_one_base_is_not_read(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(b"x" * MiB)
    for name in "ab":
        qcowlib.create(tmp_path / name, MiB, backing="base", backing_format="raw")
    with qcowlib.open(tmp_path / "a") as a, qcowlib.open(tmp_path / "b") as b:
        base.write_bytes(b"")
        # Reading now would fail: the base has lost its bytes.
        assert compare(a, b)


def test_unreadable_data_is_an_error_that_tells_the_place(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qcowlib.create(path, MiB)
    with qcowlib.open(path, "r+") as image:
        image.pwrite(b"x" * MiB, 0)
    with path.open("r+b") as file:
        file.truncate(9 * 65536)
    same = MemoryStorage()
    same.write(0, [b"x" * MiB])
    with pytest.raises(qcowlib.Error, match="Error while reading offset"):
        compare(path, same, format_b="raw")
