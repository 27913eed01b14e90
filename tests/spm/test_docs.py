# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The page about the manager shows the numbers and rules of the code."""

import pytest

from spm.testing.rules import Rules
from spm.timing import ElectionTiming, LeaseTiming, diagram


@pytest.fixture(scope="module")
def page(project_root):
    return (project_root / "docs/spm.md").read_text()


@pytest.mark.parametrize("timeout_s", [10.0, 1.0])
def test_time_budget_in_the_docs_is_the_one_of_the_code(page, timeout_s):
    assert f"```\n{diagram(LeaseTiming(timeout_s), ElectionTiming())}```" in page


@pytest.mark.parametrize("rule", Rules._fields)
def test_rule_that_the_simulation_can_take_away_is_in_the_docs(page, rule):
    assert f"`{rule}`" in page
