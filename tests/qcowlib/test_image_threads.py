# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Several threads on one image, the compiled lanes open (Invariant: I4, I7).

Each writer owns every fourth sector, so that all share clusters; it always
reads back what it wrote last, whatever snapshots, resizes, flushes and
discards happen beside it.  A reader never sees what belongs to another place.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

import qcowlib
from qcowlib.testing.model import tagged

LONG = int(os.environ.get("QCOWLIB_LONG", "1"))
pytestmark = pytest.mark.crash

WRITERS = 4
SECTORS = 2048
SIZE = SECTORS * 512

SHAPES: dict[str, dict[str, object]] = {
    "512": {"cluster_size": 512},
    "4k": {"cluster_size": 4096},
    "64k": {"cluster_size": 65536},
    "subclusters": {"cluster_size": 16384, "extended_l2": True},
    "lazy": {"cluster_size": 4096, "lazy_refcounts": True},
    "overlay": {"cluster_size": 4096, "backing": "base", "backing_format": "raw"},
}


@pytest.fixture(autouse=True)
def frequent_switches() -> Iterator[None]:
    """Threads take turns much more often than usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def make(folder: Path, shape: str) -> Path:
    path = folder / "image"
    if shape == "overlay":
        (folder / "base").write_bytes(b"".join(tagged(n, 1) for n in range(SECTORS)))
    qcowlib.create(path, SIZE, **SHAPES[shape])  # type: ignore[arg-type]
    return path


def together(*programs: Callable[[], None]) -> None:
    """Run all in threads of their own; raise the first failure."""
    failures: list[BaseException] = []

    def guarded(program: Callable[[], None]) -> None:
        try:
            program()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(program,)) for program in programs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


class Writer:
    """Writes its own sectors and reads them back."""

    def __init__(self, image: qcowlib.Image, number: int, count: int, expected: dict[int, bytes]) -> None:
        self.image = image
        self.rng = Random(number)
        self.number = number
        self.count = count
        self.expected = expected

    def __call__(self) -> None:
        mine: dict[int, bytes] = {}
        for version in range(2, self.count + 2):
            sector = self.rng.randrange(SECTORS // WRITERS) * WRITERS + self.number
            data = tagged(sector, version)
            inside = self.rng.choice([0, 0, 0, 7, 100])
            if self.rng.random() < 0.1:
                self.image.zero(512, sector * 512, unmap=self.rng.random() < 0.5)
                mine[sector] = bytes(512)
            elif inside:
                # In two parts, neither a whole sector.
                self.image.pwrite(data[:inside], sector * 512)
                self.image.pwrite(data[inside:], sector * 512 + inside)
                mine[sector] = data
            else:
                self.image.pwrite(data, sector * 512)
                mine[sector] = data
            back = self.rng.choice(list(mine))
            assert self.image.pread(512, back * 512) == mine[back], f"sector {back}"
        self.expected.update(mine)


def structure(image: qcowlib.Image, rng: Random, count: int, stop: threading.Event) -> None:
    """Everything that closes the gate, and flushes; ends when the writers have."""
    names: list[str] = []
    number = 0
    while number < count or not stop.is_set():
        number += 1
        kind = rng.choice(["flush", "flush", "create", "delete", "grow", "shrink"])
        if kind == "create" and len(names) < 4:
            image.create_snapshot(f"s{number}")
            names.append(f"s{number}")
        elif kind == "delete" and names:
            image.delete_snapshot(names.pop(), by_id=False)
        elif kind == "grow":
            image.resize(SIZE + rng.randrange(1, 64) * 4096, shrink=True)
        elif kind == "shrink":
            image.resize(SIZE, shrink=True)
        else:
            image.flush()
    image.resize(SIZE, shrink=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_each_thread_reads_its_own_writes_whatever_goes_on_beside(tmp_path: Path, shape: str) -> None:
    path = make(tmp_path, shape)
    expected: dict[int, bytes] = {}
    with qcowlib.open(path, "r+", cache="unsafe") as image:
        writers = [Writer(image, number, 1000 * LONG, expected) for number in range(WRITERS)]
        stop = threading.Event()

        def all_writers() -> None:
            try:
                together(*writers)
            finally:
                stop.set()

        together(all_writers, lambda: structure(image, Random(shape), 10, stop))
        content = image.pread(SIZE, 0)
    for sector, data in expected.items():
        assert content[sector * 512 : sector * 512 + 512] == data, f"sector {sector}"
    with qcowlib.open(path) as image:
        assert image.pread(SIZE, 0) == content
        report = image.check()
    assert (report.corruptions, report.leaks, report.check_errors) == (0, 0, 0)


@pytest.mark.parametrize("shape", ["512", "4k", "64k", "subclusters"])
def test_a_reader_never_sees_another_place(tmp_path: Path, shape: str) -> None:
    """Clusters are discarded, released by a flush and given to other offsets while readers go over all of them."""
    path = make(tmp_path, shape)
    stop = threading.Event()
    with qcowlib.open(path, "r+", cache="unsafe") as image:

        def churn() -> None:
            rng = Random(shape)
            try:
                for version in range(2, 400 * LONG + 2):
                    first = rng.randrange(SECTORS)
                    count = min(rng.choice([8, 200, 600]), SECTORS - first)
                    image.pwrite(b"".join(tagged(n, version) for n in range(first, first + count)), first * 512)
                    image.discard(SIZE // 2, rng.choice([0, SIZE // 4, SIZE // 2]))
                    image.flush()
            finally:
                stop.set()

        def read(length: int, seed: int) -> None:
            rng = Random(seed)
            while not stop.is_set():
                first = rng.randrange(SECTORS - length // 512 + 1)
                data = image.pread(length, first * 512)
                for number in range(length // 512):
                    sector = data[number * 512 : number * 512 + 512]
                    if any(sector):
                        place = int.from_bytes(sector[8:16], "big")
                        assert place == first + number, f"sector {first + number} shows {place}"

        together(churn, lambda: read(SIZE, 1), lambda: read(100 * 512, 2), lambda: read(300 * 512, 3))
    with qcowlib.open(path) as image:
        report = image.check()
    assert (report.corruptions, report.leaks, report.check_errors) == (0, 0, 0)
