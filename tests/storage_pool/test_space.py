# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Space: what is promised, when to warn, when to stop; limits of groups and old domains."""

import pytest

from storage_pool import block_group, snapshot
from storage_pool import volume as vol
from storage_pool.errors import MetadataError, NoSpace
from storage_pool.ids import make_id
from storage_pool.limits import check_metadata_room, group_warnings, text_warnings
from storage_pool.lvm import Vg
from storage_pool.space import Space, SpacePolicy, account, total_space

CTIME = 1617235200
MIB, GIB = 1 << 20, 1 << 30
VG = Vg("g", "u", "wz--n-", 100 * GIB, 50 * GIB, 128 * MIB, 800, 400, frozenset(), 128 * MIB, 60 * MIB, 9, 1, 5, 0)


@pytest.mark.parametrize(
    ("free", "state", "words"),
    [(50, "ok", []), (9, "low", ["9 % free"]), (4, "critical", ["block actions"]), (10, "ok", [])],
)
def test_low_and_critical_space_are_told_with_their_figures(free, state, words):
    space = Space(100 * GIB, free * GIB, 0, 0, 0)
    assert SpacePolicy().state(space) == state
    told = SpacePolicy().warnings(space)
    assert len(told) == len(words) and all(word in text for word, text in zip(words, told, strict=True))


def test_an_action_that_would_leave_too_little_is_refused():
    space = Space(100 * GIB, 20 * GIB, 0, 0, 0)
    SpacePolicy().require(space, 15 * GIB, "d")
    with pytest.raises(NoSpace, match=r"4\.99 GiB free, below the 5 GiB"):
        SpacePolicy().require(space, 15 * GIB + 10 * MIB, "d")
    SpacePolicy(blocker=0).require(space, 20 * GIB, "d")


def test_over_commitment_of_a_pool_is_the_sum_over_its_domains():
    one, two = Space(100, 60, 40, 300, 150), Space(100, 50, 50, 20, 60)
    both = total_space([one, two])
    assert both == Space(200, 110, 90, 320, 210) and both.over_commit_percent == 105
    assert "over-committed" in SpacePolicy(0, 0).warnings(both)[0]
    assert total_space([]).over_commit_percent == 0


def test_a_domain_counts_leaves_as_full_and_others_as_they_are(make_domain, token):
    domain = make_domain()
    image, base = make_id(), make_id()
    vol.create_volume(token, domain, vol.VolumeSpec(image, base, 10 * GIB), CTIME)
    leaf = snapshot.create_snapshot(token, domain, image, ctime=CTIME)
    space = account(domain)
    assert space.provisioned == 10 * GIB
    assert space.used == domain.usage_of(base) + domain.usage_of(leaf)
    assert 11 * GIB <= space.committed - domain.usage_of(base) < 11 * GIB + 128 * MIB
    assert space.committed > space.used and space.total == domain.capacity()[0]


def test_advised_limits_of_a_group_are_warnings_with_the_figure():
    assert group_warnings(VG) == []
    told = group_warnings(VG._replace(lv_count=351, pv_count=301, mda_size=MIB, mda_free=80 << 10, missing_pv_count=2))
    assert [text.split()[0] for text in told] == ["2", "metadata", "only", "351", "301"]
    assert "1 MiB are smaller" in told[1] and "80 KiB" in told[2]


def test_the_text_of_a_v1_domain_is_told_before_it_is_full():
    assert text_warnings({"A": "x" * 1500}) == []
    (told,) = text_warnings({"A": "x" * 1700})
    assert told.startswith("1755 of the 2048 bytes")


def test_full_metadata_areas_refuse_a_volume_before_lvm_would_fail():
    check_metadata_room(VG._replace(mda_free=2000))
    with pytest.raises(NoSpace, match="have 1000 bytes left"):
        check_metadata_room(VG._replace(mda_free=1000))


@pytest.mark.real("lvm", "losetup", "mke2fs")
def test_a_full_group_refuses_a_volume_before_it_is_made(block_domain, token):
    domain = block_domain()
    state = domain.state
    domain._state = state._replace(vg=state.vg._replace(mda_free=100))
    commands = domain.lvm.commands
    with pytest.raises(NoSpace):
        vol.create_volume(token, domain, vol.VolumeSpec(make_id(), make_id(), MIB), CTIME)
    assert domain.lvm.commands <= commands + 1 and not domain.entries()


@pytest.mark.real("lvm", "losetup", "mke2fs")
def test_a_v1_domain_refuses_devices_that_its_text_cannot_name_before_lvm_has_them(block_domain, token, monkeypatch):
    domain = block_domain(0)
    monkeypatch.setattr(block_group, "_check_devices", lambda devices: None)
    commands = domain.lvm.commands
    with pytest.raises(MetadataError, match="limit is 2048"):
        block_group.extend_block_domain(token, domain, [f"/dev/mapper/3600{'0' * 20}{n:02}" for n in range(16)])
    assert domain.lvm.commands == commands
