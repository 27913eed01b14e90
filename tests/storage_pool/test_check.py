# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Checking whole domains, and mending what has a rule."""

import contextlib
from pathlib import Path

import pytest

from qcowlib.storage.file import FileStorage
from storage_pool import check, merge
from storage_pool import snapshot as sn
from storage_pool import volume as vol
from storage_pool.ids import make_id
from storage_pool.lease_records import lockspace_area, resource_area
from storage_pool.testing.killing import Killed, KillingDomain

CTIME = 1617235200
MIB = 1 << 20


def disk(domain, token, length=3):
    image, volume = make_id(), make_id()
    vol.create_volume(token, domain, vol.VolumeSpec(image, volume, 64 * MIB), CTIME)
    return image, [volume, *(sn.create_snapshot(token, domain, image, ctime=CTIME) for _ in range(length - 1))]


def test_a_sound_domain_is_clean(make_domain, token):
    domain = make_domain()
    assert check.check_domain(domain).clean
    disk(domain, token)
    report = check.check_domain(domain)
    assert report.clean and (report.images, report.volumes) == (1, 3)


def test_p09_everything_with_a_rule_is_mended(make_domain, token):
    domain = make_domain()
    image, volumes = disk(domain, token)
    other, _ = disk(domain, token)
    # A wrong parent in a record, a wrong role, a stale tag, a lost lease, a
    # merge that was cut and a creation that was cut.
    domain.write_record(token, volumes[2], domain.record(volumes[2])._replace(parent=volumes[0]))
    domain.write_record(token, volumes[0], domain.record(volumes[0])._replace(voltype="LEAF"))
    domain.set_parent_hint(token, volumes[1], volumes[2])
    lease = domain.lease(volumes[1])
    if domain.block:
        with domain.special("leases", writable=True) as storage:
            storage.write(lease.area.offset, [bytes(512)])
    else:
        Path(lease.area.path).write_bytes(bytes(512))
    third, members = disk(domain, token)
    with pytest.raises(Killed):
        merge.merge(token, KillingDomain(domain, 6), third, members[1])
    with pytest.raises(Killed):
        sn.create_snapshot(token, KillingDomain(domain, 2), other, ctime=CTIME)
    if domain.block:
        domain = type(domain).open(domain.lvm, domain.uuid)
    before = check.check_domain(domain)
    assert not before.clean and len(before.findings) >= 4 and before.leftovers
    assert list(before.unfinished) == [members[0]]
    report = check.mend(token, domain)
    assert report.clean, report
    assert vol.records_of(domain, image)[volumes[2]].parent == volumes[1]
    assert set(vol.records_of(domain, third)) == {members[0], members[2]}


def other_leases(domain, volume):
    """Areas that are no lease of *volume*, with a word of what is said of each."""
    good = resource_area(domain.uuid, volume)
    yield resource_area(domain.uuid, f"{volume}_MERGE"), "_MERGE"
    yield resource_area(make_id(), volume), "of lockspace"
    yield resource_area("", ""), "of lockspace ''"
    yield lockspace_area(domain.uuid), "another kind"
    yield resource_area(domain.uuid, volume, block_size=4096), "blocks of 4096"
    yield resource_area(domain.uuid, volume, alignment=2 * MIB)[:MIB], "areas of 2097152"
    yield good[:160] + b"\1" + good[161:], "checksum"
    yield bytes(MIB), "is not there"
    yield b"\xff" * MIB, "is not there"


@pytest.mark.parametrize("version", [4, 5])
def test_ls_a_lease_of_another_name_or_domain_or_form_is_found_and_rewritten(make_domain, token, version):
    domain = make_domain(version)
    _, (volume,) = disk(domain, token, 1)
    area = domain.lease(volume).area

    def lease(data=None):
        opened = domain.special("leases", writable=True) if domain.block else contextlib.nullcontext(files[0])
        with opened as storage:
            if data is not None:
                storage.write(area.offset, [data])
            read = bytearray(MIB)
            storage.read_into(area.offset, [read])
        return bytes(read)

    files = [] if domain.block else [FileStorage.open(area.path, writable=True)]
    sound = lease()
    for data, word in other_leases(domain, volume):
        lease(data)
        (finding,) = check.check_domain(domain).findings
        assert (finding.volume, finding.repair) == (volume, "write lease") and word in finding.text
        assert lease() == data
        assert check.mend(token, domain).clean and lease() == sound
    for file in files:
        file.close()


def test_what_has_no_rule_is_told_and_stays(file_domain, token):
    domain = file_domain()
    _, volumes = disk(domain, token)
    domain.write_record(token, volumes[2], domain.record(volumes[2])._replace(legality="ILLEGAL"))
    report = check.mend(token, domain)
    assert [finding.volume for finding in report.findings] == [volumes[2]]
    assert domain.record(volumes[2]).legality == "ILLEGAL"


def test_a_capacity_below_the_image_is_raised_and_a_larger_one_left(make_domain, token):
    domain = make_domain()
    _, volumes = disk(domain, token)
    domain.write_record(token, volumes[0], domain.record(volumes[0])._replace(capacity=32 * MIB))
    domain.write_record(token, volumes[1], domain.record(volumes[1])._replace(capacity=128 * MIB))
    (finding,) = check.check_domain(domain).findings
    assert (finding.volume, finding.repair, finding.value) == (volumes[0], "set capacity", str(64 * MIB))
    assert check.mend(token, domain).clean
    assert [domain.record(volume).capacity for volume in volumes] == [64 * MIB, 128 * MIB, 64 * MIB]


def test_an_illegal_volume_is_told_with_what_its_chain_says(file_domain, token):
    domain = file_domain()
    image, volumes = disk(domain, token)
    look = sn.preview(token, domain, image, volumes[0], ctime=CTIME)
    for volume in (volumes[1], look):
        domain.write_record(token, volume, domain.record(volume)._replace(legality="ILLEGAL"))
    told = {finding.volume: finding.text for finding in check.check_domain(domain).findings}
    assert "make it LEGAL" in told[volumes[1]] and "remove it" in told[look] and len(told) == 2


@pytest.mark.real("lvm", "losetup", "mke2fs")
def test_tags_decide_over_the_image_of_a_record_and_a_shared_slot_is_told(block_domain, token):
    domain = block_domain()
    image, volumes = disk(domain, token, 2)
    domain.write_record(token, volumes[1], domain.record(volumes[1])._replace(image=make_id()))
    (finding,) = check.check_domain(domain).findings
    assert (finding.repair, finding.value) == ("set image", image)
    assert check.mend(token, domain).clean and domain.record(volumes[1]).image == image
    slots = [domain.entries()[volume].slot for volume in volumes]
    domain.retag([volumes[1]], add=[f"MD_{slots[0]}"], remove=[f"MD_{slots[1]}"])
    told = [finding for finding in check.check_domain(domain).findings if "metadata slot" in finding.text]
    assert [finding.volume for finding in told] == sorted(volumes)
