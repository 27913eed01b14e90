# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Scenarios that no other file has: bitmaps, listings, 4096-byte storage, activation, caches, wiping."""

import json
import re
from pathlib import Path

import pytest

from qcowlib.errors import Busy, StorageError, UsageError
from qcowlib.storage.memory import MemoryStorage
from storage_pool import activation, image_group, merge, snapshot
from storage_pool import volume as vol
from storage_pool.block_domain import BlockDomain
from storage_pool.check import check_domain
from storage_pool.errors import Illegal, IllegalSpec, LvmError, NotAuthorized, NotFound, UnsupportedVersion
from storage_pool.file_domain import FileDomain
from storage_pool.ids import BLANK, make_id
from storage_pool.lvm import Lvm, LvmHost
from storage_pool.process import SystemRunner
from storage_pool.testing.process import ScriptedRunner, completed
from storage_pool.wiping import give_back, wipe

CTIME = 1617235200
MIB = 1 << 20


def disk(domain, token, fmt="COW", capacity=8 * MIB, **options):
    spec = vol.VolumeSpec(make_id(), make_id(), capacity, fmt, "PREALLOCATED" if fmt == "RAW" else "SPARSE", **options)
    vol.create_volume(token, domain, spec, CTIME)
    return spec.image, spec.volume


def test_each_scenario_of_the_list_has_a_test_that_bears_its_id():
    folder = Path(__file__).parent
    wanted = {line.split()[0] for line in (folder / "scenarios.txt").read_text().splitlines() if line[0] != "#"}
    named = {
        identity.upper()
        for path in folder.rglob("test_*.py")
        for name in re.findall(r"^def test((?:_[a-z]{1,2}\d\d)+)_", path.read_text(), re.MULTILINE)
        for identity in name.strip("_").split("_")
    }
    assert wanted - named == set()


# Chains of running guests


def test_bd17_records_follow_what_a_running_guest_did_to_its_chain(make_domain, token):
    domain = make_domain()
    image, base = disk(domain, token)
    middle = snapshot.create_snapshot(token, domain, image, ctime=CTIME)
    leaf = snapshot.create_snapshot(token, domain, image, ctime=CTIME)
    assert merge.sync_chain(token, domain, image, [leaf, middle, base]) == []
    # The guest went over to the volume below, and back.
    assert merge.sync_chain(token, domain, image, [middle, base]) == [leaf]
    assert domain.record(leaf).legality == "ILLEGAL" and merge.sync_chain(token, domain, image, [middle, base]) == []
    assert merge.sync_chain(token, domain, image, [leaf, middle, base]) == [leaf]
    assert domain.record(leaf).legality == "LEGAL" and check_domain(domain).clean
    # It merged the middle one: its image says so first.
    with pytest.raises(Illegal, match="does not stand on"):
        merge.sync_chain(token, domain, image, [leaf, base])
    vol.set_parent_name(token, domain, leaf, base, "COW")
    assert merge.sync_chain(token, domain, image, [leaf, base]) == [leaf]
    group = image_group.ImageGroup.load(domain, image)
    assert group.chain(leaf) == [leaf, base] and domain.entries()[leaf].parent in (base, None)
    vol.remove_volumes(token, domain, image, [middle])
    assert check_domain(domain).clean
    for wrong in ([], [base, leaf], [leaf], [leaf, make_id(), base]):
        with pytest.raises(Illegal, match="no such chain"):
            merge.sync_chain(token, domain, image, wrong)


# Bitmaps


def bitmaps(domain, volume):
    with vol.open_image(domain, volume, backing=False) as image:
        return {one.name: (one.granularity, one.enabled) for one in image.bitmaps()}


def test_fd14_a_new_bitmap_and_those_of_the_snapshot_record_in_the_new_leaf(make_domain, token):
    domain = make_domain(4)
    image, base = disk(domain, token, new_bitmap="first")
    with vol.open_image(domain, base, writable=True) as opened:
        opened.add_bitmap("coarse", 1 << 20)
        opened.add_bitmap("off", disabled=True)
        opened.pwrite(b"x", 0)
    leaf = snapshot.create_snapshot(token, domain, image, ctime=CTIME, copy_bitmaps=True, new_bitmap="second")
    assert bitmaps(domain, leaf) == {"first": (65536, True), "coarse": (1 << 20, True), "second": (65536, True)}
    with vol.open_image(domain, leaf) as opened:
        assert list(opened.bitmap_extents("first")) == []
    plain = snapshot.create_snapshot(token, domain, image, ctime=CTIME)
    assert bitmaps(domain, plain) == {} and check_domain(domain).clean


def test_fd14_bitmaps_are_refused_below_v4_on_raw_and_without_a_parent_of_the_image(file_domain, token):
    for version, options in (
        (3, {"new_bitmap": "b"}),
        (4, {"fmt": "RAW", "new_bitmap": "b"}),
        (4, {"copy_bitmaps": True}),
    ):
        domain = file_domain(version)
        with pytest.raises(IllegalSpec):
            disk(domain, token, **options)
        assert not domain.entries()
    image, _ = disk(domain, token, "RAW")
    with pytest.raises(IllegalSpec, match="COW parent"):
        snapshot.create_snapshot(token, domain, image, ctime=CTIME, copy_bitmaps=True)
    with pytest.raises(UsageError):
        disk(domain, token, new_bitmap="n" * 2000)
    assert check_domain(domain).clean and len(domain.entries()) == 1 and not domain.leftovers()


# Listings and records


def test_fd16_children_and_volumes_of_an_image_come_from_the_records(make_domain, token):
    domain = make_domain()
    image, base = disk(domain, token)
    other, lonely = disk(domain, token)
    middle = snapshot.create_snapshot(token, domain, image, ctime=CTIME)
    leaf = snapshot.create_snapshot(token, domain, image, ctime=CTIME)
    look = snapshot.preview(token, domain, image, base, ctime=CTIME)
    assert vol.children_of(domain, base) == sorted([middle, look]) and vol.children_of(domain, leaf) == []
    assert vol.children_of(domain, lonely) == []
    group = image_group.ImageGroup.load(domain, image)
    assert group.own() == sorted([base, middle, leaf, look]) and set(vol.records_of(domain, other)) == {lonely}
    with pytest.raises(NotFound):
        vol.children_of(domain, make_id())


def test_fd17_a_record_out_of_step_with_a_raw_volume_is_synchronised(file_domain, token):
    domain = file_domain()
    _, volume = disk(domain, token, "RAW")
    domain.extend(token, volume, 16 * MIB)
    assert domain.record(volume).capacity == 8 * MIB
    assert vol.sync_capacity(token, domain, volume).capacity == 16 * MIB
    assert domain.record(volume).capacity == 16 * MIB and check_domain(domain).clean


def test_sequence_grows_with_each_volume_of_an_image_and_generation_with_each_job(file_domain, token):
    domain = file_domain()
    image, base = disk(domain, token)
    leaf = snapshot.create_snapshot(token, domain, image, ctime=CTIME)
    look = snapshot.preview(token, domain, image, base, ctime=CTIME)
    assert [domain.record(volume).sequence for volume in (base, leaf, look)] == [0, 1, 2]
    snapshot.undo_preview(token, domain, image, look)
    look = snapshot.preview(token, domain, image, base, ctime=CTIME)
    assert domain.record(look).sequence == 2 and domain.record(look).generation == 0
    with vol.operation(token, domain, look, generation=0):
        pass
    assert domain.record(look).generation == 1


# Storage of 4096-byte blocks


@pytest.fixture
def storage_4k(tmp_path):
    """A file system on a device of 4096-byte sectors."""
    runner, path, mount = SystemRunner(), tmp_path / "device", tmp_path / "mount4k"
    mount.mkdir()
    with path.open("xb") as file:
        file.truncate(512 * MIB)

    def run(*argv):
        done = runner.run(argv)
        assert done.returncode == 0, done.stderr
        return done.stdout.decode().strip()

    device = run("losetup", "--find", "--show", "--sector-size", "4096", str(path))
    try:
        run("mke2fs", "-q", "-F", device)
        run("mount", device, str(mount))
        try:
            yield mount
        finally:
            run("umount", str(mount))
    finally:
        run("losetup", "--detach", device)


def facts(domain, token):
    """Return what a few operations leave, without UUIDs."""
    image, base = disk(domain, token)
    with vol.open_image(domain, base, writable=True) as opened:
        opened.pwrite(b"x" * 1000, 4099)
    leaf = snapshot.create_snapshot(token, domain, image, ctime=CTIME)
    _, raw = disk(domain, token, "RAW", 4 * MIB)
    with vol.open_image(domain, leaf) as opened:
        data = opened.pread(8192, 0)
    found = [domain.record(volume)._replace(domain="", image="", parent="") for volume in (base, leaf, raw)]
    return found, data, [domain.size_of(volume) for volume in (base, leaf, raw)], check_domain(domain).clean


@pytest.mark.real("losetup", "mke2fs")
def test_fd18_storage_of_4096_byte_blocks_gives_the_same_results(storage_4k, tmp_path, token):
    options = {"version": 5, "storage_type": "LOCALFS", "ctime": CTIME}
    plain = tmp_path / "plain"
    plain.mkdir()
    with pytest.raises(UnsupportedVersion, match="blocks of 4096 bytes"):
        FileDomain.create(token, str(storage_4k), make_id(), remote_path="/x", block_size=512, **options)
    assert [name.name for name in storage_4k.iterdir()] == ["lost+found"]
    with (
        FileDomain.create(token, str(storage_4k), make_id(), remote_path="/x", block_size=4096, **options) as big,
        FileDomain.create(token, str(plain), make_id(), remote_path="/x", block_size=512, **options) as small,
    ):
        assert big.metadata.block_size == 4096
        assert facts(big, token) == facts(small, token)
        with FileDomain.open(big.name) as again:
            assert again.metadata.block_size == 4096 and len(again.entries()) == 3


# Activation


def report(name, lvs):
    """Return LVM's report of a group with volumes by name and attributes."""
    vg = {
        "vg_name": name, "vg_uuid": "u", "vg_attr": "wz--n-", "vg_size": "1", "vg_free": "0", "vg_extent_size": "1",
        "vg_extent_count": "1", "vg_free_count": "0", "vg_tags": "", "vg_mda_size": "1", "vg_mda_free": "1",
        "lv_count": "1", "pv_count": "1", "vg_seqno": "1", "vg_missing_pv_count": "0",
    }  # fmt: skip
    rows = [
        {"lv_name": lv, "lv_uuid": "l", "lv_attr": attr, "lv_size": "1", "lv_tags": "", "lv_health_status": ""}
        for lv, attr in lvs.items()
    ]
    return json.dumps({"report": [{"vg": [vg], "lv": rows}]}).encode()


def scripted(lvs, answer=None):
    name = make_id()

    def run(argv):
        if argv[1] == "fullreport":
            return completed(argv, report=report(name, lvs))
        return answer(argv) if answer else completed(argv)

    runner = ScriptedRunner(run)
    return BlockDomain(Lvm(runner, LvmHost(None, activation=True)), name), runner


def test_bd18_volumes_not_in_use_are_deactivated_by_one_command_and_the_others_told():
    idle, used, off = (make_id() for _ in range(3))
    domain, runner = scripted({idle: "-wi-a-----", used: "-wi-ao----", off: "-wi-------", "metadata": "-wi-a-----"})
    assert activation.deactivate_unused(domain) == [used]
    (changed,) = [run for run in runner.runs if run[1] == "lvchange"]
    assert changed[-3:] == ("--available", "n", f"{domain.uuid}/{idle}")


def test_bd18_a_volume_in_use_is_refused_with_a_clear_error():
    idle, used = make_id(), make_id()
    domain, runner = scripted({idle: "-wi-a-----", used: "-wi-ao----"})
    with pytest.raises(Busy, match=f"the volume {used} is in use on this host"):
        activation.deactivate(domain, [idle, used])
    assert not [run for run in runner.runs if run[1] == "lvchange"]
    late, _ = scripted(
        {idle: "-wi-a-----"},
        lambda argv: completed(argv, 5, stderr=f"  Logical volume {idle} in use.\n".encode()),
    )
    with pytest.raises(Busy):
        activation.deactivate(late, [idle])
    broken, _ = scripted({idle: "-wi-a-----"}, lambda argv: completed(argv, 5, stderr=b"  Broken.\n"))
    with pytest.raises(LvmError, match="lvm lvchange: Broken"):
        activation.deactivate(broken, [idle])


# What is known of a group


@pytest.mark.real("lvm", "losetup", "mke2fs")
def test_bd19_what_another_host_made_is_found_by_one_more_report_and_a_missing_one_told(block_domain, token):
    domain = block_domain()
    other = BlockDomain.open(domain.lvm, domain.uuid)
    assert domain.entries() == other.entries() == {}
    _, volume = disk(other, token)
    commands = domain.lvm.commands
    assert domain.record(volume).parent == BLANK and domain.size_of(volume) > 0
    assert domain.lvm.commands == commands + 1
    with pytest.raises(NotFound, match="no volume"):
        domain.record(make_id())
    assert domain.lvm.commands == commands + 2


def test_bd19_a_command_that_failed_makes_the_group_be_read_again(token):
    volume = make_id()
    domain, runner = scripted({volume: "-wi-a-----"}, lambda argv: completed(argv, 5, stderr=b"  No.\n"))
    with pytest.raises(LvmError):
        domain.set_writable(token, [volume], False)
    runner.runs.clear()
    assert domain.size_of(volume) == 1
    assert [run[1] for run in runner.runs] == ["fullreport"]


# Wiping


class EndingToken:
    """A right to change that is lost after so many questions."""

    epoch = 1

    def __init__(self, left):
        self.left = left

    def check(self):
        self.left -= 1
        if self.left < 0:
            raise NotAuthorized("over")


@pytest.mark.real("lvm", "losetup", "mke2fs")
def test_bd21_a_logical_volume_is_zeroed_in_steps_that_can_be_ended(block_domain, token):
    domain = block_domain()
    _, volume = disk(domain, token, "RAW", 128 * MIB)
    storage = domain.open_volume(volume, writable=True)
    try:
        for offset in (0, 40 * MIB, 127 * MIB):
            storage.write(offset, [b"old data" * 64])
        told = []
        with pytest.raises(NotAuthorized):
            wipe(EndingToken(2), storage, step=32 * MIB, progress=lambda *at: told.append(at))
        assert told == [(32 * MIB, 128 * MIB), (64 * MIB, 128 * MIB)]
        assert [read(storage, offset) for offset in (0, 40 * MIB)] == [bytes(8)] * 2
        assert read(storage, 127 * MIB) == b"old data"
        wipe(token, storage, 64 * MIB, step=32 * MIB)
        assert read(storage, 127 * MIB) == bytes(8)
        assert give_back(token, storage, step=50 * MIB)
        with pytest.raises(NotAuthorized):
            give_back(EndingToken(0), storage)
    finally:
        storage.close()
    with vol.open_image(domain, volume) as image:
        assert image.pread(4096, 0) == bytes(4096)


def read(storage, offset):
    data = bytearray(8)
    storage.read_into(offset, [data])
    return bytes(data)


class Undiscardable(MemoryStorage):
    def discard(self, offset, length):
        raise StorageError(95, path="memory", operation="discard")


def test_bd21_a_device_that_cannot_discard_is_no_error(token):
    assert give_back(token, Undiscardable(MIB)) is False and give_back(token, MemoryStorage(MIB)) is True


@pytest.mark.real("lvm", "losetup", "mke2fs")
def test_bd21_a_disk_is_wiped_and_discarded_before_it_goes(block_domain, token):
    domain = block_domain()
    image, volume = disk(domain, token, "RAW", 128 * MIB)
    with vol.open_image(domain, volume, writable=True) as opened:
        opened.pwrite(b"secret", 5 * MIB)
    (place,) = domain.state.placements(volume)
    vol.remove_volumes(token, domain, image, [volume], zero=True, discard=True)
    assert not domain.entries()
    with Path(place.device).open("rb") as device:
        device.seek(place.offset + 5 * MIB)
        assert device.read(6) == bytes(6)
