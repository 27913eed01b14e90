# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A supervised host: in the lockspace, manager when it is its turn or told, out again in order."""

import pytest

from qcowlib.errors import StorageError
from spm.election import Election
from spm.errors import LeaseHeld, LeaseLost
from spm.host import Duties, PoolHost, election_timing
from spm.service import PoolRecord, SpmHost, SpmService
from spm.testing.leases import SimHost, SimLeases, SimSpace
from spm.timing import LeaseTiming
from storage_pool.leases import Lease, LeaseArea

TIMING = LeaseTiming(io_timeout_s=1.0)
AREA = LeaseArea("ids", 0)
SDM = Lease("space", "SDM", LeaseArea("leases", 1 << 20))


def panic(reason):
    raise SystemExit(reason)


class World:
    """One storage, one clock, the pool's record."""

    def __init__(self):
        self.now_s = 1000.0
        self.record = PoolRecord(0, -1, -1)
        self.space = SimSpace(lambda: self.now_s, TIMING)
        self.fails = False

    def read(self):
        if self.fails:
            raise StorageError(5, operation="read")
        return self.record

    def write(self, token, record):
        token.check()
        self.record = record

    def master_version(self):
        return 5

    def sleep(self, seconds):
        self.now_s += seconds


class Noted(Duties):
    """Counts steps; ``error`` is raised instead."""

    def __init__(self):
        self.count = 0
        self.error = None

    def step(self, now_s):
        self.count += 1
        if self.error is not None:
            raise self.error


class Member:
    """A host with all that was told of it."""

    def __init__(self, world, host_id, **words):
        self.world = world
        self.told = []
        self.daemon = SimHost(world.space, f"host{host_id}")
        self.leases = SimLeases(self.daemon)
        self.duties = Noted()
        own = SpmHost(host_id, self.leases, TIMING, lambda: world.now_s, world.sleep, panic)
        service = SpmService(own, SDM, world)
        willing = words.pop("willing", True)
        election = Election(host_id, election_timing(TIMING), willing=willing)
        self.host = PoolHost(own, AREA, SDM, world, service, election, self.told.append, duties=self.duties, **words)

    def states(self):
        return [(report.role, report.lockspace) for report in self.told]


def run(world, members, seconds):
    """Let all hosts step for so long."""
    end = world.now_s + seconds
    while world.now_s < end:
        for member in members:
            member.host.step()
        world.now_s += 0.25


def test_host_joins_becomes_the_manager_and_leaves_in_order():
    world = World()
    member = Member(world, 1)
    run(world, [member], 5)
    member.host.leave()
    assert member.states() == [
        ("Free", "joining"),
        ("Free", "joined"),
        ("Contend", "joined"),
        ("SPM", "joined"),
        ("Free", "joined"),
        ("Free", "out"),
    ]
    assert [report.lver for report in member.told] == [-1, -1, -1, 1, -1, -1]
    assert world.record == PoolRecord(1, -1, world.record.lease_version)
    assert member.duties.count > 3


def test_host_that_is_not_willing_manages_only_when_told():
    world = World()
    member = Member(world, 1, willing=False)
    run(world, [member], 10)
    assert member.host.report.role == "Free"
    assert member.host.start() and member.host.report.role == "SPM"
    assert member.host.start()
    member.host.stop_spm()
    member.host.stop_spm()
    run(world, [member], 10)
    assert member.host.report.role == "Free"


def test_one_of_several_manages_and_all_see_it():
    world = World()
    members = [Member(world, number) for number in (1, 2, 3)]
    run(world, members, 10)
    (manager,) = [member for member in members if member.host.report.role == "SPM"]
    assert {member.host.report.spm_id for member in members} == {manager.host.report.host_id}
    assert {member.host.report.spm_lver for member in members} == {1}
    manager.host.leave()
    run(world, members[:], 0)
    rest = [member for member in members if member is not manager]
    run(world, rest, 10)
    assert sorted(member.host.report.role for member in rest) == ["Free", "SPM"]
    assert max(member.host.report.lver for member in rest) == 2


def test_host_with_the_higher_priority_comes_first():
    world = World()
    members = [Member(world, 1, priority=2), Member(world, 2, priority=9), Member(world, 3, priority=2)]
    for member in members:
        member.host.step()
    run(world, members, 20)
    first = [report.host_id for member in members for report in member.told if report.role == "SPM"]
    assert len(first) == 1


def test_lost_lease_ends_the_role_and_the_host_comes_back():
    world = World()
    member = Member(world, 1)
    run(world, [member], 5)
    member.daemon.sicken()
    run(world, [member], TIMING.death_s + 5)
    assert member.host.report.role == "Free"
    assert ("Free", "joined") in member.states()[4:]
    member.daemon.recover()
    run(world, [member], TIMING.join_s + 60)
    assert member.host.report.lockspace == "joined"


def test_duty_that_finds_the_right_gone_ends_the_role():
    world = World()
    member = Member(world, 1)
    run(world, [member], 5)
    member.duties.error = LeaseLost("gone")
    member.host.service.token.give_up()
    member.host.step()
    assert member.host.report.role == "Free" and member.host.report.lver == -1


def test_duty_that_cannot_read_storage_is_tried_again():
    world = World()
    member = Member(world, 1)
    run(world, [member], 5)
    member.duties.error = StorageError(5, operation="read")
    count = member.duties.count
    run(world, [member], 2)
    assert member.host.report.role == "SPM" and member.duties.count > count


def test_storage_that_does_not_answer_is_told_once():
    world = World()
    member = Member(world, 1, willing=False)
    run(world, [member], 3)
    told = len(member.told)
    world.fails = True
    run(world, [member], 30)
    assert len(member.told) == told
    world.fails = False
    run(world, [member], 3)
    assert member.host.report.lockspace == "joined"


def test_host_id_in_use_is_told_once_and_tried_again():
    world = World()
    first, second = Member(world, 1, willing=False), Member(world, 1, willing=False)
    first.host.step()

    def join(lockspace, host_id, area):
        raise LeaseHeld("host id 1 is used by another host")

    second.leases.join = join
    for _ in range(5):
        second.host.step()
    assert second.states() == [("Free", "joining"), ("Free", "out")]
    assert "used by another" in second.told[-1].reason


def test_start_that_fails_is_told_with_its_reason():
    world = World()
    first, second = Member(world, 1), Member(world, 2, willing=False)
    run(world, [first, second], 5)
    assert not second.host.start()
    assert second.host.report.role == "Free" and "held" in second.host.report.reason


@pytest.mark.parametrize("io_timeout_s", [1.0, 10.0, 60.0])
def test_periods_of_the_election_fit_those_of_the_lease(io_timeout_s):
    timing = election_timing(LeaseTiming(io_timeout_s))
    assert 1.0 <= timing.poll_s <= 10.0 and timing.stagger_s * timing.ranks < 2 * timing.poll_s
