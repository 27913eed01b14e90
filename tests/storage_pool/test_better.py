# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Where other hosts do what hurts their users, and this package does not."""

import io
import os
from contextlib import closing

import pytest

import storage_pool
from qcowlib.errors import Busy, Error
from qcowlib.qcow2.header_update import set_backing
from storage_pool import check, layout, transfer
from storage_pool import merge as mg
from storage_pool import snapshot as sn
from storage_pool import volume as vol
from storage_pool.errors import Illegal, MetadataError, NoSpace
from storage_pool.ids import BLANK, make_id
from storage_pool.lease_records import resource_area, write_area
from storage_pool.opening import backing_of

MIB = 1 << 20
SIZE = 4 * MIB
CTIME = 1617235200
LVM = pytest.mark.real("lvm", "losetup", "mke2fs")


def disk(domain, token, length=1, **options):
    spec = vol.VolumeSpec(make_id(), make_id(), **{"capacity": SIZE, **options})
    vol.create_volume(token, domain, spec, CTIME)
    volumes = [spec.volume]
    for _ in range(length - 1):
        volumes.append(sn.create_snapshot(token, domain, spec.image, ctime=CTIME))
    return spec.image, volumes


@LVM
@pytest.mark.parametrize("version", [3, 5])
def test_q06_the_slot_of_a_removed_volume_keeps_nothing(block_domain, token, version):
    domain = block_domain(version)
    image, volumes = disk(domain, token)
    offset = layout.slot_offset(domain.slot_of(volumes[0]), version)
    vol.remove_volumes(token, domain, image, volumes)
    data = bytearray(512)
    with domain.special("metadata") as storage:
        storage.read_into(offset, [data])
    assert not any(data)


def test_q04_a_role_that_is_right_is_not_written_again(make_domain, token, monkeypatch):
    domain = make_domain()
    _, volumes = disk(domain, token, 2)
    monkeypatch.setattr(domain, "write_record", None)
    for volume in volumes:
        vol.recheck_role(token, domain, volume)


def test_q05_a_record_is_durable_before_and_after_its_name_is(file_domain, token, monkeypatch):
    domain = file_domain()
    _, volumes = disk(domain, token)
    done = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))  # noqa: PTH115
    monkeypatch.setattr(os, "rename", lambda *a, **o: (done.append("rename"), rename(*a, **o)))
    vol.update_volume(token, domain, volumes[0], description="new")
    new, renamed, folder = done
    assert new.endswith(".meta.new") and renamed == "rename" and folder == os.path.dirname(new)


@pytest.mark.parametrize("damaged", [0, 1], ids=["own", "child"])
def test_a_damaged_record_does_not_free_what_a_child_stands_on(file_domain, token, damaged):
    domain = file_domain()
    image, volumes = disk(domain, token, 2)
    other = vol.VolumeSpec(image, make_id(), capacity=SIZE, format="RAW")
    vol.create_volume(token, domain, other, CTIME)
    for volume in (volumes[damaged], other.volume):
        with open(f"{domain.path_of(volume)}.meta", "wb") as record:
            record.write(b"no record")
    domain.refresh()
    with pytest.raises(Illegal, match="has children"):
        vol.remove_volumes(token, domain, image, volumes[:1])
    vol.remove_volumes(token, domain, image, [other.volume])
    vol.remove_volumes(token, domain, image, volumes)
    assert not domain.entries()


def test_backing_names_do_not_grow_with_merges(make_domain, token):
    domain = make_domain()
    image, volumes = disk(domain, token, 6)
    for volume in volumes[1:-1]:
        mg.merge(token, domain, image, volume)
    storage = domain.open_volume(volumes[-1])
    assert backing_of(storage)[0] == volumes[0]
    storage.close()


@pytest.mark.parametrize("kind", ["file", pytest.param("block", marks=LVM)])
def test_p07_a_lease_under_the_name_of_an_old_merge_is_found_and_written_anew(request, token, kind):
    domain = request.getfixturevalue(f"{kind}_domain")(3)
    _, volumes = disk(domain, token)
    view = domain.metadata
    wrong = resource_area(view.uuid, f"{volumes[0]}_MERGE", block_size=view.block_size, alignment=view.alignment)
    if domain.block:
        with domain.special("leases", writable=True) as storage:
            write_area(storage, layout.lease_offset(domain.slot_of(volumes[0]), view.alignment), wrong)
    else:
        with domain.root.open(
            os.path.relpath(domain.path_of(volumes[0]) + ".lease", domain.name), writable=True
        ) as area:
            write_area(area, 0, wrong)
    (finding,) = check.check_domain(domain).findings
    assert "_MERGE" in finding.text and finding.repair == "write lease"
    assert check.mend(token, domain).clean
    assert domain.lease_leader(volumes[0]).resource_name == volumes[0]


@LVM
def test_p01_a_merge_without_room_is_refused_before_any_change(block_domain, token):
    domain = block_domain()
    image, volumes = disk(domain, token, 3, capacity=10 << 30)
    with vol.open_image(domain, volumes[1], writable=True) as opened:
        opened.pwrite(b"x" * 200 * MIB, 0)
    domain.reduce(token, volumes[0], 128 * MIB)
    filler = domain.state.vg.free
    disk(domain, token, capacity=filler, format="RAW", type="PREALLOCATED")
    assert domain.state.vg.free == 0
    before = {volume: domain.read_record(volume) for volume in volumes}
    with pytest.raises(NoSpace):
        mg.merge(token, domain, image, volumes[1])
    assert {volume: domain.read_record(volume) for volume in volumes} == before
    assert check.check_domain(domain).clean


@LVM
def test_extents_and_a_device_node_show_the_same_bytes(block_domain, token, runner):
    """A loop device on the one segment stands for the node that a device mapper would make."""
    domain = block_domain()
    _, volumes = disk(domain, token, format="RAW", type="PREALLOCATED", capacity=128 * MIB)
    (place,) = domain.state.placements(volumes[0])
    window = ["--offset", str(place.offset), "--sizelimit", str(place.size)]
    device = runner.run(["losetup", "--find", "--show", *window, place.device]).stdout.decode().strip()
    try:
        with vol.open_image(domain, volumes[0], writable=True) as image:
            image.pwrite(b"by extents", 5 * MIB)
        with open(device, "r+b", buffering=0) as node:
            node.seek(5 * MIB)
            assert node.read(10) == b"by extents"
            node.seek(128 * MIB - 512)
            node.write(b"by the node".ljust(512))
            os.fsync(node.fileno())
    finally:
        runner.run(["losetup", "--detach", device])
    with vol.open_image(domain, volumes[0]) as image:
        assert image.size == 128 * MIB and image.pread(11, 128 * MIB - 512) == b"by the node"


def test_q07_p05_a_chain_of_which_record_and_image_differ_is_not_opened_until_it_is_mended(make_domain, token):
    domain = make_domain()
    _, (base, middle, leaf) = disk(domain, token, 3)
    record = domain.record(leaf)
    domain.write_record(token, leaf, record._replace(parent=base))
    with pytest.raises(MetadataError, match=f"stands on {middle}, its record says {base}") as caught:
        vol.open_image(domain, leaf)
    assert caught.value.hint
    # Those who repair may look.
    vol.open_image(domain, leaf, allow_illegal=True).close()
    domain.write_record(token, leaf, record._replace(parent=BLANK))
    with pytest.raises(MetadataError, match=BLANK):
        vol.open_image(domain, leaf, writable=True)
    assert check.mend(token, domain).clean and domain.record(leaf).parent == middle
    vol.open_image(domain, leaf).close()
    # An image that forgot its parent would read as zeros.
    with closing(domain.open_volume(leaf, writable=True)) as storage:
        set_backing(storage, None, None)
    with pytest.raises(MetadataError, match="its record says"):
        vol.open_image(domain, leaf)
    (told,) = check.check_domain(domain).findings
    assert "no backing file" in told.text and told.repair == "none"


def test_images_that_run_in_a_circle_are_refused_in_one_line(file_domain, token):
    domain = file_domain()
    _, (base, leaf) = disk(domain, token, 2)
    vol.set_parent_name(token, domain, base, leaf, "COW")
    with pytest.raises(MetadataError):
        vol.open_image(domain, leaf)
    with pytest.raises(Error, match="infinite loop"):
        vol.open_image(domain, leaf, allow_illegal=True)
    domain.write_record(token, base, domain.record(base)._replace(parent=leaf))
    with pytest.raises(Error, match="infinite loop"):
        vol.open_image(domain, leaf)
    assert any("circle" in one.text or "no leaf" in one.text for one in check.check_domain(domain).findings)


def test_q08_changes_of_iso_and_export_domains_exclude_each_other(tmp_path):
    with storage_pool.connect(tmp_path) as first, storage_pool.connect(tmp_path) as second:
        media = first.create_domain("media", domain_class="iso", storage_type="NFS")
        export = first.create_domain("export", domain_class="export", storage_type="NFS")
        with pytest.raises(Busy):
            second.domain(media.uuid).upload_media("a.iso", io.BytesIO(b"123"))
        with pytest.raises(Busy):
            second.domain(export.uuid).mend()
        assert second.domain(media.uuid).media() == {}


def test_q09_finding_children_reads_only_records_of_the_images_concerned(file_domain, token, monkeypatch):
    domain = file_domain()
    _, (base, leaf) = disk(domain, token, 2)
    for _ in range(3):
        disk(domain, token, 2)
    read, record = [], type(domain).record
    monkeypatch.setattr(type(domain), "record", lambda own, volume: (read.append(volume), record(own, volume))[1])
    assert vol.children_of(domain, base) == [leaf] and read == [leaf]


def test_p08_copying_reads_and_writes_data_not_holes(file_domain, token):
    source, target = file_domain(), file_domain()
    spec = vol.VolumeSpec(make_id(), make_id(), 1 << 40)
    vol.create_volume(token, source, spec, CTIME)
    with vol.open_image(source, spec.volume, writable=True) as image:
        image.pwrite(b"x" * 65536, 1 << 39)
    seen = []
    copied = transfer.copy_image(
        token, source, spec.image, target, ctime=CTIME, progress=lambda *told: seen.append(told)
    )
    assert copied == spec.image and seen[-1] == (65536, 65536) and target.usage_of(spec.volume) < 1 << 20
