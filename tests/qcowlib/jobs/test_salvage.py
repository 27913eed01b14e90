# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Salvage: what is outside of the damage map is the guest's, whatever is broken; what is inside was broken."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qcowlib
from qcowlib.cli.main import main
from qcowlib.jobs.salvage import Salvaged, salvage
from qcowlib.testing.hostile import HostileCase, hostile_cases, materialize
from tests.qcowlib.qemu import qemu_img

SIZE = 16 << 20
CLUSTER = 4096
#: Guest bytes that one L2 table maps.
REACH = CLUSTER // 8 * CLUSTER


def make(path: Path, *, compress: bool = False, backing: Path | None = None) -> bytes:
    """Make an image over several L2 tables; returns what its guest reads."""
    rng = random.Random(1)
    if compress:
        plain = path.with_suffix(".plain")
        make(plain)
        qcowlib.convert(plain, path, compress=True, cluster_size=CLUSTER)
    else:
        words = {} if backing is None else {"backing": backing, "backing_format": "qcow2"}
        qcowlib.create(path, SIZE, cluster_size=CLUSTER, **words)  # type: ignore[arg-type]
        with qcowlib.open(path, "r+") as image:
            for _ in range(60):
                image.pwrite(rng.randbytes(20_000), rng.randrange(SIZE - 20_000))
            image.zero(REACH, REACH * 2)
    with qcowlib.open(path) as image:
        return image.pread(SIZE, 0)


def l1_of(path: Path) -> tuple[int, list[int]]:
    """Return where the L1 table is, and its entries."""
    data = path.read_bytes()
    offset, count = int.from_bytes(data[40:48], "big"), int.from_bytes(data[36:40], "big")
    return offset, [int.from_bytes(data[offset + 8 * n : offset + 8 * n + 8], "big") for n in range(count)]


def poke(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def holds(found: Salvaged, target: Path, wanted: bytes) -> None:
    """Check that the copy is the guest's, but for the damage, which is zeros."""
    with qcowlib.open(target) as image:
        got = bytearray(image.pread(SIZE, 0))
    left = bytearray(wanted)
    for one in found.lost:
        span = slice(one.start, one.start + one.length)
        if one.kind != "data":
            assert not any(got[span]), one
        left[span] = got[span] = bytes(one.length)
    assert got == left


def l1_entry_past_the_end(path: Path) -> tuple[int, int]:
    offset, _ = l1_of(path)
    poke(path, offset + 8, ((1 << 63) | (1 << 40)).to_bytes(8, "big"))
    return REACH, 2 * REACH


def l1_entry_unaligned(path: Path) -> tuple[int, int]:
    offset, entries = l1_of(path)
    poke(path, offset, (entries[0] | 512).to_bytes(8, "big"))
    return 0, REACH


def l2_of_garbage(path: Path) -> tuple[int, int]:
    _, entries = l1_of(path)
    poke(path, entries[3] & 0x00FFFFFFFFFFFE00, random.Random(2).randbytes(CLUSTER))
    return 3 * REACH, 4 * REACH


def data_past_the_end(path: Path) -> tuple[int, int]:
    _, entries = l1_of(path)
    table = entries[0] & 0x00FFFFFFFFFFFE00
    poke(path, table + 8 * 3, ((1 << 63) | (1 << 40)).to_bytes(8, "big"))
    return 3 * CLUSTER, 4 * CLUSTER


def file_cut_short(path: Path, cut: int = 0) -> tuple[int, int]:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size * 3 // 4 // CLUSTER * CLUSTER + cut)
    return 0, SIZE


DAMAGES: list[Callable[[Path], tuple[int, int]]] = [
    l1_entry_past_the_end,
    l1_entry_unaligned,
    l2_of_garbage,
    data_past_the_end,
    file_cut_short,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("format", ["qcow2", "raw"])
def test_damage_is_read_around(
    tmp_path: Path, damage: Callable[[Path], tuple[int, int]], compress: bool, format: str
) -> None:
    path, target = tmp_path / "disk", tmp_path / "target"
    wanted = make(path, compress=compress)
    low, high = damage(path)
    before = path.read_bytes()
    found = salvage(path, target, format=format)  # type: ignore[arg-type]
    assert found.lost and all(low <= one.start and one.start + one.length <= high for one in found.lost)
    assert found.lost_bytes == sum(one.length for one in found.lost)
    if damage is not l2_of_garbage:
        holds(found, target, wanted)
    assert path.read_bytes() == before
    assert salvage(path, None) == found


def test_cluster_that_the_file_ends_in_is_whole_and_the_next_one_is_lost(tmp_path: Path) -> None:
    path, target = tmp_path / "disk", tmp_path / "target"
    qcowlib.create(path, 4 * CLUSTER, cluster_size=CLUSTER)
    with qcowlib.open(path, "r+") as image:
        image.pwrite(b"d" * (3 * CLUSTER), 0)
        last = [extent.offset for extent in image.extents() if extent.kind == "data"][-1]
    assert last is not None
    with path.open("r+b") as file:
        file.truncate(last + CLUSTER + 512)
    found = salvage(path, target)
    assert [(one.start, one.length, one.kind) for one in found.lost] == [(2 * CLUSTER, CLUSTER, "data")]
    with qcowlib.open(target) as image:
        assert image.pread(3 * CLUSTER, 0) == (b"d" * (CLUSTER + 512)).ljust(3 * CLUSTER, b"\0")


@pytest.mark.real("qemu-img")
def test_what_is_behind_the_end_of_a_file_with_holes_is_lost_and_named(tmp_path: Path) -> None:
    """There the map tells of a hole in the file, and not of data."""
    path, report = tmp_path / "disk", tmp_path / "report"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", path, "8M")
    table = l1_of(path)[1][0] & 0x00FFFFFFFFFFFE00
    poke(path, table + 8 * 3, ((1 << 63) | 0x7FFF0000).to_bytes(8, "big"))
    with qcowlib.open(path) as image:
        assert [one.kind for one in image.extents() if one.offset == 0x7FFF0000] == ["sparse"]
    found = salvage(path, None)
    assert [(one.start, one.length, one.kind) for one in found.lost] == [(3 << 16, 1 << 16, "data")]
    main(["check", "--report", str(report), str(path)], "qcow")
    before = json.loads(report.read_text())["before"]["findings"]
    assert {one["guest-offset"] for one in before if one["kind"] == "past-end"} == {3 << 16}


@pytest.mark.real("qemu-img")
def test_sound_image_is_copied_whole(tmp_path: Path) -> None:
    path, base, target = tmp_path / "disk", tmp_path / "base", tmp_path / "target"
    make(base)
    make(path, backing=base)
    found = salvage(path, target)
    assert found and found.lost_bytes == 0
    assert "identical" in qemu_img("compare", path, target)
    qemu_img("check", target)


def test_backing_file_that_is_gone_is_told_and_the_rest_is_copied(tmp_path: Path) -> None:
    path, base, target = tmp_path / "disk", tmp_path / "base", tmp_path / "target"
    make(base)
    wanted = make(path, backing=base)
    base.unlink()
    found = salvage(path, target)
    assert {one.kind for one in found.lost} == {"backing"} and found.backing_error is not None
    holds(found, target, wanted)


def test_compressed_cluster_that_does_not_unpack_is_lost_alone(tmp_path: Path) -> None:
    path, target = tmp_path / "disk", tmp_path / "target"
    qcowlib.create(tmp_path / "plain", SIZE, cluster_size=CLUSTER)
    with qcowlib.open(tmp_path / "plain", "r+") as image:
        image.pwrite(b"compressible" * (SIZE // 24), 0)
    qcowlib.convert(tmp_path / "plain", path, compress=True, cluster_size=CLUSTER)
    with qcowlib.open(path) as image:
        wanted = image.pread(SIZE, 0)
    _, entries = l1_of(path)
    data = path.read_bytes()
    table = entries[1] & 0x00FFFFFFFFFFFE00
    place = int.from_bytes(data[table : table + 8], "big") & ((1 << 58) - 1)
    poke(path, place, b"\xff\xff\xff\xff")
    found = salvage(path, target)
    assert [(one.start, one.kind) for one in found.lost] == [(REACH, "data")]
    holds(found, target, wanted)


def test_table_that_the_file_holds_half_of_is_lost(tmp_path: Path) -> None:
    path, target = tmp_path / "disk", tmp_path / "target"
    wanted = make(path)
    _, entries = l1_of(path)
    last = max(range(len(entries)), key=lambda number: entries[number])
    with path.open("r+b") as file:
        file.truncate((entries[last] & 0x00FFFFFFFFFFFE00) + 512)
    found = salvage(path, target)
    assert (last * REACH, "mapping") in {(one.start, one.kind) for one in found.lost}
    holds(found, target, wanted)


def test_failed_salvage_leaves_no_file(tmp_path: Path) -> None:
    path, target = tmp_path / "disk", tmp_path / "target"
    make(path)
    with pytest.raises(qcowlib.Cancelled):
        salvage(path, target, cancel=lambda: True)
    with pytest.raises(qcowlib.UsageError):
        salvage(path, target, preallocation="full")
    assert not target.exists()


@settings(max_examples=25)
@given(st.data())
def test_whatever_is_poked_into_the_tables_the_rest_is_the_guests(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("poke")
    path, target = folder / "disk", folder / "target"
    make(path)
    offset, entries = l1_of(path)
    with qcowlib.open(path) as image:
        sound = image.pread(SIZE, 0)
    tables = data.draw(st.sets(st.integers(0, len(entries) - 1), min_size=1, max_size=3))
    for number in tables:
        poke(path, offset + 8 * number, data.draw(st.binary(min_size=8, max_size=8)))
    found = salvage(path, target)
    with qcowlib.open(target) as image:
        got = image.pread(SIZE, 0)
    for number in range(len(entries)):
        if number not in tables:
            assert got[number * REACH : (number + 1) * REACH] == sound[number * REACH : (number + 1) * REACH]
    assert all(one.start // REACH in tables for one in found.lost)


@pytest.mark.parametrize("case", [case for case in hostile_cases() if case.whole], ids=lambda case: case.name)
def test_hostile_image_is_copied_or_refused(tmp_path: Path, case: HostileCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = materialize(case, str(tmp_path))
    try:
        found = salvage(path, None, references=qcowlib.deny_all)
    except qcowlib.Error as error:
        assert str(error).isprintable()
    else:
        assert found.lost_bytes <= found.size
