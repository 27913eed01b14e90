# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Snapshots, previews and merges, also cut at every step."""

import contextlib
import json
import random
import subprocess

import pytest

from qcowlib.errors import Busy
from qcowlib.jobs.measure import measure
from storage_pool import image_group as ig
from storage_pool import merge as mg
from storage_pool import merge_swap as ms
from storage_pool import snapshot as sn
from storage_pool import volume as vol
from storage_pool.errors import Illegal, LvmError, MetadataError, NotFound
from storage_pool.ids import make_id
from storage_pool.testing.killing import Killed, KillingDomain
from storage_pool.twin import make_twin

MIB = 1 << 20
SIZE = 128 * MIB
CTIME = 1617235200
CLUSTER = 65536


def new_disk(domain, token, **options):
    image, volume = make_id(), make_id()
    vol.create_volume(token, domain, vol.VolumeSpec(image, volume, **{"capacity": SIZE, **options}), CTIME)
    return image, volume


def scribble(domain, volume, seed, expected):
    """Write clusters and zeros at places of *seed* into a volume and into the model *expected*."""
    chance = random.Random(seed)
    with vol.open_image(domain, volume, writable=True, allow_illegal=True) as image:
        for _ in range(6):
            at = chance.randrange(24) * CLUSTER
            if chance.random() < 0.3:
                image.zero(CLUSTER, at)
                expected[at] = bytes(CLUSTER)
            else:
                data = chance.randbytes(CLUSTER)
                image.pwrite(data, at)
                expected[at] = data


def reads(domain, volume):
    with vol.open_image(domain, volume, allow_illegal=True) as image:
        return {at: image.pread(CLUSTER, at) for at in range(0, 24 * CLUSTER, CLUSTER)}


def full(expected):
    return {at: expected.get(at, bytes(CLUSTER)) for at in range(0, 24 * CLUSTER, CLUSTER)}


def chain_of(domain, token, length, **options):
    """Make a disk of *length* volumes with data; returns image, volumes base first, and what it reads."""
    image, volume = new_disk(domain, token, **options)
    expected = {}
    volumes = [volume]
    scribble(domain, volume, 1, expected)
    for number in range(1, length):
        volumes.append(sn.create_snapshot(token, domain, image, ctime=CTIME))
        scribble(domain, volumes[-1], number + 1, expected)
    return image, volumes, full(expected)


def clean(domain, image):
    return ig.findings(ig.ImageGroup.load(domain, image)) == [] and domain.leftovers() == [] and domain.notes() == {}


def test_a_snapshot_keeps_what_was_and_the_leaf_takes_what_comes(make_domain, token):
    domain = make_domain()
    image, volumes, expected = chain_of(domain, token, 3)
    group = ig.ImageGroup.load(domain, image)
    assert group.chain() == volumes[::-1] and group.leaf() == volumes[-1]
    assert reads(domain, volumes[-1]) == expected != reads(domain, volumes[0])
    assert [domain.record(volume).voltype for volume in volumes] == ["INTERNAL", "INTERNAL", "LEAF"]
    assert clean(domain, image)


def test_preview_undo_and_commit(make_domain, token):
    domain = make_domain()
    image, volumes, expected = chain_of(domain, token, 3)
    before = reads(domain, volumes[0])
    look = sn.preview(token, domain, image, volumes[0], ctime=CTIME)
    assert reads(domain, look) == before
    assert ig.ImageGroup.load(domain, image).leaves() == sorted([look, volumes[2]])
    for refused in (
        lambda: sn.preview(token, domain, image, volumes[0], ctime=CTIME),
        lambda: sn.create_snapshot(token, domain, image, ctime=CTIME),
        lambda: sn.undo_preview(token, domain, image, volumes[0]),
    ):
        with pytest.raises(Illegal):
            refused()
    sn.undo_preview(token, domain, image, look)
    assert reads(domain, volumes[2]) == expected and clean(domain, image)
    look = sn.preview(token, domain, image, volumes[0], ctime=CTIME)
    assert set(sn.commit_preview(token, domain, image, look)) == set(volumes[1:])
    assert ig.ImageGroup.load(domain, image).chain() == [look, volumes[0]]
    assert reads(domain, look) == before and clean(domain, image)
    with pytest.raises(Illegal):
        sn.preview(token, domain, image, look, ctime=CTIME)


@pytest.mark.parametrize(("length", "position"), [(2, 1), (3, 2), (4, 1), (4, 2)])
@pytest.mark.parametrize("options", [{"format": "RAW", "type": "PREALLOCATED"}, {"format": "COW"}], ids=["raw", "cow"])
def test_op03_op04_op07_merge_keeps_the_disk_and_shortens_its_chain(make_domain, token, length, position, options):
    domain = make_domain()
    image, volumes, expected = chain_of(domain, token, length, **options)
    records = {volume: domain.record(volume) for volume in volumes}
    base = volumes[position - 1]
    assert mg.merge(token, domain, image, volumes[position]) == base
    left = [volume for volume in volumes if volume != volumes[position]]
    group = ig.ImageGroup.load(domain, image)
    assert group.chain() == left[::-1]
    assert reads(domain, left[-1]) == expected
    record = domain.record(base)
    assert (record.legality, record.generation, record.voltype) == (
        "LEGAL",
        1,
        "LEAF" if position == length - 1 else "INTERNAL",
    )
    # Of the others only the parent of what stood on the merged one is another.
    for volume in set(left) - {base}:
        child = volume == (volumes[position + 1] if position + 1 < length else None)
        assert domain.record(volume) == (records[volume]._replace(parent=base) if child else records[volume])
    assert clean(domain, image)


def test_op02_merge_raises_the_capacity_of_a_smaller_base(make_domain, token):
    domain = make_domain()
    image, base = new_disk(domain, token)
    expected = {}
    scribble(domain, base, 1, expected)
    top = sn.create_snapshot(token, domain, image, capacity=2 * SIZE, ctime=CTIME)
    mg.merge(token, domain, image, top)
    assert domain.record(base).capacity == 2 * SIZE
    with vol.open_image(domain, base) as grown:
        assert grown.size == 2 * SIZE
        assert grown.pread(CLUSTER, 2 * SIZE - CLUSTER) == bytes(CLUSTER)
    assert clean(domain, image)


@pytest.mark.real("lvm", "losetup", "mke2fs")
def test_a_raw_logical_volume_that_grows_by_merge_shows_no_old_data(block_domain, token):
    domain = block_domain()
    old_image, old = new_disk(domain, token, format="RAW", type="PREALLOCATED", capacity=4 * SIZE)
    with vol.open_image(domain, old, writable=True) as image:
        for at in range(0, 4 * SIZE, 32 * MIB):
            image.pwrite(b"secret" * 1000, at)
    vol.remove_volumes(token, domain, old_image, [old])
    image, base = new_disk(domain, token, format="RAW", type="PREALLOCATED")
    top = sn.create_snapshot(token, domain, image, capacity=3 * SIZE, ctime=CTIME)
    mg.merge(token, domain, image, top)
    with vol.open_image(domain, base) as grown:
        assert grown.size == 3 * SIZE
        assert not any(any(grown.pread(8192, at)) for at in range(SIZE, 3 * SIZE, 32 * MIB))


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("options", [{"format": "RAW", "type": "PREALLOCATED"}, {"format": "COW"}], ids=["raw", "cow"])
def test_a_merge_by_renames_keeps_the_disk_the_name_of_the_child_and_its_lease(make_domain, token, position, options):
    """VDSM of 2019 left the lease of the merged volume under another name; ours stays."""
    domain = make_domain(3)
    image, volumes, expected = chain_of(domain, token, 3, **options)
    top = volumes[position + 1]
    assert ms.merge_by_swap(token, domain, image, volumes[position]) == top
    left = [volume for volume in volumes if volume != volumes[position]]
    assert ig.ImageGroup.load(domain, image).chain() == left[::-1]
    assert reads(domain, left[-1]) == expected
    record = domain.record(top)
    assert (record.legality, record.generation) == ("LEGAL", 1)
    assert record.format == (options["format"] if position == 0 else "COW")
    assert domain.lease_leader(top).resource_name == top
    assert clean(domain, image)


def test_a_merge_by_renames_of_a_larger_child_and_over_a_template(make_domain, token):
    domain = make_domain()
    _, template = new_disk(domain, token)
    vol.update_volume(token, domain, template, role="SHARED")
    image, base = new_disk(domain, token, parent=template)
    expected = {}
    scribble(domain, base, 1, expected)
    top = sn.create_snapshot(token, domain, image, capacity=2 * SIZE, ctime=CTIME)
    scribble(domain, top, 2, expected)
    ms.merge_by_swap(token, domain, image, base)
    assert ig.ImageGroup.load(domain, image).chain() == [top, template]
    assert reads(domain, top) == full(expected) and clean(domain, image)
    with vol.open_image(domain, top) as grown:
        assert grown.size == 2 * SIZE and grown.pread(CLUSTER, 2 * SIZE - CLUSTER) == bytes(CLUSTER)


def test_a_merge_by_renames_that_fails_is_taken_back(file_domain, token, monkeypatch):
    domain = file_domain()
    image, volumes, expected = chain_of(domain, token, 3)

    def fail(*arguments, **options):
        raise OSError

    monkeypatch.setattr(ms, "copy_disk", fail)
    with pytest.raises(OSError):
        ms.merge_by_swap(token, domain, image, volumes[0])
    assert ig.ImageGroup.load(domain, image).chain() == volumes[::-1]
    assert reads(domain, volumes[2]) == expected and clean(domain, image)


@pytest.mark.real("lvm", "losetup", "mke2fs")
@pytest.mark.parametrize("position", [0, 1])
def test_a_merge_by_renames_on_a_v1_volume_group_moves_the_record_with_the_volume(block_domain, token, position):
    """The slot of a V1 volume is its place on the device, and the merged one has another."""
    domain = block_domain(0)
    image, volumes, expected = chain_of(domain, token, 3)
    top = volumes[position + 1]
    before, slot = domain.record(top), domain.slot_of(top)
    assert ms.merge_by_swap(token, domain, image, volumes[position]) == top
    left = [volume for volume in volumes if volume != volumes[position]]
    assert ig.ImageGroup.load(domain, image).chain() == left[::-1]
    parent = volumes[0] if position else before.parent.replace(volumes[0], "00000000-0000-0000-0000-000000000000")
    assert domain.record(top) == before._replace(parent=parent, generation=1)
    assert domain.slot_of(top) != slot and not any(tag.startswith("MD_") for tag in domain.state.lv(top).tags)
    with domain.special("metadata") as storage:
        old = bytearray(512)
        storage.read_into(slot * 512, [old])
    assert not any(old)
    assert domain.state.lv(top).writable is (position == 1)
    assert reads(domain, left[-1]) == expected and clean(domain, image)


@pytest.mark.real("lvm", "losetup", "mke2fs")
def test_a_twin_outside_of_the_mapping_is_refused_on_v1(block_domain, token, monkeypatch):
    domain = block_domain(0)
    image, volumes, expected = chain_of(domain, token, 2)
    real = domain.place_slot
    monkeypatch.setattr(domain, "place_slot", lambda lv: None if lv.name.endswith("_MERGE") else real(lv))
    with pytest.raises(MetadataError, match="no slot"):
        ms.merge_by_swap(token, domain, image, volumes[0])
    assert reads(domain, volumes[1]) == expected and clean(domain, image)


def test_a_merge_by_renames_is_refused_for_a_leaf_and_two_children(file_domain, token):
    domain = file_domain(0)
    image, volumes, _ = chain_of(domain, token, 2)
    with pytest.raises(Illegal, match="0 children"):
        ms.merge_by_swap(token, domain, image, volumes[1])
    with pytest.raises(NotFound):
        ms.merge_by_swap(token, domain, image, make_id())
    sn.preview(token, domain, image, volumes[0], ctime=CTIME)
    with pytest.raises(Illegal, match="2 children"):
        ms.merge_by_swap(token, domain, image, volumes[0])


@pytest.mark.real("lvm", "losetup", "mke2fs")
def test_a_merged_volume_has_the_size_that_its_data_need(block_domain, token):
    domain = block_domain()
    image, volumes, _ = chain_of(domain, token, 3, capacity=20 << 30)
    ms.merge_by_swap(token, domain, image, volumes[0])
    assert [domain.size_of(volume) for volume in volumes[1:]] == [128 * MIB, 2560 * MIB]
    ms.merge_by_swap(token, domain, image, volumes[1])
    assert domain.size_of(volumes[2]) == (128 + 2560) * MIB


def test_twins_without_a_note_are_leftovers(make_domain, token):
    domain = make_domain()
    image, volumes, _ = chain_of(domain, token, 1)
    make_twin(token, domain, volumes[0], 1)
    assert [left.kind for left in domain.leftovers()] == ["unfinished merge"]
    domain.sweep(token, domain.leftovers())
    assert clean(domain, image)


@pytest.mark.real("lvm", "losetup", "mke2fs")
def test_op02_room_is_made_in_the_base_before_anything_else_is_changed(block_domain, token, runner):
    domain = block_domain()
    image, volumes, expected = chain_of(domain, token, 3, capacity=10 << 30)
    with vol.open_image(domain, volumes[1], writable=True, allow_illegal=True) as middle:
        middle.pwrite(b"m" * (200 * MIB), 512 * MIB)
    domain.reduce(token, volumes[0], 128 * MIB)
    with vol.open_image(domain, volumes[1]) as merged:
        needed = measure(merged).required
    before = len(runner.runs)
    mg.merge(token, domain, image, volumes[1])
    grown, *later = [argv for argv in runner.runs[before:] if argv[0] == "lvm" and argv[1] != "fullreport"]
    assert grown[1] == "lvextend" and grown[-1] == f"{domain.uuid}/{volumes[0]}"
    mib = int(grown[grown.index("--size") + 1].removesuffix("m"))
    # An internal volume gets what both hold, without a chunk more.
    assert 0 <= mib * MIB - needed < 2 * MIB and "lvextend" not in [argv[1] for argv in later]
    assert domain.size_of(volumes[0]) == -(-needed // SIZE) * SIZE
    assert reads(domain, volumes[2]) == expected and clean(domain, image)


@pytest.mark.real("lvm", "losetup", "mke2fs")
@pytest.mark.parametrize("error", [Busy("in use"), LvmError("lvm lvreduce: no")], ids=["busy", "lvm"])
def test_op06_a_base_that_cannot_be_shrunk_keeps_the_merge(block_domain, token, monkeypatch, error):
    domain = block_domain()
    image, volumes, expected = chain_of(domain, token, 3, capacity=6 << 30)

    def refuse(*arguments, **options):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(domain, "reduce", refuse)
        mg.merge(token, domain, image, volumes[1])
    assert ig.ImageGroup.load(domain, image).chain() == [volumes[2], volumes[0]]
    assert domain.size_of(volumes[0]) == 2560 * MIB and domain.record(volumes[0]).legality == "LEGAL"
    assert reads(domain, volumes[2]) == expected and clean(domain, image)


@pytest.mark.real("lvm", "losetup", "mke2fs")
def test_op06_a_preallocated_base_is_not_shrunk(block_domain, token):
    domain = block_domain()
    image, volumes, expected = chain_of(domain, token, 3, type="PREALLOCATED", capacity=3 * SIZE)
    before = domain.size_of(volumes[0])
    mg.merge(token, domain, image, volumes[1])
    assert domain.size_of(volumes[0]) == before >= 3 * SIZE
    assert reads(domain, volumes[2]) == expected and clean(domain, image)


@pytest.mark.real("lvm", "losetup", "mke2fs")
def test_op06_an_internal_base_is_shrunk_and_a_leaf_is_not(block_domain, token):
    domain = block_domain()
    image, volumes, _ = chain_of(domain, token, 3, capacity=6 << 30)
    sizes = [domain.size_of(volume) for volume in volumes]
    assert sizes == [2560 * MIB] * 3
    mg.merge(token, domain, image, volumes[1])
    assert domain.size_of(volumes[0]) == 128 * MIB
    mg.merge(token, domain, image, volumes[2])
    assert domain.size_of(volumes[0]) == (128 + 2560) * MIB


def test_op01_what_may_not_be_merged_is_refused_before_any_change(make_domain, token):
    domain = make_domain()
    image, volumes, expected = chain_of(domain, token, 3)

    def everything():
        return domain.entries(), {volume: domain.read_record(volume) for volume in domain.entries()}, domain.notes()

    before = everything()
    with pytest.raises(Illegal, match="no parent"):
        mg.merge(token, domain, image, volumes[0])
    with pytest.raises(NotFound):
        mg.merge(token, domain, image, make_id())
    look = sn.preview(token, domain, image, volumes[0], ctime=CTIME)
    with pytest.raises(Illegal, match="other children"):
        mg.merge(token, domain, image, volumes[1])
    sn.undo_preview(token, domain, image, look)
    assert everything() == before
    for bad in volumes:
        # Whichever of the chain it is.
        domain.write_record(token, bad, domain.record(bad)._replace(legality="ILLEGAL"))
        told = everything()
        with pytest.raises(Illegal, match="is ILLEGAL"):
            mg.merge(token, domain, image, volumes[1])
        assert everything() == told
        domain.write_record(token, bad, domain.record(bad)._replace(legality="LEGAL"))
    assert everything() == before
    assert reads(domain, volumes[2]) == expected


def test_op01_a_template_is_no_base_of_a_merge(file_domain, token):
    domain = file_domain()
    _, template = new_disk(domain, token)
    vol.update_volume(token, domain, template, role="SHARED")
    image, _ = new_disk(domain, token, parent=template)
    leaf = ig.ImageGroup.load(domain, image).leaf()
    with pytest.raises(Illegal, match="template"):
        mg.merge(token, domain, image, leaf)


@pytest.mark.parametrize("position", [1, 2])
@pytest.mark.parametrize("version", [0, 5])
def test_op21_a_merge_cut_at_every_step_is_ended_by_recovery(file_domain, token, version, position):
    """The disk reads the same after each cut, before and after recovery."""
    at = 0
    while True:
        domain = file_domain(version, "LOCALFS")
        image, volumes, expected = chain_of(domain, token, 3)
        dying = KillingDomain(domain, at)
        try:
            mg.merge(token, dying, image, volumes[position])
        except Killed:
            domain.refresh()
        else:
            break
        present = [volume for volume in volumes if volume in domain.entries() and not domain.entries()[volume].removed]
        assert reads(domain, present[-1]) == expected, at
        noted = bool(domain.notes())
        with contextlib.suppress(Killed):
            # Recovery may be cut too.
            mg.recover_merges(token, KillingDomain(domain, at % 5))
        mg.recover_merges(token, domain)
        assert mg.recover_merges(token, domain) == []
        left = volumes if not noted else [volume for volume in volumes if volume != volumes[position]]
        assert ig.ImageGroup.load(domain, image).chain() == left[::-1]
        assert reads(domain, left[-1]) == expected and clean(domain, image), at
        at += 1
    assert at > 8


@pytest.mark.real("lvm", "losetup", "mke2fs")
@pytest.mark.parametrize("at", [2, 5, 7, 9, 11])
def test_op21_a_merge_on_a_volume_group_cut_at_a_step_is_ended_by_recovery(block_domain, token, at):
    domain = block_domain()
    image, volumes, expected = chain_of(domain, token, 3)
    with pytest.raises(Killed):
        mg.merge(token, KillingDomain(domain, at), image, volumes[1])
    domain.refresh()
    assert reads(domain, volumes[2]) == expected
    assert mg.recover_merges(token, domain) == [volumes[0]]
    assert ig.ImageGroup.load(domain, image).chain() == [volumes[2], volumes[0]]
    assert reads(domain, volumes[2]) == expected and clean(domain, image)


def test_op21_a_snapshot_cut_at_every_step_leaves_the_disk_and_sweepable_leftovers(make_domain, token):
    domain = make_domain()
    image, base = new_disk(domain, token)
    expected = {}
    scribble(domain, base, 3, expected)
    at = 0
    while True:
        try:
            sn.create_snapshot(token, KillingDomain(domain, at), image, ctime=CTIME)
        except Killed:
            pass
        else:
            break
        domain = type(domain).open(domain.lvm, domain.uuid) if domain.block else domain
        domain.refresh()
        assert reads(domain, base) == full(expected)
        domain.sweep(token, domain.leftovers())
        group = ig.ImageGroup.load(domain, image)
        ig.repair(token, domain, ig.findings(group))
        assert clean(domain, image) and domain.record(base).voltype == "LEAF", at
        at += 1
    assert at >= 4


def test_findings_name_and_mend_a_parent_that_records_have_wrong(make_domain, token):
    domain = make_domain()
    image, volumes, _ = chain_of(domain, token, 3)
    record = domain.record(volumes[2])
    domain.write_record(token, volumes[2], record._replace(parent=volumes[0]))
    (first, *_) = found = ig.findings(ig.ImageGroup.load(domain, image))
    assert any(finding.repair == "set parent" and finding.value == volumes[1] for finding in found), first
    ig.repair(token, domain, found)
    ig.repair(token, domain, ig.findings(ig.ImageGroup.load(domain, image)))
    assert clean(domain, image) and domain.record(volumes[2]) == record


def test_a_cycle_of_records_is_named_and_not_followed(make_domain, token):
    domain = make_domain()
    image, volumes, _ = chain_of(domain, token, 3)
    domain.write_record(token, volumes[0], domain.record(volumes[0])._replace(parent=volumes[1]))
    group = ig.ImageGroup.load(domain, image)
    with pytest.raises(MetadataError, match="circle"):
        group.chain(volumes[2])
    assert any("circle" in finding.text for finding in ig.findings(group))


def test_a_missing_parent_and_a_damaged_record_are_named(file_domain, token):
    domain = file_domain()
    image, volumes, _ = chain_of(domain, token, 2)
    domain.write_record(token, volumes[1], domain.record(volumes[1])._replace(parent=make_id()))
    texts = [finding.text for finding in ig.findings(ig.ImageGroup.load(domain, image))]
    assert any("is missing" in text for text in texts) and any("breaks at" in text for text in texts)
    with pytest.raises(NotFound):
        ig.ImageGroup.load(domain, make_id())


@pytest.mark.real("qemu-img")
@pytest.mark.parametrize("version", [3, 5])
def test_qemu_reads_a_merged_chain_as_we_do(file_domain, token, tmp_path, version):
    domain = file_domain(version)
    image, volumes, expected = chain_of(domain, token, 4)
    mg.merge(token, domain, image, volumes[1])
    mg.merge(token, domain, image, volumes[2])
    leaf = domain.path_of(volumes[3])
    told = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", leaf]))
    assert (told["backing-filename"], told["backing-filename-format"]) == (volumes[0], "qcow2")
    for volume in (volumes[0], volumes[3]):
        subprocess.run(["qemu-img", "check", "-q", domain.path_of(volume)], check=True)
    flat = tmp_path / "flat"
    subprocess.run(["qemu-img", "convert", "-O", "raw", leaf, flat], check=True)
    with flat.open("rb") as file:
        for at, data in expected.items():
            file.seek(at)
            assert file.read(CLUSTER) == data
