# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A power cut at any system call of a command: what the guest reads is what it read before, or what it shall read.

The engine's own crash tests record its storage calls; here the kernel's side of whole commands is
recorded, with their default cache modes, so that nothing between the two can lose an order.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest

import qcowlib
from qcowlib.testing.crash import CrashState, Finding, Oracle, assert_crash_safe, explore
from qcowlib.testing.recorder import OpLog
from tests.qcowlib.cli.traced import record
from tests.qcowlib.qemu import qemu_img, run

pytestmark = [pytest.mark.crash, pytest.mark.bare, pytest.mark.real("qemu-img", "qemu-io", "strace")]

SIZE_KIB = 512
#: The smallest clusters: short tables, so that each command needs several.
CLUSTER = 512
PER_BLOCK = CLUSTER // 2
MAGIC = b"QFI\xfb"
DIRTY = 1


class Case(NamedTuple):
    """A command, the files that it changes, and the image whose content is looked at."""

    command: str
    files: Sequence[str]
    view: str
    prepare: Callable[[Path], None] = lambda where: None


def scribble(path: Path, seed: int, count: int) -> None:
    """Write *count* ranges at random with the real program."""
    random = Random(seed)
    words: list[str] = []
    for _ in range(count):
        length = random.randrange(1, 30)
        words += ["-c", f"write -q -P {random.randrange(1, 255)} {random.randrange(SIZE_KIB - length)}k {length}k"]
    run("qemu-io", *words, path)


def with_snapshots(where: Path) -> None:
    for number in range(2):
        qemu_img("snapshot", "-c", f"s{number}", where / "top.qcow2")
        scribble(where / "top.qcow2", 40 + number, 12)


def with_bitmaps(where: Path) -> None:
    for name in ("b0", "b1"):
        qemu_img("bitmap", "--add", "-g", "4k", where / "top.qcow2", name)
        scribble(where / "top.qcow2", 50, 8)


def with_leaks(where: Path) -> None:
    """Clusters behind the end that are counted and that nothing names, as after a cut."""
    path = where / "base.qcow2"
    data = bytearray(path.read_bytes())
    table = int.from_bytes(data[48:56], "big")
    first = -(-len(data) // CLUSTER)
    for cluster in range(first, -(-(first + 1) // PER_BLOCK) * PER_BLOCK):
        block = int.from_bytes(data[table + cluster // PER_BLOCK * 8 :][:8], "big")
        at = block + 2 * (cluster % PER_BLOCK)
        data[at : at + 2] = b"\0\1"
    path.write_bytes(data)


TOP, MID, BASE = ("top.qcow2",), ("mid.qcow2", "top.qcow2"), ("base.qcow2",)
NEW = ("new.qcow2",)
CASES = [
    Case("snapshot -c new top.qcow2", TOP, "top.qcow2", with_snapshots),
    Case("snapshot -a s0 top.qcow2", TOP, "top.qcow2", with_snapshots),
    Case("snapshot -d s0 top.qcow2", TOP, "top.qcow2", with_snapshots),
    Case("commit top.qcow2", MID, "top.qcow2"),
    Case("commit -d -b base.qcow2 top.qcow2", ("base.qcow2", "mid.qcow2", "top.qcow2"), "top.qcow2"),
    Case("rebase -b base.qcow2 -F qcow2 top.qcow2", TOP, "top.qcow2"),
    Case("rebase -b  top.qcow2", TOP, "top.qcow2"),
    Case("resize base.qcow2 4M", BASE, "base.qcow2"),
    Case("resize --shrink base.qcow2 200k", BASE, "base.qcow2"),
    Case("amend -o compat=0.10 base.qcow2", BASE, "base.qcow2"),
    Case("amend -o refcount_bits=64 base.qcow2", BASE, "base.qcow2"),
    Case("bitmap --add top.qcow2 new", TOP, "top.qcow2", with_bitmaps),
    Case("bitmap --clear --merge b0 top.qcow2 b1", TOP, "top.qcow2", with_bitmaps),
    Case("bitmap --remove top.qcow2 b0", TOP, "top.qcow2", with_bitmaps),
    Case("check -q -r leaks base.qcow2", BASE, "base.qcow2", with_leaks),
    Case("compact top.qcow2", TOP, "top.qcow2", with_snapshots),
    Case("merge --from mid.qcow2 top.qcow2", MID, "top.qcow2"),
    Case("merge --from base.qcow2 --to mid.qcow2 top.qcow2", ("base.qcow2", "mid.qcow2", "top.qcow2"), "top.qcow2"),
    Case("salvage top.qcow2 new.qcow2", NEW, "new.qcow2"),
    Case("diff --overlay new.qcow2 -F qcow2 base.qcow2 top.qcow2", NEW, "new.qcow2"),
    Case("overlay -b base.qcow2 -F qcow2 new.qcow2", NEW, "new.qcow2"),
    Case("create -q -f qcow2 -o preallocation=metadata new.qcow2 1M", ("new.qcow2",), "new.qcow2"),
    Case("convert -t writeback -O qcow2 top.qcow2 new.qcow2", ("new.qcow2",), "new.qcow2"),
]


def content(path: Path) -> bytes | None:
    """What the guest reads; None while there is no image yet."""
    if not path.exists() or path.read_bytes()[:4] != MAGIC:
        return None
    with qcowlib.open(path) as image:
        return image.pread(image.size, 0)


def broken(path: Path) -> bool:
    """Whether check finds what opening the image for writing does not mend."""
    with qcowlib.open(path, backing=False) as image:
        if not image.check().corruptions:
            return False
    if not int.from_bytes(path.read_bytes()[72:80], "big") & DIRTY:
        return True
    with qcowlib.open(path, "r+", backing=False) as image:
        return image.check().corruptions > 0


def recorded(case: Case, where: Path) -> tuple[OpLog, set[bytes | None]]:
    """Run the command of *case*; returns what it did and what the guest may read meanwhile."""
    options = f"cluster_size={CLUSTER}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, "base.qcow2", f"{SIZE_KIB}k", cwd=where)
    for name, below in (("mid.qcow2", "base.qcow2"), ("top.qcow2", "mid.qcow2")):
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, "-b", below, "-F", "qcow2", name, cwd=where)
    for seed, name in enumerate(("base.qcow2", "mid.qcow2", "top.qcow2")):
        scribble(where / name, seed, 12)
    case.prepare(where)
    before = content(where / case.view)
    log = record([sys.executable, "-m", "qcowlib", *case.command.split(" ")], case.files, where)
    return log, {before, content(where / case.view)}


def judge(case: Case, where: Path, allowed: set[bytes | None]) -> Oracle:
    """Return what looks at the content of each state, at its tables, and at times has qemu-img repair it."""
    judged = 0

    def oracle(state: CrashState) -> list[Finding]:
        nonlocal judged
        for name, image in zip(case.files, state.images, strict=True):
            (where / name).write_bytes(image)
        images = [where / name for name, image in zip(case.files, state.images, strict=True) if image[:4] == MAGIC]
        try:
            if content(where / case.view) not in allowed:
                return [Finding("MIXED", case.view)]
            wrong = [Finding("CORRUPT", path.name) for path in images if broken(path)]
        except qcowlib.Error as error:
            return [Finding("CORRUPT", str(error))]
        judged += 1
        if images and judged % 25 == 0:
            done = subprocess.run(["qemu-img", "check", "-q", "-r", "all", images[-1]], check=False)
            if done.returncode:
                wrong.append(Finding("QEMU", f"qemu-img check ends with {done.returncode}"))
        return wrong

    return oracle


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.command.replace(" ", "_"))
def test_a_cut_at_any_call_of_a_command_leaves_the_old_content_or_the_new(case: Case, tmp_path: Path) -> None:
    log, allowed = recorded(case, tmp_path)
    assert any(op.kind == "flush" for op in log.ops)
    assert_crash_safe(log, judge(case, tmp_path, allowed), allow=(), subset_limit=4, random_states=4)


@pytest.mark.parametrize("case", [CASES[1], CASES[4]], ids=lambda case: case.command.replace(" ", "_"))
def test_without_its_barriers_a_command_is_found_out(case: Case, tmp_path: Path) -> None:
    log, allowed = recorded(case, tmp_path)
    log.ops = [op for op in log.ops if op.kind != "flush"]
    report = explore(log, judge(case, tmp_path, allowed), subset_limit=4, random_states=4, stop_after=1)
    assert report.verdicts
