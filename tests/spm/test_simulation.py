# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Pools of hosts in virtual time: nothing breaks S1 to S6, and each rule is needed for that.

A failing seed is repeated by ``simulate(seed, hosts=..., hours=..., fault_s=...)``.
"""

import itertools
import os

import pytest

from spm.testing.cluster import SimCluster, simulate
from spm.testing.rules import Rules

LONG = int(os.environ.get("QCOWLIB_LONG", "1"))
SHORT = {"hosts": 3, "hours": 0.25, "fault_s": 30.0}
# Where the search for a history that needs the rule begins; rare ones would take long from 0.
FIRST_SEED = {"set_aside": 16, "settle": 40, "wait_for_death": 560}


@pytest.mark.fuzz
@pytest.mark.parametrize("start", range(0, 10_000, 1000))
def test_s1_to_s6_hold_for_every_seed(start):
    findings = {}
    for seed in range(start, start + min(1000, 60 * LONG)):
        outcome = simulate(seed, **SHORT)
        if outcome.findings:
            findings[seed] = outcome.findings[0]
    assert not findings


@pytest.mark.fuzz
def test_s1_to_s6_hold_for_250_hosts():
    outcome = simulate(1, hosts=250, hours=min(24, 2 * LONG))
    assert not outcome.findings
    assert outcome.terms > 5 and outcome.answered > 20 and outcome.faults > 20


def test_s3_extensions_come_through_all_faults():
    outcome = simulate(5, hosts=8, hours=1.0)
    assert not outcome.findings
    assert outcome.answered > 20


def test_equal_seeds_give_equal_histories_and_others_do_not():
    histories = [simulate(seed, **SHORT).digest for seed in (11, 11, 12)]
    assert histories[0] == histories[1] != histories[2]


@pytest.mark.parametrize("rule", Rules._fields)
def test_rule_that_is_taken_away_is_missed(rule):
    """Each rule alone is needed: without it some history of the first few hundred breaks an invariant."""
    size = {"hosts": 5, "hours": 2.0} if rule == "set_aside" else SHORT
    seeds = range(FIRST_SEED.get(rule, 0), 1000)
    outcomes = (simulate(seed, rules=Rules().without(rule), **size) for seed in seeds)
    assert next((outcome.findings[0] for outcome in itertools.islice(outcomes, 150) if outcome.findings), None)


def test_without_faults_one_manager_serves_all_the_time():
    cluster = SimCluster(3, hosts=5, fault_s=1e9)
    outcome = cluster.run(1.0)
    assert not outcome.findings
    assert (outcome.terms, outcome.faults) == (1, 0)
