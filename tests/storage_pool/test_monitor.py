# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Monitors of domains, and lost domains that come back by themselves."""

import pytest

from qcowlib.errors import StorageError
from storage_pool.file_domain import FileDomain
from storage_pool.ids import make_id
from storage_pool.monitor import DomainMonitor, Event, Recovery, RecoveryPolicy, read_block


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def test_op18_a_domain_goes_from_unknown_to_valid_with_delay_and_version(make_domain):
    domain, clock, heard = make_domain(4), Clock(), []

    def read(opened):
        read_block(opened)
        clock.now += 0.25

    monitor = DomainMonitor(domain.uuid, lambda: domain, clock, read=read, changed=heard.append)
    assert (monitor.status.valid, monitor.status.age(clock.now)) == (None, None)
    status = monitor.check()
    assert (status.valid, status.delay_s, status.version, status.error) == (True, 0.25, 4, "")
    clock.now += 10
    assert status.age(clock.now) == 10
    monitor.check()
    assert heard == [status] and monitor.status.since == status.since


def test_op18_a_lost_domain_is_invalid_with_its_error_and_valid_again_when_it_returns(file_domain, tmp_path):
    path, clock = file_domain().name, Clock()
    away = f"{tmp_path}/away"
    uuid = path.rpartition("/")[2]
    monitor = DomainMonitor(uuid, lambda: FileDomain.open(path), clock)
    assert monitor.check().valid
    (tmp_path / path).rename(away)
    clock.now += 10
    lost = monitor.check()
    assert not lost.valid and path in lost.error and lost.since == clock.now
    clock.now += 10
    assert monitor.check().since == lost.since
    (tmp_path / away).rename(path)
    assert monitor.check().valid
    monitor.close()


def test_another_domain_in_its_place_is_invalid(file_domain):
    one, other = file_domain(), file_domain()
    monitor = DomainMonitor(one.uuid, lambda: FileDomain.open(other.name), Clock())
    assert "another domain" in monitor.check().error


def test_keys_are_read_again_when_they_are_old(file_domain, token):
    domain, clock = file_domain(3), Clock()
    monitor = DomainMonitor(domain.uuid, lambda: FileDomain.open(domain.name), clock)
    assert monitor.check().version == 3
    domain.change(token, {"VERSION": "4"})
    assert monitor.check().version == 3
    clock.now += 300
    assert monitor.check().version == 4
    monitor.close()


def test_an_error_of_the_read_is_told_and_not_raised(file_domain):
    domain = file_domain()

    def read(opened):
        raise StorageError(5, path=opened.name, operation="read")

    status = DomainMonitor(domain.uuid, lambda: FileDomain.open(domain.name), Clock(), read=read).check()
    assert status.valid is False and domain.name in status.error


def test_a_domain_is_lost_when_all_hosts_say_so_for_the_grace_period_and_comes_back_by_itself():
    recovery, uuid = Recovery(RecoveryPolicy(300, 300)), make_id()
    recovery.report(1, uuid, False, 0)
    recovery.report(2, uuid, True, 0)
    assert recovery.events(400) == [] and recovery.hosts_in_trouble(400) == {1: [uuid]}
    recovery.report(2, uuid, False, 500)
    assert recovery.events(799) == []
    assert recovery.events(800) == [Event("lost", uuid)] and recovery.lost == {uuid}
    assert recovery.events(1000) == [] and recovery.hosts_in_trouble(1000) == {}
    assert recovery.events(1100) == [Event("try", uuid)] and recovery.events(1101) == []
    recovery.report(1, uuid, True, 1200)
    assert recovery.events(1200) == [Event("back", uuid)] and recovery.lost == frozenset()
    assert recovery.events(1201) == []


def test_a_short_failure_is_not_a_loss():
    recovery, uuid = Recovery(), make_id()
    for time, valid in ((0, False), (200, True), (210, False)):
        recovery.report(1, uuid, valid, time)
        assert recovery.events(time) == []
    assert recovery.events(400) == []


def test_hosts_that_left_and_domains_taken_away_on_purpose_count_for_nothing():
    recovery, uuid = Recovery(), make_id()
    recovery.report(1, uuid, True, 0)
    recovery.report(2, uuid, False, 0)
    recovery.forget_host(1)
    assert recovery.events(300) == [Event("lost", uuid)]
    recovery.watch([])
    recovery.report(2, uuid, True, 400)
    assert recovery.events(400) == []
    recovery.forget_host(2)
    assert recovery.events(10**6) == []


@pytest.mark.parametrize("hosts", [1, 3])
def test_each_event_comes_once_however_often_it_is_asked(hosts):
    recovery, uuid, seen = Recovery(), make_id(), []
    for now in range(0, 2000, 10):
        for host in range(hosts):
            recovery.report(host, uuid, now >= 1500, now)
        seen += recovery.events(now)
    assert [event.kind for event in seen] == ["lost", "try", "try", "try", "back"]
