# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Jobs on single volumes, bitmaps through merges, merges that fail, and legality."""

import pytest

from qcowlib.errors import StorageError, UsageError
from qcowlib.jobs.measure import measure
from storage_pool import image_group as ig
from storage_pool import merge as mg
from storage_pool import merge_swap as ms
from storage_pool import snapshot as sn
from storage_pool import volume as vol
from storage_pool import volume_jobs as jobs
from storage_pool.check import check_domain, mend
from storage_pool.copying import layers_size
from storage_pool.errors import Illegal, IllegalSpec, UnsupportedVersion
from storage_pool.ids import make_id
from storage_pool.sizes import copy_size

MIB = 1 << 20
SIZE = 16 * MIB
CTIME = 1617235200


def disk(domain, token, **options):
    spec = vol.VolumeSpec(make_id(), make_id(), **{"capacity": SIZE, **options})
    vol.create_volume(token, domain, spec, CTIME)
    return spec.image, spec.volume


def write(domain, volume, offset, data):
    with vol.open_image(domain, volume, writable=True) as image:
        image.pwrite(data, offset)


def bitmaps(domain, volume):
    with vol.open_image(domain, volume, backing=False) as image:
        return {one.name: list(image.bitmap_extents(one.name)) for one in image.bitmaps() if one.enabled}


def test_op13_amend_counts_a_generation_and_is_refused_below_v4(file_domain, token):
    domain = file_domain(5)
    _, volume = disk(domain, token)
    jobs.amend(token, domain, volume, "0.10", generation=0)
    with vol.open_image(domain, volume) as image:
        assert image.layers[0].header.version == 2
    jobs.amend(token, domain, volume, "1.1", generation=1)
    with vol.open_image(domain, volume) as image:
        assert image.layers[0].header.version == 3
    assert domain.record(volume)[9:12] == ("LEGAL", CTIME, 2)
    with pytest.raises(Illegal, match="generation"):
        jobs.amend(token, domain, volume, "0.10", generation=0)
    with pytest.raises(IllegalSpec):
        jobs.amend(token, domain, volume, "2.0")
    old = file_domain(3)
    _, volume = disk(old, token)
    with pytest.raises(UnsupportedVersion):
        jobs.amend(token, old, volume, "1.1")
    assert old.record(volume).generation == 0


def test_op13_bitmaps_are_added_cleared_and_removed_and_refused_below_v4(make_domain, token):
    domain = make_domain(4)
    _, volume = disk(domain, token)
    jobs.add_bitmap(token, domain, volume, "daily", generation=0)
    write(domain, volume, 3 * MIB, b"x" * 65536)
    assert bitmaps(domain, volume) == {"daily": [(3 * MIB, 65536)]}
    with pytest.raises(UsageError):
        jobs.add_bitmap(token, domain, volume, "daily", generation=1)
    # The job failed, so it does not count.
    jobs.clear_bitmap(token, domain, volume, "daily", generation=1)
    assert bitmaps(domain, volume) == {"daily": []}
    jobs.remove_bitmap(token, domain, volume, "daily", generation=2)
    assert bitmaps(domain, volume) == {} and domain.record(volume).generation == 3
    with pytest.raises(Illegal, match="generation"):
        jobs.add_bitmap(token, domain, volume, "daily", generation=9)


def test_op13_bitmaps_are_refused_below_v4_and_on_raw(file_domain, token):
    old, new = file_domain(3), file_domain(5)
    with pytest.raises(IllegalSpec):
        jobs.add_bitmap(token, old, disk(old, token)[1], "daily")
    with pytest.raises(Illegal):
        jobs.add_bitmap(token, new, disk(new, token, format="RAW")[1], "daily")


@pytest.mark.parametrize("renaming", [False, True], ids=["into base", "by renames"])
def test_op08_merge_adds_and_merges_valid_bitmaps_and_prunes_the_others(make_domain, token, renaming):
    domain = make_domain()
    image, base = disk(domain, token)
    jobs.add_bitmap(token, domain, base, "both")
    write(domain, base, 0, b"1" * 65536)
    jobs.add_bitmap(token, domain, base, "stale", enabled=False)
    # The snapshot has none of this name, so nothing recorded what was written to it.
    jobs.add_bitmap(token, domain, base, "below")
    top = sn.create_snapshot(token, domain, image, ctime=CTIME)
    for name in ("both", "new"):
        jobs.add_bitmap(token, domain, top, name)
    write(domain, top, MIB, b"2" * 65536)
    jobs.add_bitmap(token, domain, top, "off", enabled=False)
    if renaming:
        ms.merge_by_swap(token, domain, image, base)
    else:
        mg.merge(token, domain, image, top)
    found = bitmaps(domain, top if renaming else base)
    assert found["new"] == [(MIB, 65536)]
    assert found["both"] == [(0, 65536), (MIB, 65536)]
    # Merging into the base is itself recorded there; a new image has no such record and must not pretend to.
    assert found.pop("below", None) == (None if renaming else [(MIB, 65536)])
    assert set(found) == {"both", "new"}
    assert check_domain(domain).clean


def test_op05_a_rebase_that_fails_leaves_a_disk_that_recovery_ends(make_domain, token, monkeypatch):
    """Others are left with an ILLEGAL volume and two chains; here the note says how it goes on."""
    domain = make_domain()
    image, base = disk(domain, token)
    write(domain, base, 0, b"base")
    top = sn.create_snapshot(token, domain, image, ctime=CTIME)
    write(domain, top, 4096, b"top")
    leaf = sn.create_snapshot(token, domain, image, ctime=CTIME)

    def fail(*arguments):
        raise StorageError(5, path="image", operation="write")

    with monkeypatch.context() as patch:
        patch.setattr(mg, "set_parent_name", fail)
        for call in (lambda: mg.merge(token, domain, image, top), lambda: mg.recover_merges(token, domain)):
            with pytest.raises(StorageError):
                call()
            # Through the old chain everything is there.
            assert ig.ImageGroup.load(domain, image).chain() == [leaf, top, base]
            with vol.open_image(domain, leaf, allow_illegal=True) as opened:
                assert opened.pread(5, 0) == b"base\0" and opened.pread(3, 4096) == b"top"
    assert mend(token, domain).clean
    assert ig.ImageGroup.load(domain, image).chain() == [leaf, base]
    with vol.open_image(domain, leaf) as opened:
        assert opened.pread(5, 0) == b"base\0" and opened.pread(3, 4096) == b"top"


def test_op12_the_size_of_a_copy_is_that_of_its_data(file_domain, token):
    domain = file_domain()
    image, base = disk(domain, token, format="RAW")
    write(domain, base, 0, b"1" * 65536)
    top = sn.create_snapshot(token, domain, image, ctime=CTIME)
    write(domain, top, 32768, b"2" * 65536)
    with vol.open_image(domain, top) as opened:
        # Three clusters of 64 KiB: two of the upper volume, one of both.
        assert layers_size(opened, 1) == measure(SIZE).required + 2 * 65536
        assert layers_size(opened, 2) == measure(opened).required == measure(SIZE).required + 2 * 65536
    write(domain, top, 8 * MIB, b"3")
    with vol.open_image(domain, top) as opened:
        required = measure(opened).required
        assert layers_size(opened, 2) == required
    assert copy_size(required, SIZE, "COW", block=True, leaf=False) == required
    assert copy_size(required, SIZE, "COW", block=True, leaf=True) == 128 * MIB


def test_vm11_opening_an_illegal_volume_fails_unless_allowed(make_domain, token):
    domain = make_domain()
    image, base = disk(domain, token)
    leaf = sn.create_snapshot(token, domain, image, ctime=CTIME)
    vol.update_volume(token, domain, leaf, legality="ILLEGAL")
    for writable in (False, True):
        with pytest.raises(Illegal):
            vol.open_image(domain, leaf, writable=writable)
    with vol.open_image(domain, leaf, allow_illegal=True) as opened:
        assert opened.size == SIZE
    vol.update_volume(token, domain, leaf, legality="LEGAL")
    vol.update_volume(token, domain, base, legality="ILLEGAL")
    with pytest.raises(Illegal):
        vol.open_image(domain, leaf)


def test_zeros_of_a_leaf_are_given_back_and_it_reads_the_same(make_domain, token):
    domain = make_domain()
    image, volume = disk(domain, token)
    write(domain, volume, MIB, b"1" * 65536 + bytes(MIB) + b"2" * 65536)
    with vol.open_image(domain, volume) as opened:
        before = opened.pread(SIZE, 0)
    assert jobs.sparsify(token, domain, volume, generation=0) == MIB
    with vol.open_image(domain, volume) as opened:
        assert opened.pread(SIZE, 0) == before
        assert sum(extent.length for extent in opened.extents() if extent.kind == "data") == 2 * 65536
    assert domain.record(volume).generation == 1
    sn.create_snapshot(token, domain, image, ctime=CTIME)
    with pytest.raises(Illegal):
        jobs.sparsify(token, domain, volume)


@pytest.mark.real("lvm", "losetup", "mke2fs")
def test_a_logical_volume_is_reduced_to_its_optimal_size(block_domain, token):
    domain = block_domain()
    image, base = disk(domain, token, capacity=20 << 30, initial_size=6 << 30)
    write(domain, base, 0, b"data" * MIB)
    assert jobs.reduce_to_optimal(token, domain, base, generation=0) == (2560 + 128) * MIB
    leaf = sn.create_snapshot(token, domain, image, ctime=CTIME)
    assert jobs.reduce_to_optimal(token, domain, base) == 128 * MIB
    with vol.open_image(domain, leaf) as opened:
        assert opened.pread(4 * MIB, 0) == b"data" * MIB
    assert check_domain(domain).clean
    vol.update_volume(token, domain, leaf, legality="ILLEGAL")
    with pytest.raises(Illegal):
        jobs.reduce_to_optimal(token, domain, leaf)
