# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Seals: what changed silently is named to the unit, what did not is not, and a damaged seal judges nothing."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qcowlib
from qcowlib.jobs.diff import Change
from qcowlib.jobs.seal import Damage, diff_seals, heal, plan_seal, plan_verify, seal, verify
from qcowlib.jobs.seal_file import Seal, SealWriter
from qcowlib.storage.memory import MemoryStorage

SIZE = 4 << 20
UNIT = 65536


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    base, path = tmp_path / "base", tmp_path / "disk"
    rng = random.Random(1)
    qcowlib.create(base, SIZE)
    with qcowlib.open(base, "r+") as image:
        for _ in range(10):
            image.pwrite(rng.randbytes(100_000), rng.randrange(SIZE - 100_000))
    qcowlib.create(path, SIZE + 1000 * 512, backing=base, backing_format="qcow2")
    with qcowlib.open(path, "r+") as image:
        image.pwrite(rng.randbytes(300_000), 1 << 20)
        image.zero(UNIT * 2, 2 << 20)
        image.pwrite(bytes(UNIT), 3 << 20)
        image.pwrite(b"end", image.size - 3)
    return path


def content(path: Path) -> bytes:
    with qcowlib.open(path) as image:
        return image.pread(image.size, 0)


def units_of(damages: tuple[Damage | Change, ...]) -> set[int]:
    return {at for one in damages for at in range(one.start, one.start + one.length, UNIT)}


@pytest.mark.parametrize("workers", [1, 4])
def test_disk_is_as_it_was_sealed(disk: Path, workers: int) -> None:
    made = seal(disk, f"{disk}.seal", workers=workers)
    data = content(disk)
    assert made.hashes == sum(any(data[at : at + UNIT]) for at in range(0, len(data), UNIT))
    assert verify(disk, f"{disk}.seal", workers=workers)
    with Seal(f"{disk}.seal") as found:
        assert (found.digest, found.size, found.unit) == (made.digest, len(data), UNIT)


def test_seal_depends_on_the_content_alone(disk: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    qcowlib.convert(disk, copy, compress=True, cluster_size=4096)
    qcowlib.convert(disk, tmp_path / "raw", format="raw")
    digests = {
        seal(disk, tmp_path / "1").digest,
        seal(copy, tmp_path / "2", workers=1).digest,
        seal(tmp_path / "raw", tmp_path / "3", format="raw").digest,
    }
    assert len(digests) == 1


def test_every_changed_unit_is_named_and_no_other(disk: Path) -> None:
    seal(disk, f"{disk}.seal")
    rng = random.Random(3)
    places = {rng.randrange(SIZE) for _ in range(12)} | {2 << 20, 3 << 20}
    before = content(disk)
    with qcowlib.open(disk, "r+") as image:
        for place in places:
            image.pwrite(bytes([before[place] ^ 0xFF]), place)
    found = verify(disk, f"{disk}.seal")
    assert not found and units_of(found.damages) == {place - place % UNIT for place in places}
    assert {one.kind for one in found.damages} == {"changed"}


def test_data_that_became_zeros_is_named(disk: Path) -> None:
    seal(disk, f"{disk}.seal")
    with qcowlib.open(disk, "r+") as image:
        image.zero(UNIT, 1 << 20)
    assert units_of(verify(disk, f"{disk}.seal").damages) == {1 << 20}


def test_what_cannot_be_read_is_named_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    plain = tmp_path / "plain"
    qcowlib.create(plain, 1 << 20)
    with qcowlib.open(plain, "r+") as image:
        image.pwrite(b"abcdefgh" * (1 << 17), 0)
    qcowlib.convert(plain, path, compress=True)
    seal(path, tmp_path / "seal")
    with path.open("r+b") as file:  # the data of the compressed clusters, not their tables
        file.seek(5 * UNIT)
        file.write(b"\xff" * 4096)
    found = verify(path, tmp_path / "seal")
    assert not found and any(one.kind == "unreadable" and one.reason for one in found.damages)


def test_disk_of_another_size_is_not_as_sealed(disk: Path) -> None:
    seal(disk, f"{disk}.seal")
    with qcowlib.open(disk, "r+") as image:
        image.resize(SIZE - 1024, shrink=True)
    found = verify(disk, f"{disk}.seal")
    assert not found and found.damages == () and found.size != found.sealed_size


def test_damage_is_mended_from_a_copy_and_nothing_else_is_written(disk: Path, tmp_path: Path) -> None:
    replica = tmp_path / "replica"
    qcowlib.convert(disk, replica)
    seal(disk, f"{disk}.seal")
    wanted = content(disk)
    with qcowlib.open(disk, "r+") as image:
        image.pwrite(b"bad", 1 << 20)
        image.pwrite(b"bad", 2 << 20)
        image.resize(SIZE, shrink=True)
    with qcowlib.open(replica, "r+") as image:
        image.pwrite(b"worse", 3 << 20)
    found = heal(disk, replica, f"{disk}.seal")
    assert found and found.healed == 3 * UNIT - (UNIT - (len(wanted) % UNIT or UNIT))
    assert content(disk) == wanted


def test_copy_whose_content_is_wrong_too_is_not_used(disk: Path, tmp_path: Path) -> None:
    replica = tmp_path / "replica"
    qcowlib.convert(disk, replica)
    seal(disk, f"{disk}.seal")
    for path in (disk, replica):
        with qcowlib.open(path, "r+") as image:
            image.pwrite(b"bad", 1 << 20)
    found = heal(disk, replica, f"{disk}.seal")
    assert not found and found.healed == 0 and units_of(found.damages) == {1 << 20}


def test_copy_that_was_cut_off_is_finished(disk: Path, tmp_path: Path) -> None:
    seal(disk, f"{disk}.seal")
    target = tmp_path / "target"
    qcowlib.create(target, 1 << 20)
    with pytest.raises(qcowlib.Cancelled):
        calls = iter([False] * 2 + [True] * 100)
        heal(target, disk, f"{disk}.seal", cancel=lambda: next(calls), workers=1)
    half = content(target)
    assert any(half)
    assert heal(target, disk, f"{disk}.seal")
    assert content(target) == content(disk)
    assert heal(target, disk, f"{disk}.seal").healed == 0


@pytest.mark.parametrize("grow", [False, True])
def test_seal_is_brought_up_to_date_by_a_bitmap(disk: Path, tmp_path: Path, grow: bool) -> None:
    flat = tmp_path / "flat"
    qcowlib.convert(disk, flat)
    seal(flat, f"{flat}.seal")
    shutil.copy(f"{flat}.seal", tmp_path / "old")
    rng = random.Random(5)
    with qcowlib.open(flat, "r+") as image:
        image.add_bitmap("b", 4096)
        for _ in range(6):
            image.pwrite(rng.randbytes(5000), rng.randrange(SIZE - 5000))
        image.zero(UNIT * 3, 1 << 20)
        if grow:
            image.resize(SIZE * 2)
            image.pwrite(b"new", SIZE * 2 - 3)
        made = seal(image, f"{flat}.seal", bitmap="b")
    fresh = seal(flat, tmp_path / "fresh")
    assert made.digest == fresh.digest and made.read < fresh.read
    assert verify(flat, f"{flat}.seal")
    told, true = diff_seals(tmp_path / "old", f"{flat}.seal"), qcowlib.diff(disk, flat, unit=UNIT)
    assert units_of(tuple(told)) == units_of(tuple(true))


def test_seals_of_different_units_are_not_compared(disk: Path, tmp_path: Path) -> None:
    seal(disk, tmp_path / "a")
    seal(disk, tmp_path / "b", unit=4096)
    assert verify(disk, tmp_path / "b")
    with pytest.raises(qcowlib.UsageError):
        diff_seals(tmp_path / "a", tmp_path / "b")
    for unit in (1000, 2048, 4 << 20):
        with pytest.raises(qcowlib.UsageError):
            seal(disk, tmp_path / "c", unit=unit)


def test_seal_that_fails_leaves_the_old_one(disk: Path) -> None:
    seal(disk, f"{disk}.seal")
    before = Path(f"{disk}.seal").read_bytes()
    with pytest.raises(qcowlib.Cancelled):
        seal(disk, f"{disk}.seal", cancel=lambda: True)
    assert Path(f"{disk}.seal").read_bytes() == before and not Path(f"{disk}.seal.new").exists()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("small") / "seal"
    seal(MemoryStorage(b"x" * 10000 + bytes(10000) + b"y" * 5000), path, format="raw", unit=4096)
    return path.read_bytes()


@given(st.data())
def test_damaged_seal_is_refused(tmp_path_factory: pytest.TempPathFactory, small: bytes, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged-seal"
    raw = bytearray(small)
    if data.draw(st.booleans()):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    path.write_bytes(bytes(raw))
    with pytest.raises(qcowlib.CorruptImage):
        Seal(path)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4)), max_size=8),
    st.integers(0, 2**64 - 1),
)
def test_units_are_found_again(
    tmp_path_factory: pytest.TempPathFactory, gaps: list[tuple[int, int]], salt: int
) -> None:
    path = str(tmp_path_factory.getbasetemp() / "any-seal")
    numbers, at = [], 0
    for gap, count in gaps:
        at += gap
        numbers += range(at, at + count)
        at += count
    writer = SealWriter(path, (at + 1) * 4096, 4096)
    for number in numbers:
        writer.add(number, (number + salt).to_bytes(16, "big"))
    writer.finish()
    with Seal(path) as found:
        for number in range(at + 2):
            wanted = (number + salt).to_bytes(16, "big") if number in numbers else None
            assert found.hash_of(number) == wanted


def test_seal_whose_runs_are_forged_is_refused(tmp_path: Path) -> None:
    writer = SealWriter(str(tmp_path / "seal"), 4096, 4096)
    writer.add(0, bytes(16))
    writer.add(7, bytes(16))
    writer.finish()
    with pytest.raises(qcowlib.CorruptImage, match="does not have"):
        Seal(tmp_path / "seal")


def test_empty_disk_has_an_empty_seal(tmp_path: Path) -> None:
    qcowlib.create(tmp_path / "disk", 0)
    assert seal(tmp_path / "disk", tmp_path / "seal").hashes == 0
    assert verify(tmp_path / "disk", tmp_path / "seal")
    assert diff_seals(tmp_path / "seal", tmp_path / "seal") == []


@pytest.mark.parametrize("size", [SIZE + 20 * UNIT, SIZE - 20 * UNIT + 512])
def test_incremental_seal_has_what_changed_next_to_an_end_that_moved(tmp_path: Path, size: int) -> None:
    path, target = tmp_path / "disk", tmp_path / "seal"
    qcowlib.create(path, SIZE)
    with qcowlib.open(path, "r+") as image:
        image.pwrite(b"a" * SIZE, 0)
        image.add_bitmap("b", UNIT)
    seal(path, target)
    with qcowlib.open(path, "r+") as image:
        image.resize(size, shrink=True)
    low = min(size, SIZE)
    with qcowlib.open(path, "r+") as image:
        # One run of changed units that reaches over the old end, or the new one.
        image.pwrite(b"b" * (6 * UNIT + size - low), low - 6 * UNIT)
    assert plan_seal(path, target, bitmap="b") < size
    made = seal(path, target, bitmap="b")
    assert made.digest == seal(path, tmp_path / "whole").digest and verify(path, target)


def test_plans_say_what_is_read(disk: Path) -> None:
    planned = plan_seal(disk)
    assert seal(disk, f"{disk}.seal").read == planned
    assert verify(disk, f"{disk}.seal").read == plan_verify(disk, f"{disk}.seal")
    with qcowlib.open(disk, "r+") as image:
        image.add_bitmap("b")
        image.pwrite(b"x" * UNIT, 2 << 20)
        image.zero(UNIT, 1 << 20)
    planned = plan_seal(disk, f"{disk}.seal", bitmap="b")
    # The unit of zeros is looked at in the map.
    assert seal(disk, f"{disk}.seal", bitmap="b").read == planned == UNIT
    with pytest.raises(qcowlib.UsageError):
        plan_seal(disk, bitmap="b")


def test_planned_mending_writes_nothing(disk: Path, tmp_path: Path) -> None:
    replica = tmp_path / "replica"
    qcowlib.convert(disk, replica)
    seal(disk, f"{disk}.seal")
    with qcowlib.open(disk, "r+") as image:
        image.pwrite(b"bad", 1 << 20)
        image.pwrite(b"bad", 2 << 20)
    with qcowlib.open(replica, "r+") as image:
        image.pwrite(b"worse", 2 << 20)
    before = disk.read_bytes()
    planned = heal(disk, replica, f"{disk}.seal", plan=True)
    assert disk.read_bytes() == before
    assert (planned.healed, units_of(planned.damages)) == (UNIT, {2 << 20})
    assert heal(disk, replica, f"{disk}.seal") == planned
