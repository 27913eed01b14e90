# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Copies of disks between domains of both kinds, templates, larger disks."""

import pytest

from storage_pool import image_group as ig
from storage_pool import snapshot as sn
from storage_pool import transfer as tr
from storage_pool import volume as vol
from storage_pool.check import check_domain
from storage_pool.errors import Illegal, IllegalSpec
from storage_pool.ids import make_id

MIB = 1 << 20
SIZE = 64 * MIB
CTIME = 1617235200

pytestmark = pytest.mark.real("lvm", "losetup", "mke2fs")


@pytest.fixture
def pair(request, file_domain, block_domain):
    """Make two domains of the wanted kinds."""

    def make(kinds, version=5):
        made = {"file": file_domain, "block": block_domain}
        return [made[kind](version) for kind in kinds.split("-")]

    return make


def disk(domain, token, length=2, **options):
    image, volume = make_id(), make_id()
    vol.create_volume(token, domain, vol.VolumeSpec(image, volume, **{"capacity": SIZE, **options}), CTIME)
    for number in range(length):
        if number:
            volume = sn.create_snapshot(token, domain, image, ctime=CTIME)
        with vol.open_image(domain, volume, writable=True) as opened:
            opened.pwrite(b"%d" % number * 100000, number * 50000 + 7)
            opened.zero(4096, 65536 * (number + 3))
    return image, volume


def content(domain, volume):
    with vol.open_image(domain, volume) as opened:
        return opened.pread(1 << 20, 0), opened.pread(4096, SIZE - 4096), opened.size


@pytest.mark.parametrize("kinds", ["file-file", "file-block", "block-file", "block-block"])
@pytest.mark.parametrize("options", [{"format": "RAW", "type": "PREALLOCATED"}, {}], ids=["raw", "cow"])
def test_op09_a_chain_is_copied_between_domains_of_any_two_kinds(pair, token, kinds, options):
    source, target = pair(kinds)
    if source.uuid == target.uuid:
        target = source
    image, leaf = disk(source, token, **options)
    before = content(source, leaf)
    made = tr.copy_image(token, source, image, target, ctime=CTIME)
    group = ig.ImageGroup.load(target, made)
    assert (made == image) == (source is not target)
    assert content(target, group.leaf())[:2] == before[:2]
    assert [record.generation for record in group.records.values()] == [1, 1]
    assert ig.findings(group) == [] and target.leftovers() == []


def recorded(domain, volume, name):
    with vol.open_image(domain, volume, backing=False) as opened:
        return [tuple(extent)[:2] for extent in opened.bitmap_extents(name)]


@pytest.mark.parametrize("kinds", ["file-file", "file-block"])
def test_op09_bitmaps_of_a_chain_are_copied_with_it_and_none_below_v4(pair, token, kinds):
    source, target = pair(kinds)
    image, base = disk(source, token, 1)
    with vol.open_image(source, base, writable=True) as opened:
        opened.add_bitmap("old", 65536)
        opened.add_bitmap("off", 65536, disabled=True)
        opened.pwrite(b"x" * 1000, 20 * MIB)
    leaf = sn.create_snapshot(token, source, image, ctime=CTIME, copy_bitmaps=True)
    with vol.open_image(source, leaf, writable=True) as opened:
        opened.pwrite(b"y" * 1000, 30 * MIB)
    tr.copy_image(token, source, image, target, ctime=CTIME)
    for volume in (base, leaf):
        with (
            vol.open_image(target, volume, backing=False) as copied,
            vol.open_image(source, volume, backing=False) as was,
        ):
            assert copied.bitmaps() == was.bitmaps()
        assert recorded(target, volume, "old") == recorded(source, volume, "old") != []
    assert ig.findings(ig.ImageGroup.load(target, image)) == []
    old = pair("file-file", 3)[0]
    tr.copy_image(token, source, image, old, ctime=CTIME)
    with vol.open_image(old, leaf, backing=False) as opened:
        assert opened.bitmaps() == []


def test_op12_a_copy_on_block_storage_has_room_for_its_data_not_for_the_volume_it_comes_from(
    file_domain, block_domain, token
):
    source, target = file_domain(), block_domain()
    image, base = make_id(), make_id()
    vol.create_volume(token, source, vol.VolumeSpec(image, base, 4096 * MIB), CTIME)
    with vol.open_image(source, base, writable=True) as opened:
        # Written and given up: the file is long, what is copied is not.
        for start in range(0, 512 * MIB, 64 * MIB):
            opened.pwrite(b"x" * MIB, start)
        opened.zero(512 * MIB, 0)
        opened.pwrite(b"y" * MIB, 0)
    leaf = sn.create_snapshot(token, source, image, ctime=CTIME)
    tr.copy_image(token, source, image, target, ctime=CTIME)
    assert target.size_of(base) == 128 * MIB
    assert target.size_of(leaf) == 2944 * MIB  # A chunk of 2560 MiB, 1.1 times, in extents of 128.
    made, flat = tr.collapse(token, source, image, target, ctime=CTIME)
    assert target.size_of(flat) == 2944 * MIB
    again = tr.copy_image(token, target, made, target, ctime=CTIME)
    assert target.size_of(ig.ImageGroup.load(target, again).leaf()) == 2944 * MIB


def test_a_preview_is_not_copied(file_domain, token):
    domain = file_domain()
    image, _ = disk(domain, token)
    base = ig.ImageGroup.load(domain, image).chain()[-1]
    look = sn.preview(token, domain, image, base, ctime=CTIME)
    for call in (tr.copy_image, tr.collapse):
        with pytest.raises(Illegal, match="is previewed"):
            call(token, domain, image, domain, ctime=CTIME)
    # One of the two can be made a disk of its own.
    made, _ = tr.collapse(token, domain, image, domain, leaf=look, ctime=CTIME)
    assert content(domain, ig.ImageGroup.load(domain, made).leaf()) == content(domain, look)


@pytest.mark.parametrize("kinds", ["file-file", "file-block", "block-file"])
@pytest.mark.parametrize("fmt", ["RAW", "COW"])
def test_op09_a_chain_is_collapsed_into_one_volume(pair, token, kinds, fmt):
    source, target = pair(kinds)
    image, leaf = disk(source, token, 3)
    kind = "PREALLOCATED" if fmt == "RAW" else "SPARSE"
    seen = []
    new_image, volume = tr.collapse(
        token, source, image, target, ctime=CTIME, fmt=fmt, kind=kind, progress=lambda *told: seen.append(told)
    )
    assert content(target, volume)[:2] == content(source, leaf)[:2]
    assert ig.ImageGroup.load(target, new_image).chain() == [volume]
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] > 100000


def test_a_raw_logical_volume_made_by_copy_shows_no_old_data(file_domain, block_domain, token):
    source, target = file_domain(), block_domain()
    old_image, old = disk(target, token, 1, format="RAW", type="PREALLOCATED", capacity=128 * MIB)
    with vol.open_image(target, old, writable=True) as opened:
        for at in range(0, 128 * MIB, 4 * MIB):
            opened.pwrite(b"secret" * 1000, at)
    vol.remove_volumes(token, target, old_image, [old])
    image, _ = disk(source, token, 1)
    _, volume = tr.collapse(token, source, image, target, ctime=CTIME, fmt="RAW", kind="PREALLOCATED")
    with vol.open_image(target, volume) as opened:
        assert not any(b"secret" in opened.pread(8192, at) for at in range(0, 128 * MIB, 4 * MIB))


@pytest.mark.parametrize("kinds", ["file-file", "file-block", "block-file"])
def test_op10_a_copy_that_fails_leaves_nothing(pair, token, kinds):
    source, target = pair(kinds)
    image, leaf = disk(source, token)
    records = {volume: source.read_record(volume) for volume in source.entries()}

    def fail(done, total):
        # Not before something of it is there.
        if done:
            raise RuntimeError

    for call in (tr.copy_image, tr.collapse):
        with pytest.raises(RuntimeError):
            call(token, source, image, target, ctime=CTIME, progress=fail)
        assert target.entries() == {} and target.leftovers() == []
        assert {volume: source.read_record(volume) for volume in source.entries()} == records
    assert check_domain(source).clean and content(source, leaf)


def test_op10_an_illegal_source_is_refused(file_domain, token):
    source = file_domain()
    image, leaf = disk(source, token)
    vol.update_volume(token, source, leaf, legality="ILLEGAL")
    for call in (tr.copy_image, tr.collapse):
        with pytest.raises(Illegal):
            call(token, source, image, source, ctime=CTIME)


def test_a_template_with_thin_disks_and_a_clone(make_domain, token):
    domain = make_domain()
    image, leaf = disk(domain, token)
    before = content(domain, leaf)
    own, template = tr.make_template(token, domain, image, domain, ctime=CTIME, description="template")
    assert domain.record(template).voltype == "SHARED" and domain.record(template).description == "template"
    thin = vol.VolumeSpec(make_id(), make_id(), SIZE, parent=template)
    vol.create_volume(token, domain, thin, CTIME)
    with vol.open_image(domain, thin.volume, writable=True) as opened:
        opened.pwrite(b"thin", 0)
    assert content(domain, template) == before
    with pytest.raises(Illegal):
        vol.open_image(domain, template, writable=True)
    with pytest.raises(Illegal):
        vol.remove_volumes(token, domain, own, [template])
    copied = tr.copy_image(token, domain, thin.image, domain, ctime=CTIME)
    assert ig.ImageGroup.load(domain, copied).chain()[1:] == [template]
    _, clone = tr.collapse(token, domain, own, domain, ctime=CTIME, leaf=template)
    assert content(domain, clone) == before


@pytest.mark.parametrize("options", [{"format": "RAW", "type": "PREALLOCATED"}, {}], ids=["raw", "cow"])
def test_a_disk_is_made_larger_and_reads_zeros_there(make_domain, token, options):
    domain = make_domain()
    _, volume = disk(domain, token, 1, **options)
    record = vol.extend_capacity(token, domain, volume, 300 * MIB)
    assert record.capacity == (384 * MIB if domain.block and options else 300 * MIB)
    with vol.open_image(domain, volume) as opened:
        assert opened.size == record.capacity
        assert opened.pread(4096, 299 * MIB) == bytes(4096)
    with pytest.raises(IllegalSpec):
        vol.extend_capacity(token, domain, volume, SIZE)


def test_vm13_a_capacity_below_the_image_is_mended_and_a_larger_one_left(file_domain, token):
    domain = file_domain()
    _, volume = disk(domain, token, 1)
    record = domain.record(volume)
    domain.write_record(token, volume, record._replace(capacity=0))
    assert vol.sync_capacity(token, domain, volume).capacity == SIZE
    domain.write_record(token, volume, record._replace(capacity=2 * SIZE))
    assert vol.sync_capacity(token, domain, volume).capacity == 2 * SIZE
    domain.write_record(token, volume, record._replace(capacity=0, voltype="SHARED"))
    assert vol.sync_capacity(token, domain, volume).capacity == 0
