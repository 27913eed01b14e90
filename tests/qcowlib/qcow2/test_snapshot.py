# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Internal snapshots: random histories against qemu-img, and cuts at every write."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

import qcowlib
from qcowlib.qcow2 import snapshot as snapshot_module
from qcowlib.qcow2.create import CreateOptions, create
from qcowlib.qcow2.ordering import Writeback, _Cut
from qcowlib.storage.memory import MemoryStorage
from qcowlib.testing.crash import assert_crash_safe, explore
from qcowlib.testing.model import GuestModel
from qcowlib.testing.recorder import OpLog

pytestmark = pytest.mark.real("qemu-img")

SIZE = 512 * 1024
OPTIONS = [
    "",
    "cluster_size=512",
    "cluster_size=4k,refcount_bits=4",
    "extended_l2=on,cluster_size=16k",
    "compat=0.10",
    "lazy_refcounts=on",
]


def qemu_img(*words: str | Path) -> str:
    return subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True, text=True).stdout


def content(path: Path, out: Path, *more: str) -> bytes:
    qemu_img("convert", *more, "-O", "raw", path, out)
    return out.read_bytes()


@pytest.mark.parametrize("options", OPTIONS)
def test_random_histories_read_the_same_here_and_in_qemu(tmp_path: Path, options: str) -> None:
    rng = random.Random(options)
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", *(["-o", options] if options else []), path, str(SIZE))
    now = bytearray(SIZE)
    saved: dict[str, bytes] = {}
    image = qcowlib.open(path, "r+")
    for number in range(40):
        step = rng.choice(["write"] * 5 + ["create", "create", "apply", "delete", "reopen", "zero", "qemu"])
        if step == "write":
            offset = rng.randrange(SIZE)
            data = rng.randbytes(min(rng.choice([512, 3000, 40000]), SIZE - offset))
            image.pwrite(data, offset)
            now[offset : offset + len(data)] = data
        elif step == "zero":
            offset = rng.randrange(SIZE)
            length = min(50000, SIZE - offset)
            image.zero(length, offset)
            now[offset : offset + length] = bytes(length)
        elif step == "create" and len(saved) < 6:
            name = f"s{number}"
            image.create_snapshot(name)
            saved[name] = bytes(now)
        elif step == "apply" and saved:
            name = rng.choice(list(saved))
            image.apply_snapshot(name)
            now[:] = saved[name]
        elif step == "delete" and saved:
            name = rng.choice(list(saved))
            image.delete_snapshot(name)
            del saved[name]
        elif step == "qemu":
            image.close()
            qemu_img("check", path)
            name = f"q{number}"
            if len(saved) < 6:
                qemu_img("snapshot", "-c", name, path)
                saved[name] = bytes(now)
            elif saved:
                qemu_img("snapshot", "-d", gone := rng.choice(list(saved)), path)
                del saved[gone]
            image = qcowlib.open(path, "r+")
        else:
            image.close()
            image = qcowlib.open(path, "r+")
        assert image.pread(SIZE, 0) == bytes(now)
    image.close()
    qemu_img("check", path)
    assert content(path, tmp_path / "out") == bytes(now)
    for name, data in saved.items():
        assert content(path, tmp_path / "out", "-l", f"snapshot.name={name}") == data
        with qcowlib.open(path, snapshot=name) as old:
            assert old.pread(SIZE, 0) == data


def test_applying_restores_the_size_the_snapshot_had(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    with qcowlib.open(path, "r+") as image:
        image.pwrite(b"a" * 1000, (1 << 20) - 1000)
        image.create_snapshot("small")
        image.resize(1 << 30)
        image.pwrite(b"b" * 1000, (1 << 30) - 1000)
        image.create_snapshot("big")
        image.apply_snapshot("small")
        assert image.size == 1 << 20
        assert image.pread(1000, (1 << 20) - 1000) == b"a" * 1000
        image.apply_snapshot("big")
        assert image.size == 1 << 30
        assert image.pread(1000, (1 << 30) - 1000) == b"b" * 1000
    qemu_img("check", path)


def test_a_refcount_width_without_room_refuses_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "refcount_bits=1", path, "1M")
    with qcowlib.open(path, "r+") as image:
        image.pwrite(b"a" * 200000, 0)
        with pytest.raises(qcowlib.Error, match="maximum"):
            image.create_snapshot("s")
        image.pwrite(b"b" * 1000, 5)
        assert image.snapshots() == []
    qemu_img("check", path)


def test_ids_names_and_the_table_are_what_qemu_reads(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    with qcowlib.open(path, "r+") as image:
        for name in ("first", "second", "x" * 300):
            image.create_snapshot(name)
        assert [entry.id for entry in image.snapshots()] == ["1", "2", "3"]
        image.delete_snapshot("2")
        assert image.create_snapshot("again").id == "4"
    lines = qemu_img("snapshot", "-l", path).splitlines()[2:]
    assert [line.split()[0] for line in lines] == ["1", "3", "4"]
    assert lines[1].split()[1] == "x" * 255


def history(seed: int, *, version: int = 3) -> tuple[OpLog, GuestModel]:
    """Writes, snapshots, reverts and deletions on a recorded image."""
    rng = random.Random(seed)
    file = MemoryStorage()
    bits = 64 if version == 3 else 16
    create(file, CreateOptions(size=24 * 1024, cluster_size=1024, refcount_bits=bits, version=version))
    log = OpLog()
    recorded = log.record(file)
    model = GuestModel(24 * 1024, log)
    names: list[str] = []
    image = qcowlib.open(recorded, "r+", format="qcow2")
    for number in range(14):
        step = rng.choice(["write"] * 4 + ["flush", "create", "revert", "delete"])
        if step == "create" or (number == 4 and not names):
            with model.snapshot(name := f"s{number}"):
                image.create_snapshot(name)
            names.append(name)
        elif step == "revert" and names:
            with model.revert(name := rng.choice(names)):
                image.apply_snapshot(name)
        elif step == "delete" and names:
            with model.delete(name := names.pop(rng.randrange(len(names)))):
                image.delete_snapshot(name)
        elif step == "flush":
            with model.flush():
                image.flush()
        else:
            first = rng.randrange(48)
            length = min(rng.randint(1, 8), 48 - first) * 512
            with model.write(first * 512, length) as data:
                image.pwrite(data, first * 512)
    with model.flush():
        image.close()
    return log, model


@pytest.mark.parametrize("seed", range(4))
def test_a_cut_leaves_the_old_snapshots_or_the_new_ones(seed: int) -> None:
    log, model = history(seed)
    report = assert_crash_safe(log, model.oracle, seed=seed, random_states=4)
    assert report.distinct > 20


def test_version_2_shows_the_harmless_direction_at_most() -> None:
    log, model = history(3, version=2)
    assert_crash_safe(log, model.oracle, allow=("LEAK", "STALEFLAG"), random_states=4)


def test_without_the_dirty_bit_a_cut_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(self: snapshot_module._Change) -> None:
        return

    monkeypatch.setattr(snapshot_module._Change, "_protect", nothing)
    log, model = history(0)
    report = explore(log, model.oracle, random_states=4)
    assert set(report.verdicts) & {"STALEFLAG", "CORRUPT"}


def test_a_quiet_commit_that_skips_the_barrier_behind_its_writes_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    send = Writeback._send

    async def hasty(self: Writeback, cut: _Cut) -> None:
        if not cut.quiet:
            await send(self, cut)
            return
        for rank in cut.ranks:
            await self._write_all(rank)

    monkeypatch.setattr(Writeback, "_send", hasty)
    found: set[str] = set()
    for seed in range(3):
        log, model = history(seed)
        found |= set(explore(log, model.oracle, random_states=4).verdicts)
    assert found - {"LEAK"}


def test_deleting_flags_tables_whose_counts_lie_in_several_blocks() -> None:
    """Flags of a table that were set before a refcount block had to be read reach storage, too."""
    storage = MemoryStorage()
    # A block counts 64 clusters.
    create(storage, CreateOptions(size=64 * 512, cluster_size=512, refcount_bits=64))
    with qcowlib.open(storage, "r+", format="qcow2") as image:
        image.pwrite(b"d" * 512 * 10, 0)
        image.create_snapshot("one")
    with qcowlib.open(storage, "r+", format="qcow2") as image:
        image.pwrite(b"d" * 512 * 54, 10 * 512)
    with qcowlib.open(storage, "r+", format="qcow2") as image:
        image.delete_snapshot("1")
        assert image.check().clean
