# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Repair: the lines of qemu-img check -r, a clean image, unchanged guest data, at every cut."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcowlib.errors import FormatError, ReadOnly, UsageError
from qcowlib.ondisk import Header
from qcowlib.qcow2.check import Report, check
from qcowlib.qcow2.create import CreateOptions, create
from qcowlib.qcow2.repair import repair
from qcowlib.storage.file import FileStorage
from qcowlib.storage.memory import MemoryStorage
from qcowlib.testing.crash import crash_states
from qcowlib.testing.recorder import OpLog
from qcowlib.testing.reference import ReferenceError, reference_check, reference_read
from tests.qcowlib.qcow2 import corpus

ALL = 1 << 20
Level = Literal["leaks", "all"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, corpus.Image]:
    folder = tmp_path_factory.mktemp("images")
    names = [name for name in corpus.OPTIONS if name != "luks"]
    return {name: corpus.Image(name, corpus.make(folder, name).read_bytes()) for name in names}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


def word(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 8], "big")


def put(data: bytearray, offset: int, value: int, width: int = 8) -> None:
    data[offset : offset + width] = value.to_bytes(width, "big")


class Places(NamedTuple):
    """Where the first tables of an image lie."""

    header: Header
    block: int
    l1: int
    l2: int


def places(data: bytes) -> Places:
    header = Header.parse(data, len(data), repair=True)
    l2 = word(data, header.l1_table_offset) & 0x00FF_FFFF_FFFF_FE00
    return Places(header, word(data, header.refcount_table_offset), header.l1_table_offset, l2)


def guest(data: bytes, otherwise: bytes) -> bytes:
    """What the guest reads of *data*; of the sound image where *data* is too damaged to say."""
    try:
        return reference_read(data)
    except ReferenceError:
        return reference_read(otherwise)


# -- damage of one kind each, on images with 4 KiB clusters and 16-bit refcounts --------------


def leak(data: bytearray) -> None:
    put(data, places(data).block + 2 * 200, 1, 2)
    data.extend(bytes(201 * 4096 - len(data)))


def too_low(data: bytearray) -> None:
    found = places(data)
    entry = word(data, found.l2)
    # A second reference to the first data cluster.
    put(data, found.l2 + 8 * 100, entry)


def zero_refcounts(data: bytearray) -> None:
    found = places(data)
    data[found.block + 6 : found.block + 60] = bytes(54)


def no_refcount_table(data: bytearray) -> None:
    put(data, places(data).header.refcount_table_offset, 0x1200)


def block_behind_the_end(data: bytearray) -> None:
    put(data, places(data).header.refcount_table_offset, 1 << 40)


def copied_flags(data: bytearray) -> None:
    found = places(data)
    put(data, found.l1, word(data, found.l1) ^ 1 << 63)
    put(data, found.l2, word(data, found.l2) ^ 1 << 63)


def unaligned_zero_cluster(data: bytearray) -> None:
    put(data, places(data).l2 + 8 * 90, 1 << 63 | 0x5200 | 1)


def short_snapshot_entry(data: bytearray) -> None:
    at = places(data).header.snapshots_offset
    put(data, at + 36, 8, 4)
    # What follows the 8 bytes that are left moves up.
    tail = bytes(data[at + 40 + 24 : at + 72])
    data[at + 48 : at + 48 + len(tail)] = tail
    put(data, 60, 1, 4)


def too_many_snapshots(data: bytearray) -> None:
    put(data, 60, 65536 + 5, 4)


def dirty_and_corrupt(data: bytearray) -> None:
    leak(data)
    put(data, 72, word(data, 72) | 3)
    put(data, 88, word(data, 88) | 1 << 40)


class Case(NamedTuple):
    image: str
    damage: Callable[[bytearray], None]
    level: Level


CASES = [
    Case("plain", leak, "leaks"),
    Case("plain", leak, "all"),
    Case("plain", too_low, "all"),
    Case("plain", zero_refcounts, "all"),
    Case("compressed", zero_refcounts, "all"),
    Case("snapshots", zero_refcounts, "all"),
    Case("v2", no_refcount_table, "all"),
    Case("bitmaps", no_refcount_table, "all"),
    Case("plain", block_behind_the_end, "all"),
    Case("plain", copied_flags, "leaks"),
    Case("snapshots", copied_flags, "all"),
    Case("plain", unaligned_zero_cluster, "all"),
    Case("snapshots", short_snapshot_entry, "all"),
    Case("snapshots", dirty_and_corrupt, "leaks"),
]
IDS = [f"{case.image}-{case.damage.__name__}-{case.level}" for case in CASES]


def broken(images: dict[str, corpus.Image], case: Case) -> bytearray:
    data = bytearray(images[case.image].data)
    case.damage(data)
    return data


@pytest.mark.real("qemu-img", "qemu-io")
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_each_kind_of_damage_is_mended(case: Case, images: dict[str, corpus.Image], scratch: Path) -> None:
    data = broken(images, case)
    before = guest(data, images[case.image].data)
    assert check(MemoryStorage(bytearray(data))).exit_status or case.damage is dirty_and_corrupt
    path = scratch / "mended.qcow2"
    path.write_bytes(data)
    storage = FileStorage.open(str(path), writable=True)
    report = repair(storage, case.level)
    storage.close()
    assert report.exit_status == 0, report.findings
    assert report.leaks_fixed or report.corruptions_fixed
    assert report.repairs
    result = corpus.qemu_check(path)
    assert result.returncode == 0, result.stderr
    mended = path.read_bytes()
    assert reference_read(mended) == before
    assert not word(mended, 72) & 3 or places(mended).header.version == 2
    if case.damage is dirty_and_corrupt:
        assert word(mended, 88) >> 40 == 0


@pytest.mark.real("qemu-img", "qemu-io")
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_i8_repair_cut_anywhere_is_finished_by_the_next(case: Case, images: dict[str, corpus.Image]) -> None:
    data = broken(images, case)
    before = guest(data, images[case.image].data)
    log = OpLog()
    storage = log.record(MemoryStorage(bytearray(data)))
    repair(storage, case.level)
    states = 0
    for state in crash_states(log, subset_limit=4, random_states=4):
        states += 1
        image = MemoryStorage(state.images[0])
        report = repair(image, case.level)
        assert report.exit_status == 0, (state.what, report.findings)
        content = image.getvalue()
        assert reference_read(content) == before, state.what
        assert not reference_check(content).corruptions, state.what
    assert states >= 3


@pytest.mark.real("qemu-img", "qemu-io")
@settings(max_examples=60)
@given(data=st.data(), level=st.sampled_from(["all", "leaks"]))
def test_repair_never_changes_guest_data_nor_leaves_more_than_qemu_img(
    data: st.DataObject, level: Level, images: dict[str, corpus.Image], scratch: Path
) -> None:
    image = images[data.draw(st.sampled_from(sorted(images)))]
    content = corpus.damaged(image, data.draw(corpus.damages(image)))
    ours, theirs = scratch / "ours.qcow2", scratch / "theirs.qcow2"
    ours.write_bytes(content)
    theirs.write_bytes(content)
    real = corpus.qemu_check(theirs, repair=level)
    storage = FileStorage.open(str(ours), writable=True)
    try:
        report = repair(storage, level, limit=ALL)
    except FormatError:
        assert b"Could not open" in real.stderr
        return
    finally:
        storage.close()
    mended = ours.read_bytes()
    try:
        before = reference_read(content)
    except ReferenceError:
        pass
    else:
        assert reference_read(mended) == before
    if not report.failure:
        assert corpus.qemu_check(ours).returncode == report.exit_status


@pytest.mark.real("qemu-img", "qemu-io")
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_repair_says_what_qemu_img_says(case: Case, images: dict[str, corpus.Image], scratch: Path) -> None:
    # There qemu-img grows the file, fails, or (unknown autoclear bit) loses the snapshots.
    if case.damage in {no_refcount_table, block_behind_the_end, dirty_and_corrupt}:
        case = Case(case.image, zero_refcounts, "all")
    content = broken(images, case)
    path = scratch / "said.qcow2"
    path.write_bytes(content)
    real = corpus.qemu_check(path, repair=case.level)
    report = repair(MemoryStorage(content), case.level)
    said = [found.message for found in (*report.repairs, *report.findings)]
    assert said == corpus.qemu_lines(real)
    assert report.exit_status == real.returncode
    counts = json.loads(real.stdout)
    assert counts.get("leaks-fixed", 0) == report.leaks_fixed
    assert counts.get("corruptions-fixed", 0) == report.corruptions_fixed


@pytest.mark.parametrize("level", ["leaks", "all"])
def test_i10_unknown_autoclear_bits_go_also_when_nothing_is_wrong(level: Level) -> None:
    storage = MemoryStorage()
    create(storage, CreateOptions(size=1 << 20))
    storage.write(88, [(1 << 63).to_bytes(8, "big")])
    report = repair(storage, level)
    assert not report.exit_status
    assert storage.getvalue()[88:96] == bytes(8)


@pytest.mark.real("qemu-img", "qemu-io")
def test_level_leaks_refuses_to_rebuild_and_changes_nothing(images: dict[str, corpus.Image]) -> None:
    data = broken(images, Case("plain", zero_refcounts, "leaks"))
    storage = MemoryStorage(bytearray(data))
    report = repair(storage, "leaks")
    assert report.failure == errno.EIO
    assert report.findings[-1].message == "ERROR need to rebuild refcount structures"
    assert storage.getvalue() == data


@pytest.mark.real("qemu-img", "qemu-io")
def test_table_that_shares_its_cluster_is_not_written(images: dict[str, corpus.Image]) -> None:
    data = bytearray(images["plain"].data)
    found = places(data)
    put(data, found.l2 + 8 * 100, found.l2 | 1 << 63)
    storage = MemoryStorage(bytearray(data))
    report = repair(storage, "all")
    assert report.exit_status == 2
    assert storage.getvalue()[found.l2 : found.l2 + 4096] == data[found.l2 : found.l2 + 4096]


@pytest.mark.real("qemu-img", "qemu-io")
def test_unaligned_table_is_told_as_what_is_not_repaired(images: dict[str, corpus.Image], scratch: Path) -> None:
    """Its last entries are guest data: qemu-img writes to them."""
    data = bytearray(images["plain"].data)
    found = places(data)
    first = word(data, found.l2) & 0x00FF_FFFF_FFFF_FE00
    put(data, first, 1 << 63 | 0x5200 | 1)
    put(data, found.l1, word(data, found.l1) + first - found.l2 - 4096 + 512)
    storage = MemoryStorage(bytearray(data))
    report = repair(storage, "all")
    said = [finding.message for finding in (*report.repairs, *report.findings)]
    assert "ERROR offset=5200: Preallocated cluster is not properly aligned; L2 entry corrupted." in said
    assert "ERROR: Overlap check failed" in said
    assert not any(line.startswith("Repairing offset") for line in said)
    assert report.exit_status == 2
    assert storage.getvalue()[first : first + 4096] == data[first : first + 4096]
    theirs = scratch / "unaligned.qcow2"
    theirs.write_bytes(data)
    real = corpus.qemu_check(theirs, repair="all")
    assert real.returncode and theirs.read_bytes()[first : first + 4096] != data[first : first + 4096]


@pytest.mark.real("qemu-img", "qemu-io")
def test_overhanging_snapshots_are_dropped(images: dict[str, corpus.Image]) -> None:
    data = broken(images, Case("snapshots", too_many_snapshots, "all"))
    assert check(MemoryStorage(bytearray(data))).failure == errno.EFBIG
    storage = MemoryStorage(data)
    report = repair(storage, "all")
    assert report.repairs[0].message == "Discarding 5 overhanging snapshots"
    assert check(storage).failure == 0


@pytest.mark.real("qemu-img", "qemu-io")
def test_sound_image_is_left_alone(images: dict[str, corpus.Image]) -> None:
    for image in images.values():
        storage = MemoryStorage(bytearray(image.data))
        report: Report = repair(storage, "all")
        assert report.clean
        assert not report.repairs
        assert storage.getvalue() == image.data


def test_repair_refuses_what_it_cannot_do() -> None:
    with pytest.raises(UsageError):
        repair(MemoryStorage(bytearray(8)), "some")  # type: ignore[arg-type]
    with pytest.raises(ReadOnly):
        repair(MemoryStorage(bytearray(8), writable=False), "all")
    with pytest.raises(FormatError):
        repair(MemoryStorage(bytearray(8)), "all")
