# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Who tries to become the manager, and when."""

import pytest

from spm.election import Action, Candidate, Election, PoolView, order
from spm.timing import ElectionTiming

TIMING = ElectionTiming()
FREE = PoolView(None, "free", None, 1, tuple(Candidate(number) for number in range(1, 6)))


def elect(view, **options):
    return {candidate.host_id: Election(candidate.host_id, TIMING, **options) for candidate in view.candidates}


def first_to_contend(view, hosts, until_s=TIMING.round_s):
    """Return (time, host) of the first try, everybody looking when it wants to."""
    wake = dict.fromkeys(hosts, 0.0)
    while wake:
        host_id = min(wake, key=lambda number: (wake[number], number))
        now_s = wake[host_id]
        if now_s > until_s:
            return None
        action = hosts[host_id].observe(now_s, view)
        if action.kind == "contend":
            return now_s, host_id
        wake[host_id] = action.again_s
    return None


def test_s6_first_of_the_order_tries_at_once_and_alone():
    hosts = elect(FREE)
    assert first_to_contend(FREE, hosts) == (0.0, order(FREE)[0])
    others = [host for number, host in hosts.items() if number != order(FREE)[0]]
    assert all(host.observe(1.0, FREE).kind == "wait" for host in others)


def test_s6_every_live_candidate_has_its_turn_within_one_round():
    view = FREE._replace(candidates=tuple(Candidate(number) for number in range(1, 251)))
    for host in elect(view).values():
        kinds = [host.observe(now_s, view).kind for now_s in (0.0, TIMING.round_s)]
        assert "contend" in kinds


@pytest.mark.parametrize("state", ["live", "fail", "unknown"])
def test_lease_of_a_host_that_may_live_is_left_alone(state):
    assert first_to_contend(FREE._replace(owner=3, owner_state=state), elect(FREE)) is None


@pytest.mark.parametrize("state", ["dead", "free"])
def test_lease_of_a_dead_host_can_be_had(state):
    assert first_to_contend(FREE._replace(owner=3, owner_state=state), elect(FREE)) is not None


def test_priority_decides_and_below_one_means_never():
    view = FREE._replace(candidates=(Candidate(1, 1), Candidate(2, 9), Candidate(3, -1), Candidate(4, 0)))
    assert order(view) == [2, 1]
    hosts = elect(view)
    assert hosts[3].observe(1e6, view) == Action("wait", 1e6 + TIMING.poll_s)


def test_newer_knowledge_of_the_pool_goes_before_priority():
    assert order(FREE._replace(candidates=(Candidate(1, 10, 1), Candidate(2, 1, 2))))[0] == 2


def test_last_manager_goes_first_among_equals():
    for number in range(1, 6):
        assert order(FREE._replace(last_spm=number))[0] == number


def test_equals_take_turns_from_term_to_term():
    assert {order(FREE._replace(epoch=epoch))[0] for epoch in range(40)} == {1, 2, 3, 4, 5}


def test_failed_start_sets_a_host_aside_longer_each_time():
    host = Election(1, TIMING)
    waits = []
    now_s = 0.0
    for _ in range(8):
        action = host.observe(now_s, FREE)
        while action.kind == "wait":
            now_s = action.again_s
            action = host.observe(now_s, FREE)
        host.failed(now_s, held=False)
        started_s = now_s
        action = host.observe(now_s, FREE)
        while action.kind == "wait":
            now_s = action.again_s
            action = host.observe(now_s, FREE)
        waits.append(now_s - started_s)
        host.role = "Free"
    assert waits == sorted(waits)
    assert waits[-1] == TIMING.backoff_limit_s


def test_being_slower_than_another_host_is_no_failure():
    host = Election(order(FREE)[0], TIMING)
    assert host.observe(0.0, FREE).kind == "contend"
    host.failed(0.0, held=True)
    assert host.observe(0.0, FREE).kind == "wait"
    assert host.observe(TIMING.stagger_s, FREE).kind == "contend"


def test_storage_that_came_back_makes_failures_forgotten():
    host = Election(order(FREE)[0], TIMING)
    host.observe(0.0, FREE)
    host.failed(0.0, held=False)
    assert host.observe(1.0, FREE).kind == "wait"
    assert host.observe(2.0, None).kind == "wait"
    assert host.observe(3.0, FREE).kind == "contend"


def test_s6_only_candidate_tries_again_at_each_look():
    view = FREE._replace(candidates=(Candidate(4),))
    host = Election(4, TIMING)
    host.observe(0.0, view)
    for _ in range(5):
        host.failed(0.0, held=False)
    assert host.observe(0.0, view).kind == "wait"
    assert host.observe(TIMING.poll_s, view).kind == "contend"


def test_host_that_lost_its_lease_lets_others_go_first():
    host = Election(order(FREE)[0], TIMING)
    host.observe(0.0, FREE)
    host.won()
    assert host.role == "SPM"
    host.ended(100.0, lost=True)
    assert host.observe(100.0, FREE).kind == "wait"
    assert host.observe(100.0 + TIMING.round_s, FREE).kind == "contend"


def test_host_that_is_not_willing_tries_only_when_told():
    host = Election(order(FREE)[0], TIMING, willing=False)
    assert host.observe(0.0, FREE).kind == "wait"
    assert host.told() and host.role == "Contend"
    assert not host.told()
