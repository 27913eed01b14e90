# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The last part of the demo: three hosts, with daemons or in the simulator, and what it says when all is not well."""

import shutil

import pytest

from spm.cli import demo
from spm.cli.demo import hosts_demo

pytestmark = pytest.mark.bare


@pytest.mark.real("sanlock")
def test_manager_is_killed_and_another_ends_its_work(monkeypatch):
    told = []
    results = hosts_demo(told.append)
    assert told == results and [result.problem for result in results] == [None] * 4
    assert "in term 2" in results[-1].text


def test_simulator_stands_in_and_says_so(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (result,) = hosts_demo(lambda result: None)
    assert result.problem is None and result.kind == "hosts in the simulator" and "not installed" in result.text


@pytest.mark.real("sanlock")
def test_hosts_that_do_not_start_are_a_problem(monkeypatch):
    monkeypatch.setattr(demo, "_LIMIT_S", 0.2)
    results = hosts_demo(lambda result: None)
    assert len(results) == 1 and results[0].problem is not None
