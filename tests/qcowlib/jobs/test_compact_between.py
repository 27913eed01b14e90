# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Compact between everything else that happens to an image: the guest, its snapshots and its bitmaps never notice."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import qcowlib
from qcowlib.driver import NO_OFFSET
from qcowlib.jobs.compact import compact, plan_compact
from tests.conftest import LONG

KiB = 1 << 10
CLUSTER = 1024
SIZE = 512 * KiB
FORMS = [{}, {"compat": "0.10"}, {"refcount_bits": 64}, {"compression_type": "zstd"}]


class Compacted(RuleBasedStateMachine):
    """An image beside what the guest, its snapshots and its bitmaps are to show."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "image"
        self.disk = bytearray(SIZE)
        self.snapshots: dict[str, bytes] = {}
        self.bitmaps: dict[str, set[int]] = {}
        self.old = False

    def teardown(self) -> None:
        self.folder.cleanup()

    @initialize(form=st.sampled_from(FORMS))
    def create(self, form: dict[str, object]) -> None:
        self.old = "compat" in form
        qcowlib.create(self.path, SIZE, cluster_size=CLUSTER, **form)  # type: ignore[arg-type]

    def open(self) -> qcowlib.Image:
        return qcowlib.open(self.path, "r+", format="qcow2", cache="unsafe")

    def record(self, start: int, length: int) -> None:
        for dirty in self.bitmaps.values():
            dirty.update(range(start // 512, (start + length - 1) // 512 + 1))

    @rule(seed=st.integers(0, 1 << 20), sectors=st.integers(1, 60), at=st.integers(0, SIZE // 512 - 60))
    def write(self, seed: int, sectors: int, at: int) -> None:
        data = random.Random(seed).randbytes(512 * sectors)
        with self.open() as image:
            image.pwrite(data, at * 512)
        self.disk[at * 512 : at * 512 + len(data)] = data
        self.record(at * 512, len(data))

    @rule(seed=st.integers(0, 1 << 20), count=st.integers(1, 20), at=st.integers(0, SIZE // CLUSTER - 20))
    def write_packed(self, seed: int, count: int, at: int) -> None:
        rng = random.Random(seed)
        with self.open() as image:
            for number in range(at, at + count):
                (run,) = image.map(number * CLUSTER, CLUSTER)
                if run[3] != NO_OFFSET:
                    # Only what is not allocated can be compressed.
                    continue
                data = bytes(rng.choices(b"abcdefgh", k=CLUSTER))
                image.write_compressed(data, number * CLUSTER)
                self.disk[number * CLUSTER : (number + 1) * CLUSTER] = data
                self.record(number * CLUSTER, CLUSTER)

    @rule(count=st.integers(1, 200), at=st.integers(0, SIZE // CLUSTER - 200))
    def discard(self, count: int, at: int) -> None:
        with self.open() as image:
            image.zero(count * CLUSTER, at * CLUSTER)
        self.disk[at * CLUSTER : (at + count) * CLUSTER] = bytes(count * CLUSTER)
        self.record(at * CLUSTER, count * CLUSTER)

    @precondition(lambda self: len(self.snapshots) < 4)
    @rule()
    def take(self) -> None:
        with self.open() as image:
            made = image.create_snapshot("s")
        self.snapshots[_text(made.id)] = bytes(self.disk)

    @precondition(lambda self: self.snapshots)
    @rule(which=st.integers(0, 3))
    def drop(self, which: int) -> None:
        wanted = sorted(self.snapshots)[which % len(self.snapshots)]
        with self.open() as image:
            image.delete_snapshot(wanted)
        del self.snapshots[wanted]

    @precondition(lambda self: not self.old and len(self.bitmaps) < 3)
    @rule()
    def add_bitmap(self) -> None:
        name = next(name for name in "abc" if name not in self.bitmaps)
        with self.open() as image:
            image.add_bitmap(name, 512)
        self.bitmaps[name] = set()

    @precondition(lambda self: self.bitmaps)
    @rule(which=st.integers(0, 2))
    def remove_bitmap(self, which: int) -> None:
        name = sorted(self.bitmaps)[which % len(self.bitmaps)]
        with self.open() as image:
            image.remove_bitmap(name)
        del self.bitmaps[name]

    @rule(zeros=st.booleans())
    def compact(self, zeros: bool) -> None:
        plan = plan_compact(self.path, zeros=zeros)
        assert compact(self.path, zeros=zeros, cache="unsafe") == plan
        assert self.path.stat().st_size == plan.new_size
        with qcowlib.open(self.path, format="qcow2") as image:
            assert image.check().clean
            assert image.pread(SIZE, 0) == self.disk
            for name, dirty in self.bitmaps.items():
                found = {
                    sector
                    for start, length in image.bitmap_extents(name)
                    for sector in range(start // 512, (start + length) // 512)
                }
                assert found == dirty
        for wanted, content in self.snapshots.items():
            with qcowlib.open(self.path, format="qcow2", snapshot=wanted) as image:
                assert image.pread(SIZE, 0) == content


def _text(name: str | bytes) -> str:
    return name if isinstance(name, str) else name.decode()


TestCompacted = Compacted.TestCase
TestCompacted.settings = settings(max_examples=15 * LONG, stateful_step_count=25, deadline=None)
