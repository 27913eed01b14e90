# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Cuts while bitmaps advance: all or none, and what no complete backup holds is recorded.

A state is judged by the reference reader alone.  The journal of a set, which is
replaced whole, is a mark in the log: a state is finished with every journal
that its time allows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import qcowlib
from qcowlib.jobs import backup_set as sets
from qcowlib.jobs.backup import backup
from qcowlib.jobs.backup_set import DiskBackup, backup_set, finish_set
from qcowlib.qcow2.bitmap_session import BitmapSession
from qcowlib.qcow2.create import CreateOptions, create
from qcowlib.storage.base import Storage
from qcowlib.storage.memory import MemoryStorage
from qcowlib.testing.crash import CrashState, Finding, assert_crash_safe
from qcowlib.testing.recorder import OpLog
from qcowlib.testing.reference import ReferenceError, RefImage, reference_check, reference_read
from tests.qcowlib.qcow2.ref_bitmaps import SECTOR, ref_bitmaps

SIZE = 24 * 1024
NAMES = ("coarse", "fine")


class Disk:
    """A small image whose bitmaps have recorded what came after ``base``, the first backup."""

    def __init__(self, seed: int, names: tuple[str, ...] = NAMES) -> None:
        self.rng = random.Random(seed)
        self.file = MemoryStorage()
        create(self.file, CreateOptions(size=SIZE, cluster_size=1024, refcount_bits=64))
        with opened(self.file) as image:
            self.write(image)
            for name, granularity in zip(names, (2048, 512), strict=False):
                image.add_bitmap(name, granularity)
        self.base = content(self.file)
        with opened(self.file) as image:
            self.write(image)

    def write(self, image: qcowlib.Image) -> None:
        for _ in range(4):
            at = self.rng.randrange(SIZE // SECTOR - 4) * SECTOR
            image.pwrite(self.rng.randbytes(self.rng.randint(1, 3) * SECTOR), at)


def opened(storage: Storage) -> qcowlib.Image:
    return qcowlib.open(storage, "r+", format="qcow2")


def content(storage: MemoryStorage) -> bytes:
    return reference_read(RefImage(storage))


def changed(one: bytes, other: bytes) -> set[int]:
    return {at // SECTOR for at in range(0, SIZE, SECTOR) if one[at : at + SECTOR] != other[at : at + SECTOR]}


def judged(source: bytes, target: bytes, base: bytes, names: tuple[str, ...]) -> list[Finding]:
    """What differs from the last backup, which is *target* where the bitmaps say so, must be recorded by each.

    A bitmap that is in use is known to be worth nothing: nobody relies on it.
    """
    try:
        image = RefImage(source)
        found = ref_bitmaps(image)
        result, now = reference_check(image), reference_read(image)
        if result.corruptions:
            return [Finding("CORRUPT", result.messages[0])]
        if set(found) != set(names):
            return [Finding("LOST", f"bitmaps {sorted(found)}")]
        states = {covers(bitmap.dirty, now, base) for bitmap in found.values() if not bitmap.in_use}
        if states <= {True}:
            return []
        if True in states:
            return [Finding("MIXED", "some bitmaps advanced")]
        backup = reference_read(RefImage(target), backing=base)
    except ReferenceError as error:
        return [Finding("UNREADABLE", str(error))]
    if all(covers(bitmap.dirty, now, backup) for bitmap in found.values() if not bitmap.in_use):
        return []
    return [Finding("FORGOT", "a bitmap lacks what no backup holds")]


def covers(dirty: set[int], now: bytes, before: bytes) -> bool:
    return changed(now, before) <= dirty


@pytest.mark.crash
@pytest.mark.parametrize("guest", ["rest", "write"])
@pytest.mark.parametrize("seed", range(3))
def test_a_cut_leaves_all_bitmaps_advanced_or_none(seed: int, guest: str) -> None:
    """Invariant: I2, I5, I11."""
    disk, log = Disk(seed), OpLog()
    source, target = log.record(disk.file), log.record(MemoryStorage())
    with opened(source) as image:
        if guest == "write":
            disk.write(image)
        advance(image, target)
        if guest == "write":
            disk.write(image)
    report = assert_crash_safe(
        log, lambda state: judged(*map(bytes, state.images), base=disk.base, names=NAMES), seed=seed, random_states=4
    )
    assert report.distinct > 20
    assert [bitmap.dirty == set() for bitmap in ref_bitmaps(RefImage(disk.file)).values()] == [guest == "rest"] * 2


def advance(image: qcowlib.Image, target: Storage) -> None:
    backup(
        image, target, NAMES, backing="b", backing_format="raw", check_backing=False, advance=True, cluster_size=1024
    )  # fmt: skip


@pytest.mark.crash
@pytest.mark.parametrize("mutant", ["one by one", "too early"])
def test_a_rule_of_advancing_removed_is_noticed(monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    disk, log = Disk(1), OpLog()
    source, target = log.record(disk.file), log.record(MemoryStorage())
    clear = BitmapSession.clear

    async def singly(self: BitmapSession, *names: str) -> None:
        for name in names:
            await clear(self, name)

    with opened(source) as image:
        if mutant == "too early":
            recorded = [list(image.bitmap_extents(name)) for name in NAMES]
            image.clear_bitmap(*NAMES)
            monkeypatch.setattr(qcowlib.Image, "bitmap_extents", lambda self, name: recorded[NAMES.index(name)])
        else:
            monkeypatch.setattr(BitmapSession, "clear", singly)
        advance(image, target)
    with pytest.raises(AssertionError, match="MIXED" if mutant == "one by one" else "UNREADABLE|FORGOT"):
        assert_crash_safe(
            log, lambda state: judged(*map(bytes, state.images), base=disk.base, names=NAMES), random_states=4
        )


class Set:
    """A set of disks in memory: opened by number, their overlays recorded, the journal a mark in the log."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log = OpLog()
        self.disks = [Disk(seed, ("b",)) for seed in (1, 2)]
        self.sources: list[Storage] = [self.log.record(disk.file) for disk in self.disks]
        self.targets = [self.log.record(MemoryStorage()) for _ in self.disks]
        self.wanted = [DiskBackup(str(n), f"target{n}", "b", "base", "raw") for n in range(len(self.disks))]
        self.journal: dict[str, object] | None = None
        self.judging = False
        #: Every journal there was, with the log's position from which on it was surely there.
        self.journals: list[tuple[int, dict[str, object] | None]] = [(0, None)]
        monkeypatch.setattr(sets, "open_image", lambda path, *_, **__: opened(self.sources[int(Path(path).name)]))
        monkeypatch.setattr(sets, "backup", self.backup)
        monkeypatch.setattr(sets, "sync_directory", lambda path: None)
        monkeypatch.setattr(sets, "write_journal", lambda path, content: self.write(content))
        monkeypatch.setattr(sets, "remove_journal", lambda path: self.write(None))
        monkeypatch.setattr(sets, "read_journal", lambda path, what: self.journal)

    def backup(self, image: qcowlib.Image, target: str, bitmap: str, **options: object) -> int:
        number = int(target[-1])
        return backup(image, self.targets[number], bitmap, **{**options, "check_backing": False})  # type: ignore[arg-type]

    def write(self, content: dict[str, object] | None) -> None:
        self.journal = content
        if not self.judging:
            self.journals.append((self.log.mark("journal"), content))

    def possible(self, state: CrashState) -> Iterator[dict[str, object] | None]:
        """Yield each journal that *state* may come with."""
        for (begin, content), (end, _) in zip(self.journals, [*self.journals[1:], (1 << 62, None)], strict=True):
            if begin <= state.last and state.first <= end:
                yield content

    def oracle(self, state: CrashState) -> list[Finding]:
        """Finish the state, and judge each disk and what they have in common."""
        self.judging, count = True, len(self.disks)
        found: list[Finding] = []
        for journal in self.possible(state):
            self.journal = journal
            files = [MemoryStorage(bytes(part)) for part in state.images[:count]]
            self.sources = list(files)
            finish_set("journal")
            advanced = set()
            for disk, file, target in zip(self.disks, files, state.images[count:], strict=True):
                found += judged(file.getvalue(), bytes(target), disk.base, ("b",))
                advanced.add(covers(ref_bitmaps(RefImage(file))["b"].dirty, content(file), disk.base))
            if len(advanced) > 1:
                found.append(Finding("MIXED", "some disks advanced"))
        return found


@pytest.mark.crash
def test_a_cut_set_is_finished_with_all_bitmaps_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: I2, I5, I11."""
    whole = Set(monkeypatch)
    backup_set(whole.wanted, "journal", cluster_size=1024)
    assert [kind for _, kind in whole.journals[-1:]] == [None] and len(whole.journals) == 4
    report = assert_crash_safe(whole.log, whole.oracle, subset_limit=4, random_states=2)
    assert report.distinct > 50
