# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Jobs that change an image in place and are finished by another call: after a cut anywhere that is true."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import qcowlib
from qcowlib.jobs.seal_file import Seal
from qcowlib.storage.memory import MemoryStorage
from qcowlib.testing.crash import CrashState, Finding, assert_crash_safe
from qcowlib.testing.recorder import OpLog

MiB = 1 << 20
SECTOR = 512


class Job(NamedTuple):
    """What has to become *wanted*, and what makes it so."""

    target: Path
    wanted: bytes
    run: Callable[[qcowlib.Image], object]


def content(path: Path) -> bytes:
    with qcowlib.open(path) as image:
        return image.pread(image.size, 0)


def scribble(path: Path, rng: random.Random, count: int) -> None:
    with qcowlib.open(path, "r+") as image:
        for _ in range(count):
            offset, length = rng.randrange(image.size - 70_000), rng.choice([512, 5000, 70_000])
            if rng.random() < 0.3:
                image.zero(length, offset)
            else:
                image.pwrite(rng.randbytes(length), offset)


def healing(folder: Path, cluster_size: int) -> Job:
    """A disk with silent damage, its replica, and the seal."""
    rng = random.Random(cluster_size)
    good, bad = folder / "good", folder / "bad"
    qcowlib.create(good, MiB)
    scribble(good, rng, 12)
    qcowlib.seal(good, folder / "seal", unit=4096)
    qcowlib.convert(good, bad, cluster_size=cluster_size)
    with qcowlib.open(bad, "r+") as image:
        image.create_snapshot("shares its clusters")
    scribble(bad, rng, 8)
    return Job(bad, content(good), lambda image: qcowlib.heal(image, good, folder / "seal"))


def restoring(folder: Path, cluster_size: int) -> Job:
    """A disk that holds the backup before, and an increment."""
    rng = random.Random(cluster_size)
    disk, old, increment = folder / "disk", folder / "old", folder / "increment"
    qcowlib.create(disk, MiB)
    scribble(disk, rng, 12)
    qcowlib.convert(disk, old, cluster_size=cluster_size)
    with qcowlib.open(disk, "r+") as image:
        image.add_bitmap("b", 4096)
    scribble(disk, rng, 8)
    qcowlib.backup(disk, increment, "b", backing="old", backing_format="qcow2", cluster_size=4096)
    return Job(old, content(disk), lambda image: qcowlib.restore(increment, image))


@pytest.mark.crash
@pytest.mark.parametrize("cluster_size", [4096, 65536])
@pytest.mark.parametrize("prepare", [healing, restoring])
def test_a_cut_leaves_old_or_new_sectors_and_another_call_ends_it(
    tmp_path: Path, prepare: Callable[[Path, int], Job], cluster_size: int
) -> None:
    """Invariant: I1, I2, I6."""
    job = prepare(tmp_path, cluster_size)
    before = content(job.target)
    assert before != job.wanted
    storage, log = MemoryStorage(bytearray(job.target.read_bytes()), name="target"), OpLog()
    with qcowlib.open(log.record(storage), "r+", format="qcow2") as image:
        job.run(image)

    def judge(state: CrashState) -> list[Finding]:
        with qcowlib.open(MemoryStorage(bytearray(state.images[0])), "r+", format="qcow2") as image:
            found = image.pread(image.size, 0)
            for at in range(0, len(found), SECTOR):
                sector = found[at : at + SECTOR]
                if sector not in (before[at : at + SECTOR], job.wanted[at : at + SECTOR]):
                    return [Finding("MIXED", f"sector {at // SECTOR}")]
            job.run(image)
            report = image.check()
            if report.corruptions or image.pread(image.size, 0) != job.wanted:
                return [Finding("LOST", str(report.findings[:2]))]
            return [Finding("LEAK", "")] if report.leaks else []

    assert assert_crash_safe(log, judge, random_states=4, subset_limit=4).distinct > 10


@pytest.mark.bare
def test_killed_seal_leaves_the_old_one(tmp_path: Path) -> None:
    disk, sealed = tmp_path / "disk", tmp_path / "disk.seal"
    qcowlib.create(disk, 4 * MiB)
    with qcowlib.open(disk, "r+") as image:
        image.pwrite(b"old" * MiB, 0)
    qcowlib.seal(disk, sealed)
    old = sealed.read_bytes()
    with qcowlib.open(disk, "r+") as image:
        image.pwrite(b"new" * MiB, 0)
    code = (
        "import os, signal, sys, qcowlib\n"
        "def half(done, total):\n"
        "    if 2 * done >= total: os.kill(os.getpid(), signal.SIGKILL)\n"
        "qcowlib.seal(sys.argv[1], sys.argv[2], progress=half, workers=1)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code, disk, sealed], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL and sealed.read_bytes() == old
    made = qcowlib.seal(disk, sealed)
    with Seal(sealed) as found:
        assert found.digest == made.digest
    assert qcowlib.verify(disk, sealed)
    assert not Path(f"{sealed}.new").exists()
