# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What each operation costs in LVM commands, however many volumes the domain has."""

import collections

import pytest

from storage_pool import check
from storage_pool import image_group as ig
from storage_pool import merge as mg
from storage_pool import merge_swap as ms
from storage_pool import snapshot as sn
from storage_pool import transfer as tr
from storage_pool import volume as vol
from storage_pool.block_domain import BlockDomain
from storage_pool.ids import make_id

MIB = 1 << 20
CTIME = 1617235200
VOLUMES = 12

pytestmark = pytest.mark.real("lvm", "losetup", "mke2fs")


@pytest.fixture
def crowded(block_domain, token):
    """A domain with disks of which the first has a chain; gives it with image and volumes, base first."""
    domain = block_domain()
    first = vol.VolumeSpec(make_id(), make_id(), 128 * MIB)
    for spec in (first, *(vol.VolumeSpec(make_id(), make_id(), 128 * MIB) for _ in range(VOLUMES))):
        vol.create_volume(token, domain, spec, CTIME)
    volumes = [first.volume]
    for number in range(4):
        with vol.open_image(domain, volumes[-1], writable=True) as image:
            image.pwrite(b"data", number * MIB)
        volumes.append(sn.create_snapshot(token, domain, first.image, ctime=CTIME))
    domain = BlockDomain.open(domain.lvm, domain.uuid)
    assert domain.metadata.version == 5
    return domain, first.image, volumes


@pytest.fixture
def cost(runner):
    """Return the LVM commands that a call needed: reports, and the others by name."""

    def count(call):
        before = len(runner.runs)
        call()
        commands = [argv[1] for argv in runner.runs[before:] if argv[0] == "lvm"]
        counted = collections.Counter(commands)
        return counted.pop("fullreport", 0), dict(sorted(counted.items()))

    return count


def test_p04_reading_needs_one_report(crowded, cost):
    domain, image, volumes = crowded
    domain.refresh()
    assert cost(lambda: [vol.records_of(domain), ig.ImageGroup.load(domain, image).chain()]) == (1, {})
    assert cost(lambda: vol.open_image(domain, volumes[-1]).close()) == (0, {})
    assert cost(lambda: BlockDomain.open(domain.lvm, domain.uuid).entries()) == (1, {})
    assert cost(lambda: check.check_domain(domain)) == (1, {})
    assert cost(lambda: BlockDomain.discover(domain.lvm)) == (1, {})


def test_q10_a_volume_is_made_by_two_commands_and_one_report(crowded, cost, token):
    domain, image, _ = crowded
    spec = vol.VolumeSpec(make_id(), make_id(), 128 * MIB)
    assert cost(lambda: vol.create_volume(token, domain, spec, CTIME)) == (1, {"lvcreate": 1, "lvchange": 1})
    assert cost(lambda: sn.create_snapshot(token, domain, image, ctime=CTIME)) == (1, {"lvcreate": 1, "lvchange": 1})


def test_any_number_of_volumes_is_removed_by_the_same_commands(crowded, cost, token):
    domain, image, volumes = crowded
    look = sn.preview(token, domain, image, volumes[0], ctime=CTIME)
    # Removing reads the group twice: before, as another host may have removed, and after.
    assert cost(lambda: sn.undo_preview(token, domain, image, look)) == (2, {"lvchange": 1, "lvremove": 1})
    assert cost(lambda: vol.remove_volumes(token, domain, image, volumes)) == (2, {"lvchange": 2, "lvremove": 1})


def test_wiping_costs_no_command_more(crowded, cost, token):
    domain, image, volumes = crowded
    look = sn.preview(token, domain, image, volumes[0], ctime=CTIME)
    removal = (2, {"lvchange": 1, "lvremove": 1})
    assert cost(lambda: sn.undo_preview(token, domain, image, look, zero=True)) == removal
    merge = (3, {"lvchange": 4, "lvremove": 1})
    assert cost(lambda: mg.merge(token, domain, image, volumes[2], zero=True)) == merge
    reports, commands = cost(lambda: ms.merge_by_swap(token, domain, image, volumes[0], zero=True))
    assert commands == {"lvchange": 5, "lvcreate": 1, "lvremove": 2, "lvrename": 2} and reports <= 6


def test_a_merge_costs_the_same_wherever_it_is(crowded, cost, token):
    domain, image, volumes = crowded
    reports, commands = cost(lambda: mg.merge(token, domain, image, volumes[2]))
    # Note, tag of the child, mark, end of the note; growing and shrinking is for those who need it.
    assert (reports, commands) == (3, {"lvchange": 4, "lvremove": 1})
    reports, commands = cost(lambda: ms.merge_by_swap(token, domain, image, volumes[0]))
    # Two notes, tags of both sets of bytes, mark of the snapshot; old bytes and snapshot go.
    assert commands == {"lvchange": 5, "lvcreate": 1, "lvremove": 2, "lvrename": 2}
    assert reports <= 6


def test_a_copy_costs_two_commands_a_volume_and_one_at_the_end(crowded, cost, token):
    domain, image, volumes = crowded
    assert cost(lambda: tr.copy_image(token, domain, image, domain, ctime=CTIME)) == (
        len(volumes),
        {"lvchange": len(volumes) + 1, "lvcreate": len(volumes)},
    )
    assert cost(lambda: tr.make_template(token, domain, image, domain, ctime=CTIME)) == (
        1,
        {"lvchange": 2, "lvcreate": 1},
    )
