# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Conversion of domains in place, also cut at every step."""

import json
from pathlib import Path

import pytest

from storage_pool import snapshot as sn
from storage_pool import upgrade as up
from storage_pool import volume as vol
from storage_pool.block_domain import BlockDomain
from storage_pool.dump import dump_block, dump_file
from storage_pool.errors import Illegal, UnsupportedVersion
from storage_pool.file_domain import FileDomain
from storage_pool.ids import make_id
from storage_pool.lease_records import parse_leader, read_leader
from storage_pool.testing.golden import rebuild_block_domain, rebuild_file_domain
from storage_pool.testing.killing import Killed
from storage_pool.testing.lvm import local_lvm, loop_devices

GOLDEN = Path(__file__).parent / "golden"
CTIME = 1617235200
MIB = 1 << 20


class DyingToken:
    """A token whose holder dies at its n-th check, and never writes again."""

    epoch = 1

    def __init__(self, left=None):
        self.left = left

    def check(self):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Killed


def file_copy(case, mount):
    return FileDomain.open(str(rebuild_file_domain(GOLDEN / "file" / case, mount)))


def volumes_of(document):
    """Return what a conversion must keep of all volumes."""
    skip = {"sequence", "apparentsize", "truesize", "capacity"}
    return {
        volume: {key: value for key, value in told.items() if key not in skip}
        for volume, told in document["volumes"].items()
    }


@pytest.mark.parametrize(
    ("case", "target"),
    [("v1_nfs", 3), ("v1_nfs", 5), ("v3_nfs", 4), ("v3_nfs", 5), ("v4_glusterfs_512", 5), ("v5_nfs", 5)],
)
def test_fd19_a_file_domain_keeps_its_keys_and_volumes(tmp_path, case, target):
    with file_copy(case, tmp_path) as domain:
        before = dump_file(domain)
        up.upgrade(DyingToken(), domain, target, ctime=CTIME)
    with FileDomain.open(str(tmp_path)) as domain:
        after = dump_file(domain)
        keys = dict(domain.metadata.raw)
    assert volumes_of(after) == volumes_of(before)
    assert after["all_volumes"] == before["all_volumes"]
    assert keys.pop("VERSION") == str(target)
    if target == 5:
        assert (keys.pop("BLOCK_SIZE"), keys.pop("ALIGNMENT")) == ("512", "1048576")
    old = dict(before["domain_metadata_raw"])
    for key in ("VERSION", "BLOCK_SIZE", "ALIGNMENT"):
        old.pop(key, None)
    assert keys == old
    assert "problems" not in after
    live = [volume for volume, told in after["volumes"].items() if told["status"] == "OK"]
    assert {volume: lease["resource"] for volume, lease in after["leases"].items()} == {name: name for name in live}
    assert ("external_leases" in after) == (target >= 4)
    root = Path(after["info"]["uuid"])
    folder = tmp_path / root
    ids, leases = (folder / "dom_md/ids").read_bytes(), (folder / "dom_md/leases").read_bytes()
    assert parse_leader(ids).space_name == parse_leader(leases[MIB:]).space_name == after["sd_uuid"]
    if target == 5:
        for meta in folder.glob("images/[0-9a-f]*/*.meta"):
            assert b"CAP=" in meta.read_bytes() and b"SIZE=" not in meta.read_bytes()
    for data in folder.glob("images/[0-9a-f]*/*-*"):
        if not data.suffix:
            assert data.stat().st_mode & 0o777 == 0o660


def test_fd19_a_conversion_cut_at_every_step_is_ended_by_running_it_again(tmp_path):
    at = 0
    while True:
        mount = tmp_path / str(at)
        with file_copy("v1_nfs", mount) as domain:
            before = volumes_of(dump_file(domain))
            try:
                up.upgrade(DyingToken(at), domain, 5, ctime=CTIME)
            except Killed:
                pass
            else:
                break
        with FileDomain.open(str(mount)) as domain:
            assert volumes_of(dump_file(domain)) == before
            up.upgrade(DyingToken(), domain, 5, ctime=CTIME)
            assert volumes_of(dump_file(domain)) == before and domain.metadata.version == 5
        at += 7
    assert at > 30


def test_fd19_a_broken_volume_stays_as_it_is_and_is_reported(tmp_path):
    with file_copy("v4_glusterfs_512", tmp_path) as domain:
        volume = json.loads((GOLDEN / "file/v4_glusterfs_512/expected.json").read_text())["labels"]["raw"]["volume"]
        meta = Path(domain.path_of(volume) + ".meta")
        broken = meta.read_bytes().replace(b"VOLTYPE=LEAF\n", b"")
        meta.write_bytes(broken)
        report = up.upgrade(DyingToken(), domain, 5, ctime=CTIME)
        assert [volume in line for line in report] == [True]
        assert meta.read_bytes() == broken and domain.metadata.version == 5


def test_only_upwards_and_only_data_domains(tmp_path):
    with file_copy("v5_nfs", tmp_path / "a") as domain, pytest.raises(UnsupportedVersion):
        up.upgrade(DyingToken(), domain, 4, ctime=CTIME)
    with file_copy("iso", tmp_path / "b") as domain, pytest.raises(UnsupportedVersion):
        up.upgrade(DyingToken(), domain, 3, ctime=CTIME)
    with file_copy("v1_nfs", tmp_path / "c") as domain:
        with pytest.raises(UnsupportedVersion):
            up.upgrade(DyingToken(), domain, 2, ctime=CTIME)
        domain.allocate(DyingToken(), make_id(), make_id(), 0)
        with pytest.raises(Illegal):
            up.upgrade(DyingToken(), domain, 3, ctime=CTIME)


@pytest.fixture
def rebuilt(tmp_path):
    """Make a golden block domain and return how to open it."""
    made = []

    def make(case):
        expected = json.loads((GOLDEN / "block" / case / "expected.json").read_text())
        folder = tmp_path / case
        folder.mkdir()
        sizes = [(pv["pe_count"] + 3) << 27 for pv in expected["pvs"]]
        context = loop_devices(folder, *sizes)
        devices = context.__enter__()
        made.append(context)
        lvm = local_lvm(folder / "host", devices)
        name = rebuild_block_domain(GOLDEN / "block" / case, lvm, devices)
        return lambda: BlockDomain.open(lvm, name)

    yield make
    for context in made:
        context.__exit__(None, None, None)


@pytest.mark.real("lvm", "losetup")
@pytest.mark.parametrize(("case", "target"), [("v2_1pv", 3), ("v3_2pv", 4), ("v3_2pv", 5), ("v2_1pv", 5)])
def test_bd15_a_block_domain_keeps_its_keys_volumes_and_slots(rebuilt, case, target):
    reopen = rebuilt(case)
    before = dump_block(reopen())
    up.upgrade(DyingToken(), reopen(), target, ctime=CTIME)
    domain = reopen()
    after = dump_block(domain)
    assert volumes_of(after) == volumes_of(before)
    assert after["all_volumes"] == before["all_volumes"] and after["occupied_slots"] == before["occupied_slots"]
    assert after["version"] == target and after["pv_mapping"] == before["pv_mapping"]
    assert {volume: lease["resource"] for volume, lease in after["leases"].items()} == {
        name: name for name in after["all_volumes"]
    }
    assert ("xleases" in domain.state.lvs) == (target >= 4)
    assert ("LOGBLKSIZE" in domain.metadata.raw) == (target < 5)
    with domain.special("metadata") as metadata, domain.special("leases") as leases:
        start = bytearray(MIB)
        metadata.read_into(0, [start])
        assert read_leader(leases, MIB).resource_name == "SDM"
    assert any(start) == (target < 5)


@pytest.mark.real("lvm", "losetup")
def test_bd15_a_broken_slot_is_moved_as_it_is(rebuilt):
    reopen = rebuilt("v3_2pv")
    domain = reopen()
    volume = min(volume for volume, entry in domain.entries().items() if not entry.removed)
    broken = domain.read_record(volume).replace(b"VOLTYPE", b"XOLTYPE")
    domain.write_slot(DyingToken(), domain.slot_of(volume), broken)
    report = up.upgrade(DyingToken(), reopen(), 5, ctime=CTIME)
    assert [volume in line for line in report if "left as it is" in line] == [True]
    assert reopen().read_record(volume) == broken


@pytest.mark.real("lvm", "losetup", "mke2fs")
def test_bd22_v1_text_becomes_tags_and_slots_become_tags(block_domain, token):
    domain = block_domain(0)
    domain.change(token, {"DESCRIPTION": "".join(map(chr, range(32, 82)))})
    domain.change(token, {"POOL_DESCRIPTION": "".join(map(chr, range(82, 127))), "X_LATER": "a=b&38&"})
    image, base = make_id(), make_id()
    vol.create_volume(token, domain, vol.VolumeSpec(image, base, 64 * MIB), CTIME)
    leaf = sn.create_snapshot(token, domain, image, ctime=CTIME)
    keys = dict(domain.metadata.raw)
    slots = {volume: entry.slot for volume, entry in domain.entries().items()}
    records = domain.read_records()
    up.upgrade(token, domain, 2, ctime=CTIME)
    again = BlockDomain.open(domain.lvm, domain.uuid)
    assert again.metadata.raw == {**keys, "VERSION": "2", "LOGBLKSIZE": "512", "PHYBLKSIZE": "512"}
    assert {volume: entry.slot for volume, entry in again.entries().items()} == slots
    assert again.read_records() == records
    with again.special("metadata") as metadata:
        start = bytearray(2048)
        metadata.read_into(0, [start])
    assert not any(start)
    up.upgrade(token, again, 5, ctime=CTIME)
    assert again.record(leaf).parent == base and again.metadata.version == 5
    with vol.open_image(again, leaf) as opened:
        assert opened.size == 64 * MIB


@pytest.mark.real("lvm", "losetup")
@pytest.mark.parametrize("at", [1, 8, 16, 24, 31, 32])
def test_bd15_a_block_conversion_cut_at_a_step_is_ended_by_running_it_again(rebuilt, at):
    reopen = rebuilt("v2_1pv")
    before = volumes_of(dump_block(reopen()))
    with pytest.raises(Killed):
        up.upgrade(DyingToken(at), reopen(), 5, ctime=CTIME)
    assert volumes_of(dump_block(reopen())) == before
    up.upgrade(DyingToken(), reopen(), 5, ctime=CTIME)
    assert volumes_of(dump_block(reopen())) == before and reopen().metadata.version == 5
