# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The lease of domains before version 3, hosts taking turns on one file in virtual time."""

from pathlib import Path

import pytest

from qcowlib.errors import StorageError
from spm.errors import LeaseError, LeaseHeld, LeaseLost
from spm.lease_watch import LeaseToken, LeaseWatch
from spm.safelease import SafeleaseLeases, budget_of
from spm.timing import SafeleaseTiming
from storage_pool.lease_records import SafeleaseTag, lockspace_area, resource_area
from storage_pool.leases import Lease, LeaseArea

MIB = 1 << 20
TIMING = SafeleaseTiming()
GOLDEN = Path(__file__).parents[1] / "storage_pool/golden/safelease"
SPACE = "space"


class World:
    """A file, the time, and what happens while somebody sleeps."""

    def __init__(self, path):
        self.path = path
        path.write_bytes(SafeleaseTag(None).pack().ljust(4096, b"\0"))
        self.now_s = 1000.0
        self.during = []
        self.lease = Lease(SPACE, "SDM", LeaseArea(str(path), 0))

    def sleep(self, seconds):
        self.now_s += seconds
        for event in list(self.during):
            event()

    def host(self, number):
        leases = SafeleaseLeases(TIMING, lambda: self.now_s, self.sleep, lambda: int(self.now_s * 1e6))
        leases.join(SPACE, number, LeaseArea(str(self.path), 0))
        return leases

    def tag(self):
        return SafeleaseTag.parse(self.path.read_bytes()[:512])

    def put(self, tag):
        self.path.write_bytes(tag.pack().ljust(4096, b"\0"))


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "leases")


def test_ls16_free_block_is_acquired_after_settling(world):
    one = world.host(1)
    own = one.acquire(world.lease)
    assert world.now_s == 1000 + TIMING.settle_s
    assert world.tag().host_id == 1 and one.owner(world.lease) == own
    assert one.host_state(SPACE, 1) == "live" and one.members(SPACE) == [1] and one.connected()


def test_ls16_contended_the_last_writer_has_it(world):
    world.during.append(lambda: world.put(SafeleaseTag(2, 77)))
    with pytest.raises(LeaseHeld, match="went to host 2"):
        world.host(1).acquire(world.lease)
    assert world.tag() == SafeleaseTag(2, 77)


def test_ls16_renewed_lease_is_refused_as_soon_as_that_is_seen(world):
    one, two = world.host(1), world.host(2)
    one.acquire(world.lease)
    began_s = world.now_s
    world.during.append(lambda: one.prove(world.lease))
    with pytest.raises(LeaseHeld, match="renewed by host 1"):
        two.acquire(world.lease)
    assert world.now_s - began_s == TIMING.renewal_s
    assert two.host_state(SPACE, 1) == "live" and two.owner(world.lease).host_id == 1


def test_ls16_renewal_writes_a_new_stamp_even_if_the_wall_clock_stands(world):
    one = world.host(1)
    own = one.acquire(world.lease)
    stamps = [world.tag().timestamp_us]
    for _ in range(3):
        proof = one.prove(world.lease)
        assert proof.owner == own and proof.renewed_s == world.now_s
        stamps.append(world.tag().timestamp_us)
    assert stamps == sorted(set(stamps))


def test_ls16_release_frees_the_block_byte_for_byte(world):
    one = world.host(1)
    one.acquire(world.lease)
    one.release(world.lease)
    one.release(world.lease)
    assert world.path.read_bytes()[:512] == (GOLDEN / "free_block.bin").read_bytes()[:512]
    assert one.owner(world.lease) is None
    assert world.host(2).acquire(world.lease).host_id == 2


def test_ls16_expired_lease_is_had_after_the_foreign_wait(world):
    """The block is one that the tool of that time wrote; its host is gone."""
    world.path.write_bytes((GOLDEN / "held_block.bin").read_bytes().ljust(4096, b"\0"))
    two = world.host(2)
    assert two.owner(world.lease).host_id == 37
    assert two.host_state(SPACE, 37) == "unknown"
    own = two.acquire(world.lease)
    assert world.now_s - 1000 == TIMING.foreign_wait_s + TIMING.settle_s
    assert two.owner(world.lease) == own


def test_ls16_host_that_watched_the_stamp_stand_still_need_not_wait_again(world):
    world.put(SafeleaseTag(37, 5))
    two = world.host(2)
    assert two.owner(world.lease).host_id == 37
    world.now_s += TIMING.foreign_wait_s
    assert two.owner(world.lease) is None and two.host_state(SPACE, 37) == "dead"
    began_s = world.now_s
    two.acquire(world.lease)
    assert world.now_s - began_s == TIMING.settle_s


def test_s1_lease_older_than_its_length_is_not_renewed(world):
    one = world.host(1)
    one.acquire(world.lease)
    world.now_s += TIMING.lease_s + 1
    before = world.tag()
    assert one.prove(world.lease).owner is None
    assert world.tag() == before and one.prove(world.lease).renewed_s == float("-inf")


def test_s1_holder_that_was_paused_while_renewing_has_lost(world, monkeypatch):
    one = world.host(1)
    one.acquire(world.lease)
    write = one._write

    def slow(lease, tag):
        world.now_s += TIMING.operation_s + 1
        write(lease, tag)

    monkeypatch.setattr(one, "_write", slow)
    assert one.prove(world.lease).owner is None


def test_s1_host_that_was_paused_while_taking_lets_the_other_end_first(world, monkeypatch):
    one = world.host(1)
    write = one._write
    late = []

    def slow(lease, tag):
        if not late:
            late.append(world.now_s)
            world.now_s += 300
        write(lease, tag)

    monkeypatch.setattr(one, "_write", slow)
    one.acquire(world.lease)
    budget = budget_of(TIMING)
    assert world.now_s - late[0] - 300 >= budget.deadline_s + budget.landing_s


def test_s2_token_on_this_lease_ends_when_another_stamp_is_there(world):
    one = world.host(1)
    own = one.acquire(world.lease)
    budget = budget_of(TIMING)
    watch = LeaseWatch(budget, own, 1, one.prove(world.lease), world.now_s)
    token = LeaseToken(watch, lambda: world.now_s, lambda: (one.prove(world.lease), 1), lambda why: None, one.connected)
    for _ in range(10):
        world.now_s += budget.recheck_s
        token.check()
    world.put(SafeleaseTag(2, 5))
    world.now_s += budget.recheck_s
    with pytest.raises(LeaseLost, match="another host"):
        token.check()
    one.release(world.lease)
    assert world.tag() == SafeleaseTag(2, 5)


def test_renewal_that_failed_and_landed_is_still_ours(world, monkeypatch):
    one = world.host(1)
    own = one.acquire(world.lease)
    write = one._write

    def fails(lease, tag):
        write(lease, tag)
        raise StorageError(5, operation="write")

    with monkeypatch.context() as patch:
        patch.setattr(one, "_write", fails)
        with pytest.raises(StorageError):
            one.prove(world.lease)
    assert one.prove(world.lease).owner == own


def test_dropped_lease_stays_on_storage_until_it_expired(world):
    one = world.host(1)
    one.acquire(world.lease)
    one.drop(world.lease)
    assert world.tag().host_id == 1 and one.settle_s(world.lease) == 0
    one.leave(SPACE, 1, world.lease.area)
    with pytest.raises(LeaseError, match="not joined"):
        one.acquire(world.lease)


def test_fencing_frees_only_the_host_that_the_operator_named(world):
    world.put(SafeleaseTag(37, 5))
    two = world.host(2)
    with pytest.raises(LeaseError, match="of host 37, not of host 36"):
        two.fence(world.lease, 36)
    two.fence(world.lease, 37)
    two.fence(world.lease, 37)
    assert world.tag() == SafeleaseTag(None)


@pytest.mark.parametrize("area", [lockspace_area(SPACE), bytes(MIB) + resource_area(SPACE, "SDM")])
def test_domain_of_sanlock_is_refused(world, area):
    one = world.host(1)
    world.path.write_bytes(area)
    for refused in (lambda: one.acquire(world.lease), lambda: world.host(2)):
        with pytest.raises(LeaseError, match="are of sanlock"):
            refused()
    assert world.path.read_bytes() == area


def test_what_this_form_does_not_have_is_refused(world):
    one = world.host(1)
    with pytest.raises(LeaseError, match="cannot be shared"):
        one.acquire(world.lease, shared=True)
    with pytest.raises(LeaseError, match="no lease volume"):
        one.owner(world.lease._replace(name="volume"))
    one.acquire(world.lease)
    with pytest.raises(LeaseHeld, match="held here already"):
        one.acquire(world.lease)
    with pytest.raises(LeaseError, match="too short"):
        budget_of(SafeleaseTiming(lease_s=30.0))
