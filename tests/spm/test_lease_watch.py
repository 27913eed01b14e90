# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The holder's judgement of its lease, and the order of times that it rests on."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowlib.errors import StorageError
from spm.errors import LeaseLost, NotSpm
from spm.lease_watch import PASSING_ERRORS, LeaseToken, LeaseWatch, next_epoch
from spm.proof import LeaseProof
from spm.timing import ElectionTiming, LeaseTiming, budget, diagram
from storage_pool.leases import LeaseOwner

OWN = LeaseOwner(7, 3, 41)
TIMING = LeaseTiming(io_timeout_s=1.0)


def proof(renewed_s, **changes):
    return LeaseProof(renewed_s, OWN.generation, OWN)._replace(**changes)


class Host:
    """A token with a clock and a storage that the test moves."""

    def __init__(self):
        self.now_s = 100.0
        self.answer = proof(100.0)
        self.stored_epoch = 5
        self.connected = True
        self.asked = 0
        self.lost = []
        self.token = LeaseToken(
            LeaseWatch(TIMING, OWN, 5, self.answer, self.now_s),
            lambda: self.now_s,
            self.prove,
            self.lost.append,
            lambda: self.connected,
        )

    def prove(self):
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer, self.stored_epoch


@pytest.fixture
def host():
    return Host()


@given(st.floats(0.1, 25), st.floats(0.5, 4))
def test_s1_times_are_in_the_order_that_safety_needs(io_timeout_s, margin):
    lease = LeaseTiming(io_timeout_s, margin)
    assert lease.renewal_s <= lease.deadline_s < lease.limit_s < lease.death_s
    assert lease.deadline_s + lease.landing_s <= lease.death_s + 1e-9
    moments = [moment.after_s for moment in budget(lease, ElectionTiming())]
    assert all(later > earlier - 1e-9 for earlier, later in pairwise(moments))


def test_budget_of_the_default_timeout_is_the_documented_one():
    lines = diagram(LeaseTiming(), ElectionTiming()).splitlines()
    assert [float(line.split()[0]) for line in lines] == [0, 20, 60, 80, 140, 140, 166]


def test_s2_fresh_lease_costs_no_question(host):
    for _ in range(10):
        host.now_s += 0.1
        host.token.check()
    assert host.asked == 0
    assert host.token.epoch == 5


def test_s2_gap_in_progress_asks_before_the_next_change(host):
    host.now_s += TIMING.gap_s + 0.1
    host.answer = proof(host.now_s)
    host.token.check()
    assert host.asked == 1


def test_s2_pause_noticed_by_the_heartbeat_still_asks_before_the_next_change(host):
    host.now_s += TIMING.gap_s + 0.1
    assert host.token.watch.judge(host.now_s) == "stale"
    host.now_s += 0.01
    host.token.check()
    assert host.asked == 1


def test_s2_lease_that_another_host_took_meanwhile_is_lost_for_good(host):
    host.now_s += 70
    host.answer = proof(host.now_s, owner=LeaseOwner(8, 1, 42))
    with pytest.raises(NotSpm, match="another host"):
        host.token.check()
    host.answer = proof(host.now_s)
    with pytest.raises(LeaseLost):
        host.token.check()
    assert host.lost == ["another host holds the lease"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"owner": None}, "free"),
        ({"owner": OWN._replace(version=40)}, "another term"),
        ({"owner": OWN._replace(generation=4)}, "another term"),
        ({"generation": 4}, "another term"),
        ({"renewed_s": 95.0}, "no renewal"),
    ],
)
def test_s2_what_is_not_this_term_is_refused(host, changes, words):
    host.now_s += TIMING.recheck_s
    host.answer = proof(host.now_s)._replace(**changes)
    with pytest.raises(LeaseLost, match=words):
        host.token.check()


def test_s2_larger_epoch_in_the_pool_ends_the_term(host):
    host.now_s += TIMING.recheck_s
    host.answer = proof(host.now_s)
    host.stored_epoch = 6
    with pytest.raises(LeaseLost, match="epoch 6"):
        host.token.check()


def test_ls09_lease_of_a_daemon_that_went_away_is_lost_at_once(host):
    host.connected = False
    with pytest.raises(LeaseLost, match="daemon is gone"):
        host.token.check()
    assert host.asked == 0 and host.lost


def test_s2_deadline_ends_the_right_although_storage_cannot_be_asked(host):
    host.answer = StorageError(5, operation="read")
    host.now_s += TIMING.deadline_s
    with pytest.raises(LeaseLost, match="could not be proved"):
        host.token.check()
    assert host.lost and not host.token.valid


def test_s2_deadline_passes_while_asking(host):
    host.now_s += TIMING.recheck_s

    def slow():
        host.now_s += TIMING.deadline_s
        return proof(100.0), 5

    host.token._prove = slow
    with pytest.raises(LeaseLost, match="no renewal"):
        host.token.check()


def test_renewals_that_are_proved_move_the_deadline(host):
    for _ in range(50):
        host.now_s += TIMING.renewal_s
        host.answer = proof(host.now_s - 0.5)
        host.token.check()
    assert host.token.watch.deadline_s == host.now_s - 0.5 + TIMING.deadline_s


def test_ls15_passing_error_refuses_the_change_and_keeps_the_lease(host):
    host.answer = StorageError(5, operation="read")
    host.now_s += TIMING.recheck_s
    for _ in range(PASSING_ERRORS):
        with pytest.raises(LeaseLost, match="nothing was changed"):
            host.token.check()
    host.answer = proof(host.now_s)
    host.token.check()
    assert not host.lost


def test_ls15_more_passing_errors_in_a_row_lose_the_lease(host):
    host.answer = StorageError(5, operation="read")
    host.now_s += TIMING.recheck_s
    for _ in range(PASSING_ERRORS + 1):
        with pytest.raises(LeaseLost):
            host.token.check()
    assert len(host.lost) == 1
    assert not host.token.valid


def test_clock_that_goes_back_makes_everything_known_old(host):
    host.now_s -= 1
    host.token.check()
    assert host.asked == 1


def test_right_that_was_given_back_is_gone_and_nobody_is_alarmed(host):
    host.token.give_up()
    with pytest.raises(LeaseLost, match="given back"):
        host.token.check()
    assert host.lost == []


@pytest.mark.parametrize(("stored", "own", "new"), [(0, 0, 1), (7, 3, 8), (3, 7, 8)])
def test_s2_epoch_of_a_new_term_is_above_stored_and_own(stored, own, new):
    assert next_epoch(stored, own) == new
