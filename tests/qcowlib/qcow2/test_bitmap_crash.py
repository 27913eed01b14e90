# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Cuts at every write of an image with bitmaps: none that looks consistent ever lacks a write.

The oracle compares what a state holds with what it held when the bitmap began.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

import qcowlib
from qcowlib.qcow2 import bitmap_session, ordering
from qcowlib.qcow2.create import CreateOptions, create
from qcowlib.storage.memory import MemoryStorage
from qcowlib.testing.crash import CrashReport, CrashState, Finding, assert_crash_safe, explore
from qcowlib.testing.model import GuestModel
from qcowlib.testing.recorder import OpLog
from qcowlib.testing.reference import ReferenceError, RefImage, reference_check, reference_read
from tests.qcowlib.qcow2.ref_bitmaps import SECTOR, ref_bitmaps


class Era:
    """From log position *begin* on (surely from *sure*), bitmap *name* tells what differs from *content*."""

    def __init__(self, name: str, begin: int, content: bytes) -> None:
        self.name = name
        self.begin = begin
        self.sure = self.over = self.gone = 1 << 62
        self.content = content


class Cuts:
    """A recorded history with an enabled bitmap ``on`` and a frozen one, and its oracle."""

    def __init__(self, seed: int, options: CreateOptions, steps: Sequence[str], count: int) -> None:
        self.rng = random.Random(seed)
        file, data = MemoryStorage(), MemoryStorage() if options.data_file else None
        create(file, options, data=data)
        self.log = OpLog()
        self.file = self.log.record(file)
        self.data = self.log.record(data) if data is not None else None
        self.model = GuestModel(options.size, self.log)
        self.eras: list[Era] = []
        self.frozen: set[int] = set()
        self.image = self.open()
        self.write()
        self.image.add_bitmap("frozen", 1024)
        self.write()
        self.image.disable_bitmap("frozen")
        for at, length in self.image.bitmap_extents("frozen"):
            self.frozen.update(range(at // SECTOR, (at + length) // SECTOR))
        self.since = self.log.position
        for _ in range(count):
            getattr(self, self.rng.choice(steps))()
        with self.model.flush():
            self.image.close()

    def open(self) -> qcowlib.Image:
        return qcowlib.open(self.file, "r+", format="qcow2", data_file=self.data, backing=False)

    def write(self) -> None:
        first = self.rng.randrange(self.model.size // SECTOR)
        length = min(self.rng.randint(1, 6), self.model.size // SECTOR - first) * SECTOR
        if self.rng.random() < 0.3:
            with self.model.zero(first * SECTOR, length):
                self.image.zero(length, first * SECTOR)
            return
        with self.model.write(first * SECTOR, length) as data:
            self.image.pwrite(data, first * SECTOR)

    def flush(self) -> None:
        with self.model.flush():
            self.image.flush()

    def reopen(self) -> None:
        with self.model.flush():
            self.image.close()
        self.image = self.open()

    def other(self) -> None:
        """Something else done to bitmaps."""
        if any(bitmap.name == "other" for bitmap in self.image.bitmaps()):
            self.rng.choice([self.image.remove_bitmap, self.image.clear_bitmap, self.image.disable_bitmap])("other")
        else:
            self.image.add_bitmap("other", 512)

    def era(self) -> None:
        """Make the bitmap, or clear it, or delete it."""
        current = self.eras[-1] if self.eras and self.eras[-1].gone == 1 << 62 else None
        if current is None:
            era = Era("on", self.log.mark("add"), self.model.content())
            self.eras.append(era)
            self.image.add_bitmap("on", self.rng.choice([512, 2048]))
        elif self.rng.random() < 0.6:
            era = Era("on", self.log.mark("clear"), self.model.content())
            current.over = era.begin
            self.eras.append(era)
            self.image.clear_bitmap("on")
            current.gone = self.log.position
        else:
            current.over = self.log.mark("remove")
            self.image.remove_bitmap("on")
            current.gone = self.log.position
            return
        era.sure = self.log.position

    def snapshot(self) -> None:
        name = f"s{self.log.position}"
        with self.model.snapshot(name):
            self.image.create_snapshot(name)
        self.write()
        with self.model.revert(name):
            self.image.apply_snapshot(name)

    def oracle(self, state: CrashState) -> list[Finding]:
        found = list(self.model.oracle(state))
        try:
            image = RefImage(*(bytes(part) for part in state.images))
            bitmaps = ref_bitmaps(image)
            content = reference_read(image)
        except ReferenceError as error:
            return [*found, Finding("UNREADABLE", str(error))]
        if "on" in bitmaps and not bitmaps["on"].in_use:
            found += self.judge(bitmaps["on"].dirty, content, state)
        elif any(era.sure <= state.first and state.last < era.over for era in self.eras) and "on" not in bitmaps:
            found.append(Finding("LOST", "the bitmap is missing"))
        if state.first >= self.since and ("frozen" not in bitmaps or bitmaps["frozen"].dirty != self.frozen):
            found.append(Finding("LOST", "the disabled bitmap changed"))
        return found

    def judge(self, dirty: set[int], content: bytes, state: CrashState) -> list[Finding]:
        """A sector that differs from the bitmap's beginning must be recorded."""
        eras = [era for era in self.eras if era.begin <= state.last and state.first <= era.gone]
        for era in eras:
            pairs = range(0, len(content), SECTOR)
            changed = {at // SECTOR for at in pairs if content[at : at + SECTOR] != era.content[at : at + SECTOR]}
            if changed <= dirty:
                return []
        return [Finding("FORGOT", "a consistent bitmap lacks what was written")]


SMALL = CreateOptions(size=24 * 1024, cluster_size=1024, refcount_bits=64)
STEPS = ["write", "write", "write", "flush", "reopen", "era", "era", "other"]


def cuts(name: str, seed: int) -> Cuts:
    if name == "small":
        return Cuts(seed, SMALL, STEPS, 18)
    if name == "names-in-header":
        # Feature names, bitmaps and a backing name: the header area needs several sectors.
        options = CreateOptions(
            size=64 * 1024, cluster_size=8192, backing_file=b"b" * 600, backing_format=b"raw", refcount_bits=16
        )
        return Cuts(seed, options, STEPS, 10)
    if name == "snapshots":
        return Cuts(seed, SMALL, [*STEPS, "snapshot"], 12)
    if name == "lazy":
        return Cuts(seed, SMALL._replace(lazy_refcounts=True), STEPS, 14)
    return Cuts(seed, SMALL._replace(data_file=b"data"), STEPS, 12)


def judged(done: Cuts, seed: int) -> CrashReport:
    return assert_crash_safe(done.log, done.oracle, seed=seed, random_states=4)


@pytest.mark.crash
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["small", "names-in-header", "snapshots", "lazy", "data-file"])
def test_no_cut_leaves_a_bitmap_that_forgot_a_write(name: str, seed: int) -> None:
    """Invariant: I1, I5, I10."""
    report = judged(cuts(name, seed), seed)
    assert report.distinct > 20


def no_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guest data changes while bitmaps still look consistent."""

    async def begin(self: bitmap_session.BitmapSession, *, every: bool = False) -> None:
        self._flagged |= {entry.name for entry in self.entries if entry.auto and not entry.in_use}

    monkeypatch.setattr(bitmap_session.BitmapSession, "begin", begin)


def no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """What changes is not recorded."""

    def changed(self: bitmap_session.BitmapSession, offset: int, length: int) -> None:
        return

    monkeypatch.setattr(bitmap_session.BitmapSession, "changed", changed)


def header_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The header area is one write, though a cut may tear it between sectors."""

    def replace(storage: MemoryStorage, header: object) -> None:
        storage.write(0, [header.pack()])  # type: ignore[attr-defined]
        storage.flush()

    monkeypatch.setattr(ordering, "write_header", replace)


@pytest.mark.crash
@pytest.mark.parametrize(
    ("mutant", "name"), [(no_flags, "small"), (no_record, "small"), (header_at_once, "names-in-header")]
)
def test_a_rule_removed_is_noticed(
    monkeypatch: pytest.MonkeyPatch, mutant: Callable[[pytest.MonkeyPatch], None], name: str
) -> None:
    mutant(monkeypatch)
    for seed in range(6):
        done = cuts(name, seed)
        report = explore(done.log, done.oracle, seed=seed, random_states=4, stop_after=1)
        if set(report.verdicts) - {"LEAK"}:
            return
    pytest.fail(f"{mutant.__name__} went unnoticed")


@pytest.mark.crash
@pytest.mark.parametrize("target", [96, 12], ids=["grow", "shrink"])
def test_a_cut_resize_leaves_bitmaps_that_fit_or_are_in_use(target: int) -> None:
    old, new = 32 * 1024, target * 1024
    file = MemoryStorage()
    create(file, CreateOptions(size=old, cluster_size=512, refcount_bits=64))
    with qcowlib.open(file, "r+", format="qcow2") as image:
        image.add_bitmap("on", 512)
        image.add_bitmap("off", 512, disabled=True)
        image.pwrite(b"x" * 5000, 3000)
        image.merge_bitmap("off", "on")
    log = OpLog()
    with qcowlib.open(log.record(file), "r+", format="qcow2") as image:
        image.resize(new, shrink=True)

    def judge(state: CrashState) -> list[Finding]:
        try:
            image = RefImage(bytes(state.images[0]))
            bitmaps = ref_bitmaps(image)
        except ReferenceError as error:
            return [Finding("UNREADABLE", str(error))]
        result = reference_check(image)
        if result.corruptions:
            return [Finding("CORRUPT", result.messages[0])]
        wanted = {at for at in range(5, 16) if at < image.size // SECTOR}
        if any(not bitmap.in_use and not wanted <= bitmap.dirty for bitmap in bitmaps.values()) or len(bitmaps) != 2:
            return [Finding("FORGOT", f"size {image.size}")]
        return []

    report = assert_crash_safe(log, judge)
    assert report.distinct > 3
    grown = set(range(old // SECTOR, new // SECTOR))
    final = ref_bitmaps(RefImage(file))
    assert final["on"].dirty - final["off"].dirty == grown
