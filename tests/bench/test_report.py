# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The table of ratios pairs peers with us, and its guard looks at ratios only."""

from __future__ import annotations

from typing import Any

import pytest
import report

pytestmark = pytest.mark.bare


def record(group: str, who: str, seconds: float, amount: int = 1) -> dict[str, Any]:
    return {
        "group": group,
        "stats": {"min": seconds},
        "extra_info": {"who": who, "amount": amount, "unit": "call"},
    }


def test_ratio_is_the_peers_time_for_one_unit_by_ours() -> None:
    (row,) = report.rows([record("map", "qcowlib", 2.0, 4), record("map", "qemu-img", 6.0, 2)])
    assert (row.who, row.ratio) == ("qemu-img", 6.0)


def test_group_without_us_gives_no_row() -> None:
    assert report.rows([record("map", "qemu-img", 6.0)]) == []


def test_guard_reports_only_a_ratio_that_fell_by_more_than_a_quarter() -> None:
    table = report.rows([record("map", "qcowlib", 1.0), record("map", "qemu-img", 3.0), record("map", "libqcow", 3.1)])
    fallen = report.regressions(table, {"map | qcowlib | qemu-img": 4.1, "map | qcowlib | libqcow": 4.1})
    assert fallen == ["map | qcowlib | qemu-img: 3.00, was 4.10"]


def test_table_names_a_missed_target() -> None:
    text = report.markdown(report.rows([record("map, full", "qcowlib", 1.0), record("map, full", "qemu-img", 3.0)]))
    assert "**20, missed**" in text
