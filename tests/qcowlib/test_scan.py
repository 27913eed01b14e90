# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Compiled scans against the obvious Python for them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcowlib.native import (
    ReferenceCounts,
    TableSet,
    bitmap_count,
    bitmap_merge,
    bitmap_runs,
    bitmap_set,
    first_difference,
    is_zero,
    zero_runs,
)

pieces = st.lists(st.tuples(st.sampled_from([b"\0", b"\1", b"\xff", b"\0\1"]), st.integers(1, 700)), max_size=8)


def joined(parts: list[tuple[bytes, int]]) -> bytes:
    return b"".join(text * count for text, count in parts)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 255, 256, 257, 511, 16384, 20001])
def test_is_zero_finds_one_bit_at_each_end(length: int) -> None:
    data = bytearray(length)
    assert is_zero(data)
    for at in {0, length // 2, length - 1} if length else ():
        data[at] = 0x80
        assert not is_zero(data)
        data[at] = 0


@settings(max_examples=60, deadline=None)
@given(pieces, st.integers(1, 600))
def test_zero_runs_cover_and_alternate(parts: list[tuple[bytes, int]], unit: int) -> None:
    data = joined(parts)
    flags = [not any(data[at : at + unit]) for at in range(0, len(data), unit)]
    expected = []
    at = 0
    for zero, group in itertools.groupby(flags):
        length = min(len(list(group)) * unit, len(data) - at)
        expected.append((at, length, zero))
        at += length
    assert zero_runs(data, unit) == expected


def test_zero_runs_refuses_unit_zero() -> None:
    with pytest.raises(ValueError, match="unit"):
        zero_runs(b"", 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 200_000), st.data())
def test_first_difference_names_the_sector(length: int, data: st.DataObject) -> None:
    left = bytes(length)
    right = bytearray(left)
    assert first_difference(left, right) is None
    if length:
        at = data.draw(st.integers(0, length - 1))
        right[at] = 1
        assert first_difference(left, right) == at // 512 * 512
        assert first_difference(left[:at], right) is None


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 40), st.data())
def test_bitmap_functions_agree_with_a_set_of_bits(length: int, data: st.DataObject) -> None:
    bitmap = bytearray(length)
    model: set[int] = set()
    for _ in range(4):
        first = data.draw(st.integers(0, length * 8))
        count = data.draw(st.integers(0, length * 8 - first))
        value = data.draw(st.booleans())
        bitmap_set(bitmap, first, count, value)
        model = model | set(range(first, first + count)) if value else model - set(range(first, first + count))
    assert bitmap_count(bitmap) == len(model)
    first = data.draw(st.integers(0, length * 8))
    count = data.draw(st.integers(0, length * 8 - first))
    runs = bitmap_runs(bitmap, first, count)
    seen = {bit for start, size in runs for bit in range(start, start + size)}
    assert seen == model & set(range(first, first + count))
    assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(runs))


def test_bitmap_merge_sets_and_never_clears() -> None:
    target = bytearray(b"\x01\x80\x00")
    bitmap_merge(target, b"\x02\x00\xff")
    assert target == b"\x03\x80\xff"
    with pytest.raises(ValueError, match="lengths"):
        bitmap_merge(target, b"\0")


@pytest.mark.parametrize(("first", "count"), [(17, 0), (0, 17), (16, 1), (8, 1 << 62)])
def test_bits_outside_the_bitmap_are_refused(first: int, count: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        bitmap_set(bytearray(2), first, count)
    with pytest.raises(ValueError, match="outside"):
        bitmap_runs(bytearray(2), first, count)


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
