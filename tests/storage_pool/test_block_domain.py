# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Life of block domains and of the volumes in them, on real volume groups."""

import contextlib
import errno
import os

import pytest

from storage_pool import block_group, layout
from storage_pool.block_domain import BlockDomain
from storage_pool.errors import (
    AlreadyExists,
    Illegal,
    InvalidName,
    MetadataError,
    NoSpace,
    NotAuthorized,
    NotFound,
    UnsupportedVersion,
)
from storage_pool.ids import BLANK, make_id
from storage_pool.lease_records import SafeleaseTag, read_leader
from storage_pool.metadata_volume import VolumeMetadata, parse
from storage_pool.testing.lvm import local_lvm, loop_devices

pytestmark = pytest.mark.real("lvm", "losetup", "mke2fs")

GIB, MIB = 1 << 30, 1 << 20
CTIME = 1617235200


@pytest.fixture
def devices(tmp_path):
    with loop_devices(tmp_path, 12 * GIB, 12 * GIB, 12 * GIB) as made:
        yield made


@pytest.fixture
def lvm(tmp_path, devices, runner):
    return local_lvm(tmp_path / "host", devices, runner)


@pytest.fixture
def make(token, lvm, runner, devices):
    def create(version=5, count=2, **options):
        return block_group.create_block_domain(
            token, lvm, runner, make_id(), devices[:count], version=version, ctime=CTIME, **options
        )

    return create


def record(domain, image, **changes):
    values = {"domain": domain.uuid, "image": image, "parent": BLANK, "capacity": 128 * MIB, "format": "RAW"}
    values |= {"type": "PREALLOCATED", "voltype": "LEAF", "disktype": "DATA", "description": "", "legality": "LEGAL"}
    return VolumeMetadata(**{**values, "ctime": CTIME, **changes})


def add_volume(domain, token, image=None, **changes):
    image, volume = image or make_id(), make_id()
    domain.allocate(token, image, volume, 128 * MIB)
    domain.publish(token, volume, record(domain, image, **changes))
    return image, volume


def mutations(runner, before):
    return [argv[1] for argv in runner.runs[before:] if argv[0] == "lvm" and argv[1] != "fullreport"]


@pytest.mark.parametrize("version", [2, 3, 4, 5])
def test_bd02_domain_keys_special_volumes_and_sdm_resource(make, devices, version):
    domain = make(version, description="block domain")
    raw = domain.metadata.raw
    assert raw["VERSION"] == str(version) and raw["DESCRIPTION"] == "block domain" and raw["ROLE"] == "Regular"
    assert raw["VGUUID"] == domain.state.vg.uuid
    assert ("LOGBLKSIZE" in raw) == (version < 5) and ("BLOCK_SIZE" in raw) == (version == 5)
    pvs = list(domain.state.pvs.values())
    assert domain.metadata.pv_mapping[1].mapoffset == pvs[0].pe_count == 93
    sizes = {name: lv.size // MIB for name, lv in domain.state.lvs.items()}
    want = {"metadata": 128, "ids": 128, "inbox": 128, "outbox": 128, "leases": 2048, "master": 1024}
    assert sizes == (want if version < 4 else {**want, "xleases": 1024})
    assert domain.state.lvs["metadata"].devices == f"{devices[0]}(0)"
    with domain.special("leases") as leases:
        leader = read_leader(leases, MIB)
        block = bytearray(512)
        leases.read_into(0, [block])
    if version < 3:
        assert SafeleaseTag.parse(bytes(block)) == SafeleaseTag(None) and any(block)
    else:
        assert (leader.space_name, leader.resource_name, leader.valid) == (domain.uuid, "SDM", True)
    with domain.special("master") as master:
        magic = bytearray(2)
        master.read_into(1080, [magic])
    assert magic == b"\x53\xef"
    assert domain.external_leases() == ({} if version >= 4 else None)


def test_v1_block_domain_keeps_its_text_in_the_volume_and_slots_by_extent(make, token):
    domain = make(0)
    assert not [tag for tag in domain.state.vg.tags if tag.startswith("MDT_")]
    image, volume = add_volume(domain, token)
    first = domain.state.lv(volume).segments[0].first_extent
    assert domain.slot_of(volume) == first
    assert not [tag for tag in domain.state.lv(volume).tags if tag.startswith("MD_")]
    domain.change(token, {"DESCRIPTION": "changed"})
    with BlockDomain.open(domain.lvm, domain.uuid) as again:
        assert again.metadata.description == "changed" and again.metadata.version == 0
        assert again.record(volume) == record(domain, image)


def test_a_v1_domain_reports_the_2048_byte_limit_before_it_is_hit(make, token):
    domain = make(0)
    before = dict(domain.metadata.raw)
    with pytest.raises(MetadataError, match="limit is 2048"):
        domain.change(token, {"POOL_DOMAINS": ",".join(f"{make_id()}:Active" for _ in range(40))})
    domain.refresh()
    assert domain.metadata.raw == before


@pytest.mark.parametrize("options", [{"version": 1}, {"version": 5, "storage_type": "NFS"}, {"version": 7}])
def test_bd03_what_does_not_exist_is_refused_before_touching_storage(make, runner, options):
    with pytest.raises(UnsupportedVersion):
        make(**options)
    assert not [argv for argv in runner.runs if argv[0] == "lvm"]


def test_devices_that_are_none_are_refused_before_touching_storage(token, lvm, runner, tmp_path, devices):
    (tmp_path / "file").touch()
    for bad in ([], [str(tmp_path / "file")], [devices[0], devices[0]]):
        with pytest.raises(InvalidName):
            block_group.create_block_domain(token, lvm, runner, make_id(), bad, version=5, ctime=CTIME)
    assert not [argv for argv in runner.runs if argv[0] == "lvm"]


def test_a_creation_that_fails_leaves_no_group(make, lvm, runner):
    runner.kill_before = lambda argv: argv[0] == "mke2fs"
    with pytest.raises(KeyboardInterrupt):
        make()
    assert lvm.groups() == []


def test_bd05_concurrent_creators_get_different_slots(make, token):
    domain = make()
    image = make_id()
    first, second, third = make_id(), make_id(), make_id()
    domain.allocate(token, image, first, 1)
    domain.allocate(token, image, second, 1)
    assert {domain.slot_of(first), domain.slot_of(second)} == {1, 2}
    domain.abandon(token, image, first)
    domain.allocate(token, image, third, 1)
    assert domain.slot_of(third) == 1
    assert domain.occupied_slots() == []


def test_bd07_bd08_volume_life_with_lease_and_slot(make, token, runner):
    domain = make()
    image, volume = make_id(), make_id()
    before = len(runner.runs)
    domain.allocate(token, image, volume, 128 * MIB)
    assert domain.entries()[volume].initializing
    domain.publish(token, volume, record(domain, image))
    assert mutations(runner, before) == ["lvcreate", "lvchange"]
    assert len(runner.runs) - before == 3
    slot = domain.slot_of(volume)
    with domain.special("metadata") as metadata:
        data = bytearray(512)
        metadata.read_into(layout.slot_offset(slot, 5), [data])
    assert bytes(data) == record(domain, image).to_slot(5)
    with domain.special("leases") as leases:
        assert read_leader(leases, (100 + slot) * MIB).resource_name == volume
    with contextlib.closing(domain.open_volume(volume, writable=True)) as storage:
        assert storage.size == 128 * MIB
        storage.write(5, [b"pattern"])
        storage.flush()
    domain.mark_removed(token, image, [volume])
    assert domain.entries()[volume].removed
    domain.purge(token, image)
    assert domain.entries() == {} and domain.occupied_slots() == []
    with domain.special("metadata") as metadata:
        metadata.read_into(layout.slot_offset(slot, 5), [data])
    assert not any(data)


def test_bytes_of_a_volume_over_two_devices_are_one_run(make, token):
    domain = make()
    _, volume = add_volume(domain, token)
    domain.extend(token, volume, 9 * GIB)
    assert len({place.device for place in domain.state.placements(volume)}) == 2
    border = domain.state.placements(volume)[1].start
    data = os.urandom(8192)
    with contextlib.closing(domain.open_volume(volume, writable=True)) as storage:
        storage.write(border - 4096, [data])
        storage.flush()
    with contextlib.closing(domain.open_volume(volume)) as storage:
        read = bytearray(8192)
        storage.read_into(border - 4096, [read])
    assert read == data


def test_bd12_bd13_extend_and_reduce_do_nothing_when_there_is_nothing_to_do(make, token, runner):
    domain = make()
    _, volume = add_volume(domain, token)
    before = len(runner.runs)
    domain.extend(token, volume, 100 * MIB)
    domain.reduce(token, volume, 100 * MIB)
    assert mutations(runner, before) == []
    domain.extend(token, volume, 300 * MIB)
    assert domain.size_of(volume) == 384 * MIB
    domain.reduce(token, volume, 200 * MIB)
    assert domain.size_of(volume) == 256 * MIB
    assert mutations(runner, before) == ["lvextend", "lvreduce"]


def test_an_image_of_many_volumes_is_removed_by_one_swap_of_tags(make, token, runner):
    domain = make()
    image, first = add_volume(domain, token)
    _, second = add_volume(domain, token, image=image, parent=first)
    before = len(runner.runs)
    domain.mark_removed(token, image, [first, second], zero=True)
    assert mutations(runner, before) == ["lvchange"]
    assert {(entry.removed, entry.zeroing) for entry in domain.entries().values()} == {(True, True)}
    assert [leftover.kind for leftover in domain.leftovers()] == ["volume to wipe"] * 2
    domain.sweep(token, domain.leftovers())
    assert mutations(runner, before) == ["lvchange", "lvremove"]
    assert domain.entries() == {}


def test_a_template_is_listed_with_the_images_that_use_it(make, token):
    domain = make()
    own, template = add_volume(domain, token, voltype="SHARED")
    clone, volume = add_volume(domain, token, parent=template)
    assert domain.entries()[template].images == (own, clone)
    assert domain.entries()[volume].parent == template
    with pytest.raises(NotFound):
        domain.mark_removed(token, clone, [template])
    domain.mark_removed(token, clone, [volume])
    assert domain.entries()[template].images == (own,)


def test_bd17_the_parent_tag_follows_the_record_when_told(make, token, runner):
    domain = make()
    _, base = add_volume(domain, token)
    image, child = add_volume(domain, token, parent=base)
    domain.set_parent_hint(token, child, BLANK)
    before = len(runner.runs)
    domain.set_parent_hint(token, child, BLANK)
    assert mutations(runner, before) == [] and domain.entries()[child].parent == BLANK
    assert parse(domain.read_record(child)).parent == base and domain.entries()[child].images == (image,)


def test_an_interrupted_creation_is_found_by_the_next_process_and_swept(make, token, lvm):
    domain = make()
    volume = make_id()
    domain.allocate(token, make_id(), volume, 1)
    assert domain.leftovers() == []
    with pytest.raises(AlreadyExists):
        domain.allocate(token, make_id(), volume, 1)
    again = BlockDomain.open(lvm, domain.uuid)
    found = again.leftovers()
    assert [(leftover.kind, leftover.name) for leftover in found] == [("unfinished volume", volume)]
    again.sweep(token, found)
    assert again.leftovers() == [] and volume not in again.state.lvs


def test_a_complete_volume_is_not_abandoned(make, token):
    domain = make()
    image, volume = add_volume(domain, token)
    with pytest.raises(Illegal):
        domain.abandon(token, image, volume)


def test_old_versions_guard_volumes_by_lvm_permission(make, token, runner):
    domain = make(2)
    _, volume = add_volume(domain, token)
    domain.set_writable(token, [volume], False)
    assert not domain.state.lv(volume).writable
    before = len(runner.runs)
    domain.set_writable(token, [volume], False)
    assert mutations(runner, before) == []


def test_bd16_after_a_middle_device_left_the_mapping_is_dense_and_grows_again(make, token, devices):
    domain = make(count=3)
    block_group.reduce_block_domain(token, domain, devices[1])
    assert list(domain.metadata.pv_mapping) == [0, 1]
    block_group.extend_block_domain(token, domain, [devices[1]], force=True)
    mapping = domain.metadata.pv_mapping
    assert [f"/dev/{entry.guid}" for entry in mapping.values()] == [devices[0], devices[2], devices[1]]
    assert len({entry.mapoffset for entry in mapping.values()}) == 3
    assert block_group.repair_mapping(token, domain) is False


def test_bd16_an_extension_cut_after_lvm_is_mended(make, token, runner, devices, lvm):
    domain = make()
    runner.kill_before = lambda argv: argv[:2] == ("lvm", "vgchange") or argv[1] == "vgchange"
    with pytest.raises(KeyboardInterrupt):
        block_group.extend_block_domain(token, domain, [devices[2]])
    runner.kill_before = None
    again = BlockDomain.open(lvm, domain.uuid)
    assert len(again.state.pvs) == 3 and len(again.metadata.pv_mapping) == 2
    assert block_group.repair_mapping(token, again)
    assert len(again.metadata.pv_mapping) == 3


def test_devices_in_use_or_with_the_metadata_stay(make, token, devices):
    domain = make()
    _, volume = add_volume(domain, token)
    domain.extend(token, volume, 9 * GIB)
    for device in devices[:2]:
        with pytest.raises(Illegal):
            block_group.reduce_block_domain(token, domain, device)
    with pytest.raises(NotFound):
        block_group.reduce_block_domain(token, domain, devices[2])


def test_bd14_a_group_with_small_or_full_metadata_is_reported(make, lvm, devices):
    domain = make()
    assert domain.warnings() == []
    state = domain.state
    domain._state = state._replace(vg=state.vg._replace(mda_size=MIB, mda_free=1000, lv_count=351, pv_count=301))
    assert len(domain.warnings()) == 4 and "351 logical volumes" in domain.warnings()[2]


def test_a_group_that_is_no_domain_is_not_opened(lvm, devices):
    name = make_id()
    lvm.create_group(name, devices[:1], [layout.TAG_UNREADY])
    with pytest.raises(MetadataError, match="no storage domain"):
        BlockDomain.open(lvm, name)
    assert BlockDomain.discover(lvm) == []


def test_a_domain_is_destroyed_only_when_detached(make, token, lvm):
    domain = make()
    domain.change(token, {"POOL_UUID": make_id()})
    with pytest.raises(Illegal):
        block_group.destroy_block_domain(token, domain)
    domain.change(token, {"POOL_UUID": ""})
    assert BlockDomain.discover(lvm) == [domain.uuid]
    block_group.destroy_block_domain(token, domain)
    assert lvm.groups() == []


def test_p06_no_change_without_a_valid_token(make, token, runner):
    domain = make()
    image, volume = add_volume(domain, token)
    token.close()
    before = len(runner.runs)
    for call in (
        lambda: domain.change(token, {"DESCRIPTION": "x"}),
        lambda: domain.allocate(token, image, make_id(), 1),
        lambda: domain.write_record(token, volume, record(domain, image)),
        lambda: domain.extend(token, volume, GIB),
        lambda: domain.mark_removed(token, image, [volume]),
        lambda: block_group.destroy_block_domain(token, domain),
    ):
        with pytest.raises(NotAuthorized):
            call()
    assert mutations(runner, before) == []


def test_a_full_group_is_no_space_and_leaves_nothing(make, token):
    domain = make(count=1)
    with pytest.raises(NoSpace, match=r"lvm lvcreate: .*nsufficient") as caught:
        domain.allocate(token, make_id(), make_id(), 100 * GIB)
    assert caught.value.errno == errno.ENOSPC
    _, volume = add_volume(domain, token)
    with pytest.raises(NoSpace):
        domain.extend(token, volume, 100 * GIB)
    assert domain.leftovers() == [] and domain.size_of(volume) == 128 * MIB
