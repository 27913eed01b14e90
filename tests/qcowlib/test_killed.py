# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""kill -9 of a process that writes: the image opens again, and nothing flushed is lost (promises L1, L2).

The child tells after each flush what it had written before.  Killing leaves
what reached the page cache: every prefix of the calls, cut where it happens.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

import qcowlib
from qcowlib.testing.model import tagged
from tests.qcowlib.qemu import qemu_img, run

LONG = int(os.environ.get("QCOWLIB_LONG", "1"))
pytestmark = [pytest.mark.crash, pytest.mark.real("qemu-img", "qemu-io")]

SECTORS = 4096
SIZE = SECTORS * 512

#: The child: random writes; "w sector count version" before each, "f" when a flush returned.
CHILD = """
import os, random, sys
import qcowlib
from qcowlib.testing.model import tagged
path, seed, sectors = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng = random.Random(seed)
image = qcowlib.open(path, "r+")
version = 1
while True:
    version += 1
    first = rng.randrange(sectors)
    count = min(rng.choice([1, 3, 8, 64, 200]), sectors - first)
    kind = rng.random()
    if kind < 0.7:
        os.write(1, b"w %d %d %d\\n" % (first, count, version))
        image.pwrite(b"".join(tagged(n, version) for n in range(first, first + count)), first * 512)
    elif kind < 0.8:
        os.write(1, b"z %d %d 0\\n" % (first, count))
        image.zero(count * 512, first * 512)
    elif kind < 0.85:
        os.write(1, b"d %d %d 0\\n" % (first, count))
        image.discard(count * 512, first * 512)
    elif kind < 0.87 and sys.argv[4] == "snapshots":
        name = "s%d" % version
        os.write(1, b"c 0 0 %d\\n" % version)
        image.create_snapshot(name)
        os.write(1, b"f 0 0 0\\n")
        os.write(1, b"s 0 0 %d\\n" % version)
        if len(image.snapshots()) > 3:
            old = image.snapshots()[0].name
            os.write(1, b"x 0 0 %d\\n" % int(old[1:]))
            image.delete_snapshot(old, by_id=False)
    else:
        image.flush()
        os.write(1, b"f 0 0 0\\n")
"""


def killed_after(path: Path, seed: int, lines: int, snapshots: bool) -> list[tuple[str, int, int, int]]:
    """Let a child write until it told *lines* lines, kill it, and return all it told."""
    words = [sys.executable, "-c", CHILD, str(path), str(seed), str(SECTORS), "snapshots" if snapshots else "plain"]
    environment = {**os.environ, "PYTHONPATH": str(Path(qcowlib.__file__).parents[1])}
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=environment) as child:
        assert child.stdout is not None
        told = [child.stdout.readline() for _ in range(lines)]
        child.kill()
        told += child.stdout.readlines()
    events = []
    for line in told:
        kind, *numbers = line.decode().split()
        events.append((kind, int(numbers[0]), int(numbers[1]), int(numbers[2])))
    return events


def allowed(events: list[tuple[str, int, int, int]]) -> list[set[int]]:
    """The versions each sector may show: the last flushed one and all later ones."""
    values = [{0} for _ in range(SECTORS)]
    pending: list[tuple[str, int, int, int]] = []
    for event in [*events, ("end", 0, 0, 0)]:
        kind = event[0]
        if kind in ("w", "z", "d"):
            pending.append(event)
        elif kind in ("f", "end"):
            for change, first, count, version in pending:
                for sector in range(first, first + count):
                    if kind == "f" and change != "d":
                        values[sector] = {version}
                    else:
                        values[sector].add(version)
            pending = []
    return values


def snapshots_that_exist(events: list[tuple[str, int, int, int]]) -> set[str]:
    made = {f"s{version}" for kind, _, _, version in events if kind == "s"}
    return made - {f"s{version}" for kind, _, _, version in events if kind == "x"}


SHAPES: dict[str, dict[str, object]] = {
    "512": {"cluster_size": 512},
    "4k": {"cluster_size": 4096},
    "64k-lazy": {"lazy_refcounts": True},
    "subclusters": {"cluster_size": 16384, "extended_l2": True},
    "snapshots": {"cluster_size": 4096},
}


@pytest.mark.parametrize("seed", range(4 * LONG))
@pytest.mark.parametrize("shape", SHAPES)
def test_what_was_flushed_survives_a_killed_writer(tmp_path: Path, shape: str, seed: int) -> None:
    path = tmp_path / "image"
    qcowlib.create(path, SIZE, **SHAPES[shape])  # type: ignore[arg-type]
    events = killed_after(path, seed, Random(seed * 31 + len(shape)).randrange(5, 400), shape == "snapshots")
    copy = tmp_path / "copy"
    copy.write_bytes(path.read_bytes())
    # As it was left: leaks at most, or the dirty bit, which any opener for writing mends.
    with qcowlib.open(path) as image:
        dirty = image.info().dirty
        report = image.check()
        assert dirty or (report.corruptions, report.check_errors) == (0, 0), report
    # Both programs mend a copy, and agree that it is clean.
    run("qemu-io", "-f", "qcow2", "-c", "write -z 0 0", copy)
    qemu_img("check", "-q", "-r", "leaks", copy)
    with qcowlib.open(path, "r+") as image:
        image.flush()
        names = {entry.name for entry in image.snapshots()}
    assert snapshots_that_exist(events) <= names
    with qcowlib.open(path) as image:
        content = image.pread(SIZE, 0)
        assert image.check().corruptions == 0
    qemu_img("check", "-q", "-r", "leaks", path)
    qemu_img("compare", "-q", path, copy)
    for sector, values in enumerate(allowed(events)):
        data = content[sector * 512 : sector * 512 + 512]
        assert any(data == (tagged(sector, v) if v else bytes(512)) for v in values), f"sector {sector}: {values}"
