# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Compiled scans against the obvious Python for them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcowlib.native import (
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
