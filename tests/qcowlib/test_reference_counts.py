# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""References counted by the compiled core against the obvious Python for them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcowlib.native import ReferenceCounts, TableSet


def block_of(counts: ReferenceCounts, order: int, values: dict[int, int]) -> bytes:
    """A refcount block with *values*, packed by counting them."""
    other = ReferenceCounts(counts.cluster_bits, order, counts.file_size, 1)
    for cluster, value in values.items():
        other.reference(cluster << counts.cluster_bits, 1, value)
    return bytes(other.pack_block(0))


@pytest.mark.parametrize("order", range(7))
def test_reference_counts_compare_with_stored_ones_of_each_width(order: int) -> None:
    top = min((1 << (1 << order)) - 1, 70_000)
    counts = ReferenceCounts(9, order, 40 << 9, 1)
    counts.set_block(0, block_of(counts, order, {0: 1, 3: top, 5: 1}))
    for cluster, count in ((0, 1), (3, top), (6, 1)):
        counts.reference(cluster << 9, 512, count)
    assert counts.stored(3) == counts.counted(3) == top
    leaks, low, unreadable, missing, highest, found = counts.compare(10)
    assert (leaks, low, unreadable, missing, highest) == (1, 1, 0, True, 6)
    assert found == [(5, 1, 0), (6, 0, 1)]
    assert counts.fix_block(0, True, False) is None
    fixed = counts.fix_block(0, True, True)
    assert fixed is not None
    counts.set_block(0, fixed)
    assert (counts.stored(3), counts.stored(5), counts.stored(6)) == (top, 0, 0)


@pytest.mark.parametrize("order", range(7))
def test_reference_counts_stop_at_the_width(order: int) -> None:
    top = (1 << (1 << order)) - 1
    counts = ReferenceCounts(9, order, 1 << 20, 1)
    counts.reference(512, 512, top)
    counts.reference(512, 512, 3)
    assert counts.counted(1) == top
    assert counts.overflows == 3


def test_reference_past_the_end_by_a_cluster_is_not_counted() -> None:
    counts = ReferenceCounts(9, 4, 1000, 1)
    counts.reference(512, 999)
    assert (counts.corruptions, counts.counted(1), counts.counted(2)) == (0, 1, 1)
    counts.reference(512, 1000)
    counts.reference(1 << 63, 1 << 63)
    assert (counts.corruptions, counts.counted(1)) == (2, 1)


def test_free_clusters_are_found_between_and_behind_counted_ones() -> None:
    counts = ReferenceCounts(9, 4, 4000 << 9, 1)
    for cluster in (0, 1, 3, 2000):
        counts.reference(cluster << 9, 512)
    assert counts.find_free(0, 1) == 2
    assert counts.find_free(0, 2) == 4
    assert counts.find_free(0, 1996) == 4
    assert counts.find_free(0, 1997) == 2001
    assert counts.find_free(5000, 3) == 5000
    assert [counts.next_counted(at) for at in (0, 2, 4, 2001)] == [0, 3, 2000, 4000]


@pytest.mark.parametrize("geometry", [(8, 4, 1), (22, 4, 1), (9, 7, 1), (9, 4, 1 << 62), (9, 4, 1 << 41)])
def test_reference_counts_refuse_a_geometry_they_cannot_hold(geometry: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"range|many"):
        ReferenceCounts(geometry[0], geometry[1], geometry[2], 1)


def test_tables_are_merged_and_ordered() -> None:
    counts = ReferenceCounts(9, 4, 1 << 20, 1)
    tables = TableSet()
    entries = [7 << 9, 3 << 9, 0, 7 << 9, 1 << 30]
    tables.add_l1(counts, b"".join(entry.to_bytes(8, "big") for entry in entries), 2, True)
    tables.finish()
    assert [tables.offset(index) for index in range(len(tables))] == [3 << 9, 7 << 9]
    assert tables.weight_of(7 << 9) == 4
    assert tables.window(0, 512, 1 << 20, 4096) == (2, 8 << 9)
    assert tables.window(0, 512, 1 << 20, 512) == (1, 4 << 9)
    assert counts.corruptions == 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=64, max_size=64), st.integers(1, 3), st.booleans())
def test_runs_of_clusters_count_as_single_ones_do(places: list[int], weight: int, follow: bool) -> None:
    if follow:
        places = [5 + index % 30 for index in range(64)]
    table = b"".join((place << 9 | (1 << 63 if place else 0)).to_bytes(8, "big") for place in places)
    counts = ReferenceCounts(9, 4, 41 << 9, 1)
    tables = TableSet()
    l1 = (50 << 9 | 1 << 63).to_bytes(8, "big")
    counts.grow(51 << 9)
    counts.set_block(0, block_of(counts, 4, dict.fromkeys(range(41), 1)))
    tables.add_l1(counts, l1, weight, True)
    counts.scan_tables(table, 50 << 9, tables, 0, 1)
    for place in range(1, 41):
        assert counts.counted(place) == places.count(place) * weight
    assert counts.allocated == weight * sum(place > 0 for place in places)
