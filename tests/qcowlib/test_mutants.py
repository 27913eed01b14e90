# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Valid images with a few fields, entries or bytes changed, against everything that reads one (promise N1).

Whatever the change: an answer or one line of :class:`qcowlib.Error`, within
10 s of CPU and 512 MiB.  An image that opens for writing keeps what it reads
through a write beside it, or refuses.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given

import qcowlib
from qcowlib.testing.strategies import hostile_images

pytestmark = pytest.mark.fuzz

CPU_S = 10
MEMORY = 512 << 20
MIB = 1 << 20


@contextmanager
def bounded() -> Iterator[None]:
    """Fail what takes more memory than promised with MemoryError, and more time with an assertion."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    started = time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert time.process_time() - started < CPU_S


def attempt(action: Callable[[], object]) -> bool:
    """Run *action*; only our own errors may come, and they are one line."""
    try:
        action()
    except qcowlib.Error as error:
        assert str(error).isprintable(), repr(str(error))
        return False
    return True


def read(path: Path) -> None:
    with qcowlib.open(path, format="qcow2", references=qcowlib.deny_all) as image:
        for offset in (0, 65536, image.size // 2, max(image.size - 4096, 0)):
            attempt(lambda at=offset: image.pread(65536, at))  # type: ignore[misc]
        attempt(lambda: [extent for extent, _ in zip(image.extents(), range(300), strict=False)])
        attempt(image.info)
        attempt(image.check)
        attempt(image.snapshots)


def convert(path: Path) -> None:
    with qcowlib.open(path, format="qcow2", backing=False, references=qcowlib.deny_all) as image:
        size = image.size
    if size <= 16 * MIB:
        for target in ("raw", "qcow2"):
            out = path.with_suffix(f".{target}")
            attempt(lambda t=target, o=out: qcowlib.convert(path, o, source_format="qcow2", format=t))  # type: ignore[misc]


def write(path: Path) -> None:
    with qcowlib.open(path, "r+", format="qcow2", backing=False, references=qcowlib.deny_all) as image:
        if image.size < 256 * 1024:
            return
        before: list[bytes] = []
        whole = attempt(lambda: before.append(image.pread(128 * 1024, 128 * 1024)))
        wrote = attempt(lambda: image.pwrite(b"w" * 5000, 70000)) and attempt(image.flush)
        attempt(lambda: image.discard(65536, 0))
        attempt(image.flush)
        if whole and wrote and not image.info().corrupt and image.check().corruptions == 0:
            assert image.pread(128 * 1024, 128 * 1024) == before[0]


@given(raw=hostile_images())
def test_a_mutant_gives_an_answer_or_one_line(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "mutant"
    path.write_bytes(raw)
    with bounded():
        attempt(lambda: read(path))
        attempt(lambda: convert(path))
        attempt(lambda: qcowlib.inspect(path))
        attempt(lambda: write(path))
