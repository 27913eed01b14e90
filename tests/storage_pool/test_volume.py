# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Volumes on both kinds of domain, judged by qemu-img where images are concerned."""

import json
import os
import subprocess

import pytest

from qcowlib.errors import GateDenied
from qcowlib.qcow2.check import check
from storage_pool import volume as vol
from storage_pool.errors import AlreadyExists, Illegal, IllegalSpec, MetadataError, NotFound
from storage_pool.ids import BLANK, make_id
from storage_pool.metadata_volume import next_generation

MIB, GIB = 1 << 20, 1 << 30
CTIME = 1617235200

pytestmark = pytest.mark.real("qemu-img")

ERROR_KINDS = {
    "IncorrectFormat": "format",
    "IncorrectType": "type",
    "InvalidParameterException": "disk type",
    "UnsupportedOperation": "bitmaps",
}


def spec(image=None, **changes):
    return vol.VolumeSpec(image or make_id(), make_id(), **{"capacity": 64 * MIB, **changes})


def add(domain, token, image=None, **changes):
    made = spec(image, **changes)
    vol.create_volume(token, domain, made, CTIME)
    return made


def qemu_info(domain, volume, tmp_path):
    """Return what qemu-img says of a volume's bytes, copied out of the domain."""
    copy = tmp_path / f"{volume}.copy"
    storage = domain.open_volume(volume)
    data = bytearray(min(storage.size, 4 * MIB))
    storage.read_into(0, [data])
    storage.close()
    copy.write_bytes(data)
    done = subprocess.run(["qemu-img", "info", "-U", "--output=json", copy], check=True, capture_output=True)
    return json.loads(done.stdout)


def test_op19_all_288_combinations_are_judged_as_others_judge_them(tables):
    for row in tables["create_params"]:
        wanted = vol.VolumeSpec(
            make_id(),
            make_id(),
            capacity=MIB,
            format=row["format"],
            type=row["type"],
            parent=make_id() if row["has_parent"] else BLANK,
            disktype=row["disktype"],
            copy_bitmaps=row["copy_bitmaps"],
            new_bitmap=row["new_bitmap"],
        )
        rules = {"block": row["domain"] == "block", "version": row["version"]}
        if row["result"] == "ok":
            vol.check_spec(wanted, **rules)
        else:
            with pytest.raises(IllegalSpec) as caught:
                vol.check_spec(wanted, **rules)
            assert caught.value.kind == ERROR_KINDS[row["result"]], row


@pytest.mark.parametrize(("version", "compat"), [(3, "0.10"), (4, "1.1"), (5, "1.1")])
def test_op11_fd08_cow_volume_has_the_compat_of_its_version_and_a_bare_backing_name(
    make_domain, token, tmp_path, version, compat
):
    domain = make_domain(version)
    base = add(domain, token)
    child = add(domain, token, base.image, parent=base.volume, capacity=128 * MIB)
    info = qemu_info(domain, child.volume, tmp_path)
    assert (info["format"], info["virtual-size"]) == ("qcow2", 128 * MIB)
    assert info["format-specific"]["data"]["compat"] == compat
    assert (info["backing-filename"], info["backing-filename-format"]) == (base.volume, "qcow2")
    assert domain.record(base.volume).voltype == "INTERNAL"
    assert domain.record(child.volume)._asdict() == {
        "domain": domain.uuid,
        "image": base.image,
        "parent": base.volume,
        "capacity": 128 * MIB,
        "format": "COW",
        "type": "SPARSE",
        "voltype": "LEAF",
        "disktype": "DATA",
        "description": "",
        "legality": "LEGAL",
        "ctime": CTIME,
        "generation": 0,
        "sequence": 1 if version == 5 else 0,
    }


def test_fd07_raw_sparse_has_its_length_and_nothing_allocated(file_domain, token):
    domain = file_domain()
    made = add(domain, token, format="RAW", type="SPARSE")
    assert domain.size_of(made.volume) == 64 * MIB and domain.usage_of(made.volume) <= 4096


def test_fd06_raw_preallocated_allocates_all(file_domain, token):
    domain = file_domain()
    made = add(domain, token, format="RAW", type="PREALLOCATED", initial_size=4096)
    assert domain.usage_of(made.volume) >= 64 * MIB
    with pytest.raises(IllegalSpec):
        add(domain, token, format="RAW", type="PREALLOCATED", initial_size=65 * MIB)


def test_fd08_cow_preallocated_covers_its_capacity(file_domain, token):
    domain = file_domain()
    made = add(domain, token, type="PREALLOCATED")
    assert domain.size_of(made.volume) == 64 * MIB <= domain.usage_of(made.volume)


@pytest.mark.real("lvm", "losetup", "mke2fs")
def test_bd09_a_raw_logical_volume_has_the_capacity_of_its_extents(block_domain, token):
    domain = block_domain()
    made = add(domain, token, format="RAW", type="PREALLOCATED", capacity=MIB)
    assert domain.record(made.volume).capacity == domain.size_of(made.volume) == 128 * MIB
    big = add(domain, token, capacity=10 * GIB)
    assert domain.size_of(big.volume) == 2560 * MIB
    assert domain.record(big.volume).capacity == 10 * GIB


@pytest.mark.real("lvm", "losetup", "mke2fs")
def test_making_a_snapshot_volume_takes_three_lvm_commands(block_domain, token):
    domain = block_domain()
    base = add(domain, token)
    before = domain.lvm.commands
    add(domain, token, base.image, parent=base.volume)
    assert domain.lvm.commands - before == 3


def test_fd10_a_snapshot_smaller_than_its_parent_is_refused(make_domain, token):
    domain = make_domain()
    base = add(domain, token)
    with pytest.raises(IllegalSpec):
        add(domain, token, base.image, parent=base.volume, capacity=32 * MIB)
    assert domain.record(base.volume).voltype == "LEAF" and len(domain.entries()) == 1


def test_fd11_old_disk_types_are_accepted(file_domain, token):
    domain = file_domain()
    for disktype in ("1", "2"):
        assert domain.record(add(domain, token, disktype=disktype).volume).disktype == disktype


def test_fd13_a_volume_can_be_made_illegal_and_is_then_not_opened(make_domain, token):
    domain = make_domain()
    made = add(domain, token, legality="ILLEGAL")
    with pytest.raises(Illegal):
        vol.open_image(domain, made.volume)
    with vol.open_image(domain, made.volume, allow_illegal=True) as image:
        assert image.size == 64 * MIB
    with pytest.raises(Illegal):
        add(domain, token, made.image, parent=made.volume)


def test_a_creation_that_fails_leaves_nothing_and_the_parent_a_leaf(make_domain, token, monkeypatch):
    domain = make_domain()
    base = add(domain, token)

    def fail(*arguments):
        raise OSError("cut")

    for name in ("publish",):
        with monkeypatch.context() as patch:
            patch.setattr(domain, name, fail)
            with pytest.raises(OSError, match="cut"):
                add(domain, token, base.image, parent=base.volume)
    assert domain.record(base.volume).voltype == "LEAF"
    assert list(domain.entries()) == [base.volume] and domain.leftovers() == []


def test_data_of_a_chain_is_read_through_the_domain(make_domain, token):
    domain = make_domain()
    base = add(domain, token, format="RAW", type="PREALLOCATED", capacity=128 * MIB)
    child = add(domain, token, base.image, parent=base.volume, capacity=128 * MIB)
    with vol.open_image(domain, base.volume, writable=True) as image:
        image.pwrite(b"base" * 1024, 4096)
    with vol.open_image(domain, child.volume, writable=True) as image:
        image.pwrite(b"leaf" * 1024, 65536)
    with vol.open_image(domain, child.volume) as image:
        assert image.pread(4096, 4096) == b"base" * 1024
        assert image.pread(4096, 65536) == b"leaf" * 1024
    with vol.open_image(domain, base.volume) as image:
        assert image.pread(4096, 65536) == bytes(4096)


@pytest.mark.parametrize("name", ["/etc/passwd", "../../x", "x", "nbd:host", "json:{}", make_id() + "/..", ""])
def test_a_backing_name_that_is_no_volume_is_refused(file_domain, name):
    with pytest.raises((GateDenied, NotFound)):
        vol.DomainReferences(file_domain()).open("backing", name, "image", writable=False, cache="writeback")


def test_both_generations_of_backing_names_are_read():
    volume, image = make_id(), make_id()
    for name in (volume, f"../{image}/{volume}", f"../../images/{image}/{volume}"):
        assert vol.volume_of_name(name) == volume


def test_op01_a_template_gets_children_in_other_images(make_domain, token):
    domain = make_domain()
    template = add(domain, token)
    vol.update_volume(token, domain, template.volume, role="SHARED")
    clone = add(domain, token, parent=template.volume)
    assert domain.record(template.volume).voltype == "SHARED"
    assert domain.entries()[template.volume].images == (template.image, clone.image)
    assert vol.children_of(domain, template.volume) == [clone.volume]
    with vol.open_image(domain, clone.volume) as image:
        assert image.pread(512, 0) == bytes(512)
    with pytest.raises(Illegal):
        vol.remove_volumes(token, domain, template.image, [template.volume])
    vol.remove_volumes(token, domain, clone.image, [clone.volume])
    vol.remove_volumes(token, domain, template.image, [template.volume])
    assert domain.entries() == {}


def test_a_volume_of_another_image_is_no_parent_unless_it_is_a_template(file_domain, token):
    domain = file_domain()
    other = add(domain, token)
    with pytest.raises(Illegal):
        add(domain, token, parent=other.volume)


def test_removing_the_last_child_makes_its_parent_a_leaf(make_domain, token):
    domain = make_domain()
    base = add(domain, token)
    child = add(domain, token, base.image, parent=base.volume)
    with pytest.raises(Illegal, match="has children"):
        vol.remove_volumes(token, domain, base.image, [base.volume])
    vol.remove_volumes(token, domain, base.image, [child.volume], zero=True)
    assert domain.record(base.volume).voltype == "LEAF"
    vol.remove_volumes(token, domain, base.image, [base.volume])
    assert domain.entries() == {} and domain.leftovers() == []


def test_below_v3_internal_volumes_are_read_only(file_domain, token):
    domain = file_domain(0)
    base = add(domain, token)
    child = add(domain, token, base.image, parent=base.volume)
    assert os.stat(domain.path_of(base.volume)).st_mode & 0o777 == 0o440  # noqa: PTH116
    vol.remove_volumes(token, domain, base.image, [child.volume])
    assert os.stat(domain.path_of(base.volume)).st_mode & 0o777 == 0o660  # noqa: PTH116


def test_vm09_an_operation_is_illegal_inside_and_counts_at_its_end(make_domain, token):
    domain = make_domain()
    made = add(domain, token)
    with vol.operation(token, domain, made.volume, generation=0):
        assert domain.record(made.volume).legality == "ILLEGAL"
    after = domain.record(made.volume)
    assert (after.legality, after.generation) == ("LEGAL", 1)
    with pytest.raises(OSError), vol.operation(token, domain, made.volume):
        raise OSError
    after = domain.record(made.volume)
    assert (after.legality, after.generation) == ("ILLEGAL", 1)


def test_vm10_a_wrong_expected_generation_is_refused_before_any_change(file_domain, token):
    domain = file_domain()
    made = add(domain, token)
    before = domain.read_record(made.volume)
    with pytest.raises(Illegal), vol.operation(token, domain, made.volume, generation=5):
        raise AssertionError
    with pytest.raises(Illegal):
        vol.update_volume(token, domain, made.volume, legality="ILLEGAL", expected_generation=1)
    assert domain.read_record(made.volume) == before


def test_vm12_update_rules(file_domain, token):
    domain = file_domain()
    base = add(domain, token)
    with pytest.raises(Illegal):
        vol.update_volume(token, domain, base.volume, legality="LEGAL")
    with pytest.raises(Illegal):
        vol.update_volume(token, domain, base.volume, legality="FAKE")
    with pytest.raises(Illegal):
        vol.update_volume(token, domain, base.volume, description="x" * 211)
    for role in ("LEAF", "INTERNAL"):
        with pytest.raises(Illegal):
            vol.update_volume(token, domain, base.volume, role=role)
    assert vol.update_volume(token, domain, base.volume, description="new", generation=999).generation == 999
    assert vol.update_volume(token, domain, base.volume, legality="ILLEGAL").generation == next_generation(999) == 0
    vol.update_volume(token, domain, base.volume, legality="LEGAL")
    child = add(domain, token, base.image, parent=base.volume)
    for volume in (base.volume, child.volume):
        with pytest.raises(Illegal):
            vol.update_volume(token, domain, volume, role="SHARED")


def test_a_description_that_overflows_the_record_is_refused_before_anything_is_made(make_domain, token):
    domain = make_domain()
    with pytest.raises(MetadataError, match="limit is 512"):
        add(domain, token, description="日" * 200)
    assert domain.entries() == {} and domain.leftovers() == []


def test_a_volume_is_made_once(make_domain, token):
    domain = make_domain()
    made = add(domain, token)
    with pytest.raises(AlreadyExists):
        vol.create_volume(token, domain, made, CTIME)
    assert list(domain.entries()) == [made.volume]


@pytest.mark.real("lvm", "losetup", "mke2fs")
@pytest.mark.parametrize("version", [3, 5])
def test_a_cow_volume_shows_nothing_of_the_extents_former_data(block_domain, token, version):
    domain = block_domain(version)
    old = add(domain, token, format="RAW", type="PREALLOCATED", capacity=128 * MIB)
    storage = domain.open_volume(old.volume, writable=True)
    for at in range(0, 128 * MIB, 4 * MIB):
        storage.write(at, [b"\xff" * 4 * MIB])
    storage.flush()
    storage.close()
    vol.remove_volumes(token, domain, old.image, [old.volume])
    made = add(domain, token, capacity=64 * MIB)
    with vol.open_image(domain, made.volume, writable=True) as image:
        image.pwrite(b"x" * 10, 100000)
        image.pwrite(b"y" * 10, 40 * MIB)
    with vol.open_image(domain, made.volume) as image:
        data = image.pread(64 * MIB, 0)
    assert data[100000:100010] == b"x" * 10 and data.count(b"\xff") == 0
    report = check(domain.open_volume(made.volume))
    assert report.clean, report
