# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Lease records, the safelease block and the index of external leases."""

import json
import subprocess
from pathlib import Path

import pytest

from qcowlib.errors import StorageError
from qcowlib.storage.memory import MemoryStorage
from storage_pool import lease_records, xlease
from storage_pool.errors import AlreadyExists, InvalidName, MetadataError, NoSpace, NotFound
from storage_pool.ids import make_id

MIB = 1 << 20
GOLDEN = Path(__file__).parent / "golden"
INDEXES = json.loads((GOLDEN / "xlease/indexes.json").read_text())
SAFELEASE = json.loads((GOLDEN / "safelease/expected.json").read_text())


def golden_index(name):
    data = (GOLDEN / "xlease" / name).read_bytes()
    empty = bytes.fromhex(INDEXES["empty_record_hex"])
    return data + empty * ((xlease.INDEX_SIZE - len(data)) // 64)


class FailingStorage(MemoryStorage):
    """Fails the write number ``fail_at`` from now on."""

    fail_at = -1

    def write(self, offset, buffers):
        self.fail_at -= 1
        if self.fail_at == 0:
            raise StorageError(5, operation="write")
        super().write(offset, buffers)


@pytest.fixture
def volume():
    storage = FailingStorage(bytes(40 * MIB), growable=False)
    made = xlease.XleaseVolume(storage, path="xleases", block_size=512, alignment=MIB)
    made.format(make_id(), 1617235702)
    return made, storage


def test_ls16_safelease_block_free_and_held():
    for row in SAFELEASE["tags"]:
        block = bytes.fromhex(row["hex"]).ljust(512, b"\0")
        tag = lease_records.SafeleaseTag.parse(block)
        assert tag == lease_records.SafeleaseTag(row.get("host_id"), row.get("timestamp_us", 0))
        assert tag.pack() == block
    for name in ("free_block.bin", "held_block.bin"):
        block = (GOLDEN / "safelease" / name).read_bytes()
        assert lease_records.SafeleaseTag.parse(block).pack() == block


@pytest.mark.parametrize("bad", [b"x" * 512, b"1" + b" " * 15 + b"z" * 16, b"1 2".ljust(16) + b"0" * 16])
def test_a_damaged_safelease_block_is_an_error(bad):
    with pytest.raises(MetadataError):
        lease_records.SafeleaseTag.parse(bad)


def test_lockspace_and_resource_are_read_back_with_a_valid_checksum():
    space = make_id()
    area = lease_records.lockspace_area(space)
    leader = lease_records.parse_leader(area[249 * 512 :])
    assert leader.lockspace and leader.valid and leader.space_name == space and len(area) == MIB
    area = lease_records.resource_area(space, "SDM", block_size=4096, alignment=8 * MIB)
    leader = lease_records.parse_leader(area)
    assert (leader.resource_name, leader.sector_size, leader.alignment) == ("SDM", 4096, 8 * MIB)
    assert leader.valid and len(area) == 8 * MIB
    assert not lease_records.parse_leader(area[:60] + b"x" + area[61:]).valid
    assert lease_records.parse_leader(bytes(512)) is None and lease_records.parse_leader(b"") is None


@pytest.mark.parametrize("row", INDEXES["indexes"], ids=lambda row: row["file"])
def test_ls01_index_written_by_others_is_read_and_written_byte_for_byte(row):
    empty = xlease.format_index(row["lockspace"], row["mtime"])
    assert empty == golden_index(row["empty_file"])
    index = xlease.Index(golden_index(row["file"]))
    assert (index.lockspace, index.mtime) == (row["lockspace"], row["mtime"])
    assert {name: lease._asdict() for name, lease in index.leases(row["alignment"]).items()} == row["leases"]
    rebuilt = xlease.Index(empty)
    for name, lease in row["leases"].items():
        rebuilt.set(lease["offset"] // row["alignment"] - 3, name, row["alignment"])
    assert rebuilt.to_bytes() == index.to_bytes()


@pytest.mark.parametrize("damage", INDEXES["indexes"][0]["damaged"], ids=lambda damage: damage["name"])
def test_ls01_ls06_damage_is_answered_as_the_real_thing_does(damage):
    data = bytearray(golden_index(INDEXES["indexes"][0]["file"]))
    for offset, value in damage["edits"]:
        data[offset] = value
    if not damage["opens"]:
        with pytest.raises(MetadataError):
            xlease.Index(bytes(data))
        return
    index = xlease.Index(bytes(data))
    assert {name: lease._asdict() for name, lease in index.leases(MIB).items()} == damage["leases"]
    for name, error in damage["lookup_errors"]:
        with pytest.raises(MetadataError if error == "InvalidRecord" else NotFound):
            index.lookup(name)


def test_ls01_a_truncated_index_is_refused(volume):
    with pytest.raises(MetadataError, match="truncated"):
        xlease.Index(golden_index(INDEXES["indexes"][0]["file"])[:-1])


def test_ls02_add_look_up_remove_and_first_free_slot(volume):
    made, _ = volume
    names = [make_id() for _ in range(3)]
    offsets = [made.add(name).area.offset for name in names]
    assert offsets == [3 * MIB, 4 * MIB, 5 * MIB]
    assert made.lookup(names[1]).area.offset == 4 * MIB
    assert made.resources() == dict(enumerate(names))
    with pytest.raises(AlreadyExists):
        made.add(names[0])
    made.remove(names[1])
    with pytest.raises(NotFound):
        made.lookup(names[1])
    with pytest.raises(NotFound):
        made.remove(names[1])
    assert made.add(make_id()).area.offset == 4 * MIB


def test_ls02_a_full_index_is_no_space(volume):
    made, _ = volume
    index = made.load()
    for number in range(xlease.MAX_RECORDS):
        index.set(number, make_id(), MIB)
    with pytest.raises(NoSpace, match="3960"):
        index.reserve(make_id())


@pytest.mark.parametrize("bad", ["", "x", "../" + make_id(), make_id() + "\n"])
def test_a_lease_name_that_is_no_uuid_is_refused(volume, bad):
    with pytest.raises(InvalidName):
        volume[0].add(bad)


@pytest.mark.parametrize("fail_at", [1, 2])
def test_ls03_failure_of_any_write_leaves_a_usable_index(volume, fail_at):
    made, storage = volume
    name = make_id()
    storage.fail_at = fail_at
    with pytest.raises(StorageError):
        made.add(name)
    with pytest.raises(NotFound):
        made.lookup(name)
    made.add(name)
    storage.fail_at = fail_at
    with pytest.raises(StorageError):
        made.remove(name)
    assert list(made.load().leases(MIB)) == ([name] if fail_at == 1 else [])
    made.rebuild()
    assert list(made.resources().values()) == list(made.load().leases(MIB))


def test_ls04_a_record_left_as_updating_is_missing_and_can_be_added_and_removed(volume):
    made, storage = volume
    names = [make_id(), make_id()]
    for name in names:
        made.add(name)
    for number in range(2):
        storage.write(MIB + 512 + 64 * number + 61, [b"u"])
    for name in names:
        with pytest.raises(NotFound):
            made.lookup(name)
    assert made.add(names[0]).area.offset == 3 * MIB
    made.lookup(names[0])
    made.remove(names[1])
    assert list(made.load().leases(MIB)) == [names[0]]


def test_ls05_rebuild_follows_the_index_and_asks_resources_for_damaged_records():
    names = [make_id() for _ in range(8)]
    index = xlease.Index(xlease.format_index(make_id(), 1))
    for number in (0, 1, 3, 4, 5, 6, 30):
        index.set(number, names[number % 8], MIB)
    data = bytearray(index.to_bytes())
    data[512 + 4 * 64 + 50] = ord("x")
    data[512 + 5 * 64 + 50] = ord("x")
    data[512 + 6 * 64 + 61] = ord("u")
    resources = {0: names[0], 2: names[2], 3: make_id(), 4: names[7], 6: names[6]}
    steps = xlease.rebuild_plan(xlease.Index(bytes(data)), resources, 20)
    assert [(step.number, step.action, step.name) for step in steps] == [
        (1, "write resource", names[1]),
        (2, "clear resource", ""),
        (3, "write resource", names[3]),
        (6, "write record", names[6]),
        (30, "empty record", ""),
        (4, "write record", names[7]),
        (5, "empty record", ""),
    ]


def test_ls05_rebuild_makes_index_and_resources_agree(volume):
    made, storage = volume
    kept, lost = make_id(), make_id()
    made.add(kept)
    made.add(lost)
    storage.write(4 * MIB, [bytes(512)])
    storage.write(9 * MIB, [lease_records.resource_area(make_id(), make_id())])
    assert [step.action for step in made.rebuild()] == ["write resource", "clear resource"]
    assert made.resources() == {0: kept, 1: lost}
    assert made.rebuild() == []
    storage.write(MIB, [b"xxxx"])
    with pytest.raises(MetadataError):
        made.rebuild()


def test_ls07_a_volume_cut_short_raises():
    short = MemoryStorage(bytes(MIB), growable=False)
    made = xlease.XleaseVolume(short, path="x", block_size=512, alignment=MIB)
    with pytest.raises(MetadataError):
        made.load()
    with pytest.raises(StorageError):
        made.format(make_id(), 1)


@pytest.mark.real("sanlock")
@pytest.mark.parametrize(("block_size", "alignment"), [(512, MIB), (4096, 8 * MIB)])
def test_ls14_sanlock_itself_reads_the_lockspace_and_resources_that_we_make(tmp_path, block_size, alignment):
    space, volume = make_id(), make_id()
    geometry = {"block_size": block_size, "alignment": alignment}
    ids, leases = tmp_path / "ids", tmp_path / "leases"
    ids.write_bytes(lease_records.lockspace_area(space, **geometry))
    areas = [bytes(alignment), lease_records.resource_area(space, "SDM", **geometry)]
    areas.append(lease_records.resource_area(space, volume, **geometry))
    leases.write_bytes(b"".join(areas))

    def sanlock(*arguments):
        done = subprocess.run(["sanlock", "direct", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    sizes = ["-Z", str(block_size), "-A", f"{alignment >> 20}M"]
    told = sanlock("read_leader", "-s", f"{space}:1:{ids}:0", *sizes)
    assert space in told and f"sector_size {block_size}" in told
    for name, offset in (("SDM", alignment), (volume, 2 * alignment)):
        told = sanlock("read_leader", "-r", f"{space}:{name}:{leases}:{offset}", *sizes)
        assert f"resource_name {name}" in told and "owner_id 0" in told
