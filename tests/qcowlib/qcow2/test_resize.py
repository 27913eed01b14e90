# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Growing and shrinking: content, what qemu thinks of it, and cuts in between."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

import qcowlib
from qcowlib.qcow2.create import CreateOptions, create
from qcowlib.storage.memory import MemoryStorage
from qcowlib.testing.crash import CrashState, Finding, assert_crash_safe
from qcowlib.testing.recorder import OpLog
from qcowlib.testing.reference import ReferenceError, RefImage, reference_check, reference_read

pytestmark = pytest.mark.real("qemu-img")

SECTOR = 512
OPTIONS = ["", "cluster_size=512", "extended_l2=on,cluster_size=16k", "cluster_size=1k,compat=0.10"]


def qemu_img(*words: str | Path) -> str:
    return subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("backing", [0, 700, 5000], ids=["alone", "shorter-base", "longer-base"])
@pytest.mark.parametrize("options", OPTIONS)
def test_random_resizes_uncover_nothing_old(tmp_path: Path, options: str, backing: int) -> None:
    rng = random.Random(f"{options} {backing}")
    model = bytearray(1000 * SECTOR)
    path = tmp_path / "image"
    words: list[str | Path] = ["create", "-q", "-f", "qcow2"]
    words += ["-o", options] if options else []
    if backing:
        base = rng.randbytes(backing * SECTOR)
        (tmp_path / "base").write_bytes(base)
        model[: len(base)] = base[: len(model)]
        del model[1000 * SECTOR :]
        words += ["-b", "base", "-F", "raw"]
    qemu_img(*words, path, str(len(model)))
    image = qcowlib.open(path, "r+")
    for _ in range(30):
        if rng.random() < 0.5:
            offset = rng.randrange(len(model))
            data = rng.randbytes(min(rng.choice([512, 5000, 60000]), len(model) - offset))
            image.pwrite(data, offset)
            model[offset : offset + len(data)] = data
        else:
            size = rng.choice([300, 700, 1000, 1003, 2000, 4000, 9000]) * SECTOR
            grows = size > len(model) and (not backing or "extended" in options)
            image.resize(size, shrink=True, preallocation=rng.choice(["off", "metadata", "full"]) if grows else "off")
            model = model[:size].ljust(size, b"\0")
        assert image.pread(len(model) + 1, 0) == bytes(model)
    image.close()
    qemu_img("check", path)
    qemu_img("convert", "-O", "raw", path, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == bytes(model)


def test_shrinking_needs_permission_and_cuts_the_file(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", path, "8M")
    with qcowlib.open(path, "r+") as image:
        image.pwrite(b"x" * (4 << 20), 0)
        with pytest.raises(qcowlib.UsageError, match="--shrink"):
            image.resize(1 << 20)
        before = path.stat().st_size
        image.resize(1 << 20, shrink=True)
        assert path.stat().st_size < before - (2 << 20)
        assert image.pread(1 << 20, 0) == b"x" * (1 << 20)
    qemu_img("check", path)


def test_shrinking_lets_go_of_refcount_blocks_that_count_nothing(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512,refcount_bits=64", path, "3M")
    with qcowlib.open(path, "r+") as image:
        image.pwrite(b"x" * (3 << 20), 0)
        image.resize(1 << 20, shrink=True)
        # What is uncovered now is covered again when it is needed.
        image.resize(2 << 20)
        image.pwrite(b"y" * (512 << 10), 1 << 20)
        image.resize(1 << 20, shrink=True)
    data = path.read_bytes()
    place, clusters = (int.from_bytes(data[at : at + size], "big") for at, size in ((48, 8), (56, 4)))
    entries = [int.from_bytes(data[at : at + 8], "big") for at in range(place, place + clusters * 512, 8)]
    assert sum(1 for entry in entries if entry) > 10
    assert all(any(data[entry : entry + 512]) for entry in entries if entry)
    qemu_img("check", path)


def test_sizes_that_qemu_refuses_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "8M")
    with qcowlib.open(path, "r+") as image:
        with pytest.raises(qcowlib.UsageError, match="multiple of 512"):
            image.resize((8 << 20) + 1)
        with pytest.raises(qcowlib.StorageError, match="too large"):
            image.resize(1 << 40)
        assert image.size == 8 << 20


@pytest.mark.parametrize("target", [96, 12], ids=["grow", "shrink"])
def test_a_cut_leaves_the_old_size_or_the_new_one(target: int) -> None:
    old, new = 32 * 1024, target * 1024
    file = MemoryStorage()
    create(file, CreateOptions(size=old, cluster_size=512, refcount_bits=64))
    with qcowlib.open(file, "r+", format="qcow2") as image:
        image.pwrite(bytes(range(1, 65)) * 512, 0)
    content = bytes(range(1, 65)) * 512
    log = OpLog()
    recorded = log.record(file)
    with qcowlib.open(recorded, "r+", format="qcow2") as image:
        image.resize(new, shrink=True)

    def judge(state: CrashState) -> list[Finding]:
        try:
            image = RefImage(bytes(state.images[0]))
            seen = reference_read(image)
        except ReferenceError as error:
            return [Finding("UNREADABLE", str(error))]
        result = reference_check(image)
        if result.corruptions:
            return [Finding("CORRUPT", result.messages[0])]
        if len(seen) not in (old, new) or seen != content[: len(seen)].ljust(len(seen), b"\0"):
            return [Finding("THIRD", f"{len(seen)} bytes that are neither")]
        return []

    report = assert_crash_safe(log, judge)
    assert report.distinct > 3
