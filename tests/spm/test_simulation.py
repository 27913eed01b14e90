# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Pools of hosts in virtual time: nothing breaks S1 to S6, and each rule is needed for that.

A failure names the command that repeats it exactly, ``./run simulate --seed ...``.
"""

import os
import subprocess
import sys

import pytest

from spm.testing.__main__ import command, main
from spm.testing.cluster import SimCluster, simulate
from spm.testing.rules import CAUGHT_BY, Rules

LONG = int(os.environ.get("QCOWLIB_LONG", "1"))
SHORT = {"hosts": 3, "hours": 0.25, "fault_s": 30.0}


@pytest.mark.fuzz
@pytest.mark.parametrize("start", range(0, 10_000, 1000))
def test_s1_to_s6_hold_for_every_seed(start):
    findings = {}
    for seed in range(start, start + min(1000, 200 * LONG)):
        outcome = simulate(seed, **SHORT)
        if outcome.findings:
            findings[command(seed, **SHORT)] = outcome.findings[0]
    assert not findings


@pytest.mark.fuzz
def test_s1_to_s6_hold_for_250_hosts_and_a_day():
    outcome = simulate(1, hosts=250, hours=24)
    assert not outcome.findings, command(1, 250, 24, 120)
    assert outcome.terms > 200 and outcome.answered > 200 and outcome.faults > 500


def test_s3_extensions_come_through_all_faults():
    outcome = simulate(5, hosts=8, hours=1.0)
    assert not outcome.findings
    assert outcome.answered > 20


def test_equal_seeds_give_equal_histories_and_others_do_not():
    histories = [simulate(seed, **SHORT).digest for seed in (11, 11, 12)]
    assert histories[0] == histories[1] != histories[2]


@pytest.mark.parametrize("rule", Rules._fields)
def test_rule_that_is_taken_away_is_missed_in_the_history_recorded_for_it(rule):
    seed, hosts, hours, fault_s = CAUGHT_BY[rule]
    size = {"hosts": hosts, "hours": hours, "fault_s": fault_s}
    assert simulate(seed, rules=Rules().without(rule), **size).findings
    assert not simulate(seed, **size).findings


def test_printed_command_repeats_a_finding_exactly(capsys):
    arguments = command(*CAUGHT_BY["settle"], without="settle").split()
    assert arguments[:2] == ["./run", "simulate"]
    assert main(arguments[2:]) == 1
    said = capsys.readouterr().out
    assert "wrote at epoch 7 over epoch 8" in said and " ".join(arguments) in said
    # Another process has other hash seeds.
    again = subprocess.run(
        [sys.executable, "-m", "spm.testing", *arguments[2:]], capture_output=True, text=True, check=False
    )
    assert (again.returncode, again.stdout) == (1, said)


def test_search_over_seeds_tells_how_much_it_saw(capsys):
    assert main(["--seed", "7", "--seeds", "3", "--hosts", "3", "--hours", "0.1"]) == 0
    assert "3 histories, 0 with findings" in capsys.readouterr().out


@pytest.mark.parametrize("bad", ["--hosts 251", "--hosts 0", "--hours 0", "--fault-seconds 0", "--without luck"])
def test_sizes_that_make_no_sense_are_refused(bad, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(bad.split())
    assert capsys.readouterr().err


def test_without_faults_one_manager_serves_all_the_time():
    cluster = SimCluster(3, hosts=5, fault_s=1e9)
    outcome = cluster.run(1.0)
    assert not outcome.findings
    assert (outcome.terms, outcome.faults) == (1, 0)
