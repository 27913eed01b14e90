# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Backups of several disks: all bitmaps advance or none, wherever the process is killed and whatever comes after."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

import qcowlib
from qcowlib.jobs import backup_set as sets
from qcowlib.jobs.backup_set import DiskBackup, DiskRestore, backup_set, finish_set, restore_set
from qcowlib.storage.file import FileStorage
from tests.qcowlib.qemu import qemu_img

SIZE = 1 << 20
COUNT = 3


def write(path: Path, rng: random.Random, times: int = 3) -> None:
    with qcowlib.open(path, "r+") as image:
        for _ in range(times):
            image.pwrite(rng.randbytes(5000), rng.randrange(SIZE - 5000))


def content(path: Path) -> bytes:
    with qcowlib.open(path) as image:
        return image.pread(image.size, 0)


def disks(folder: Path) -> list[DiskBackup]:
    """Three disks with a full backup each, and writes since then."""
    made = []
    for number in range(COUNT):
        rng = random.Random(number)
        disk, full = folder / f"disk{number}", folder / f"full{number}"
        qcowlib.create(disk, SIZE)
        write(disk, rng)
        qcowlib.convert(disk, full)
        with qcowlib.open(disk, "r+") as image:
            image.add_bitmap("b")
        write(disk, rng)
        made.append(DiskBackup(str(disk), str(folder / f"inc{number}"), "b", str(full), "qcow2"))
    return made


def names_of(disk: DiskBackup) -> list[str]:
    with qcowlib.open(disk.source) as image:
        return [bitmap.name for bitmap in image.bitmaps()]


def test_all_bitmaps_advance(tmp_path: Path) -> None:
    wanted = disks(tmp_path)
    told: list[tuple[int, int]] = []
    stored = backup_set(wanted, tmp_path / "journal", progress=lambda done, total: told.append((done, total)))
    assert len(stored) == COUNT and all(stored)
    assert told[-1] == (COUNT * SIZE, COUNT * SIZE) and told == sorted(told)
    assert not (tmp_path / "journal").exists()
    for disk in wanted:
        assert content(Path(disk.target)) == content(Path(disk.source))
        assert names_of(disk) == ["b"]
        assert qcowlib.diff(None, disk.source, bitmap="b") == []
        qemu_img("check", disk.source)


@pytest.mark.parametrize("wrong", ["target", "bitmap", "twice", "disabled", "none"])
def test_wrong_set_is_refused_before_anything_is_made(tmp_path: Path, wrong: str) -> None:
    wanted = disks(tmp_path)
    if wrong == "target":
        Path(wanted[2].target).write_text("there")
    elif wrong == "bitmap":
        wanted[1] = wanted[1]._replace(bitmap="gone")
    elif wrong == "twice":
        wanted[1] = wanted[1]._replace(source=wanted[0].source)
    elif wrong == "disabled":
        with qcowlib.open(wanted[1].source, "r+") as image:
            image.disable_bitmap("b")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(qcowlib.UsageError):
        backup_set([] if wrong == "none" else wanted, tmp_path / "journal")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert names_of(wanted[0]) == ["b"]


def test_failure_takes_all_back(tmp_path: Path) -> None:
    wanted = disks(tmp_path)
    bad = [*wanted[:2], wanted[2]._replace(backing=str(tmp_path / "gone"))]
    dirty = [qcowlib.diff(None, disk.source, bitmap="b") for disk in wanted]
    with pytest.raises(qcowlib.Error):
        backup_set(bad, tmp_path / "journal")
    with pytest.raises(qcowlib.Cancelled):
        backup_set(wanted, tmp_path / "journal", cancel=lambda: (tmp_path / "inc1").exists())
    assert not list(tmp_path.glob("inc*")) and not list(tmp_path.glob("journal*"))
    assert [qcowlib.diff(None, disk.source, bitmap="b") for disk in wanted] == dirty
    assert [names_of(disk) for disk in wanted] == [["b"]] * COUNT


def kill_at(step: int, work: Callable[[], object]) -> bool:
    """Run *work* in a child that is gone before its *step*-th durable step; returns whether it got to its end."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def counted(real: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object, **words: object) -> object:
                nonlocal count
                count += 1
                if count > step:
                    os._exit(9)
                return real(*args, **words)

            return call

        try:
            FileStorage.flush = counted(FileStorage.flush)  # type: ignore[method-assign]
            for name in ("replace", "unlink", "fsync"):
                setattr(os, name, counted(getattr(os, name)))
            sets.sync_directory = counted(sets.sync_directory)  # type: ignore[attr-defined]
            work()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 9)
    return code == 0


@pytest.mark.real("qemu-img")
@pytest.mark.parametrize("guests", ["rest", "write"])
def test_killed_anywhere_all_bitmaps_advance_or_none(tmp_path: Path, guests: str) -> None:
    step, endings = 0, set()
    while True:
        folder = tmp_path / str(step)
        folder.mkdir()
        wanted = disks(folder)
        states = [content(Path(disk.source)) for disk in wanted]
        ended = kill_at(step, lambda wanted=wanted, folder=folder: backup_set(wanted, folder / "journal"))  # type: ignore[misc]
        if guests == "write":
            for number, disk in enumerate(wanted):
                write(Path(disk.source), random.Random(f"{step} {number}"))
        ending = finish_set(folder / "journal")
        assert finish_set(folder / "journal") == "nothing"
        assert not list(folder.glob("journal")) and [names_of(disk) for disk in wanted] == [["b"]] * COUNT
        made = [Path(disk.target).exists() for disk in wanted]
        advanced = ending == "finished" or (ending == "nothing" and made[0])
        assert made == [advanced] * COUNT
        endings.add(ending)
        for number, (disk, state) in enumerate(zip(wanted, states, strict=True)):
            below = Path(disk.backing)
            if advanced:
                assert content(Path(disk.target)) == state
                below = Path(disk.target)
            # Whatever happened, the next round holds all that is missing.
            last = folder / f"last{number}"
            qcowlib.backup(disk.source, last, "b", backing=str(below), backing_format="qcow2")
            assert content(last) == content(Path(disk.source))
        qemu_img("check", wanted[0].source, ok=ended)
        if ended:
            break
        step += 1
    assert endings == {"nothing", "taken back", "finished"} and step > 10


def test_set_at_work_cannot_be_finished_by_another(tmp_path: Path) -> None:
    wanted = disks(tmp_path)
    busy: list[bool] = []

    def look(done: int, total: int) -> None:
        if not busy:
            with pytest.raises(qcowlib.Busy):
                finish_set(tmp_path / "journal")
            busy.append(True)

    backup_set(wanted, tmp_path / "journal", progress=look)
    assert busy and names_of(wanted[0]) == ["b"]


def test_journal_of_an_unfinished_set_is_not_overwritten(tmp_path: Path) -> None:
    wanted = disks(tmp_path)
    kill_at(20, lambda: backup_set(wanted, tmp_path / "journal"))
    assert (tmp_path / "journal").exists() and "b~next" in names_of(wanted[0])
    for call in (lambda: backup_set(wanted, tmp_path / "journal"), lambda: backup_set(wanted, tmp_path / "other")):
        with pytest.raises(qcowlib.UsageError):
            call()
    assert finish_set(tmp_path / "journal") == "taken back"
    backup_set(wanted, tmp_path / "other")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "x",
        '{"journal": 2}',
        json.dumps({"journal": 1, "kind": "backup", "state": "copying", "disks": [1]}),
    ],
)
def test_file_that_is_no_journal_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "journal").write_text(text)
    with pytest.raises(qcowlib.FormatError, match="no journal"):
        finish_set(tmp_path / "journal")


def test_restore_of_a_set_is_finished_after_a_kill(tmp_path: Path) -> None:
    wanted = disks(tmp_path)
    backup_set(wanted, tmp_path / "journal")
    pairs = [DiskRestore(disk.target, disk.backing, target_format="qcow2") for disk in wanted]
    step = 0
    while not kill_at(step, lambda: restore_set(pairs, tmp_path / "journal")):
        finish_set(tmp_path / "journal")
        step += 1
    assert finish_set(tmp_path / "journal") == "nothing"
    for disk in wanted:
        assert content(Path(disk.backing)) == content(Path(disk.source))
