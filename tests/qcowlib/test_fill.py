# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The compiled fill functions of new images keep inside their buffers."""

from __future__ import annotations

import struct

import pytest

from qcowlib.native import add_refcount, count_refcounts, fill_entries


def test_entries_form_a_series_and_leave_the_rest_alone() -> None:
    table = bytearray(64)
    fill_entries(table, 2, 3, 1 << 63, 512, 1, 0)
    assert struct.unpack(">8Q", table) == (0, 0, 1 << 63, (1 << 63) + 512, (1 << 63) + 1024, 0, 0, 0)
    fill_entries(table, 0, 1, 7, 0, 2, 9)
    assert struct.unpack(">2Q", table[:16]) == (7, 9)


@pytest.mark.parametrize("order", range(7))
def test_refcounts_of_every_width_are_counted_once(order: int) -> None:
    block = bytearray(64)
    per_block = 512 >> order
    count_refcounts(block, 1, per_block - 1, order)
    count_refcounts(block, 1, per_block - 1, order)
    assert add_refcount(block, 0, order) == 1
    if order:
        assert add_refcount(block, per_block - 1, order) == 2
    else:
        with pytest.raises(OverflowError):
            add_refcount(block, 0, order)


def test_nothing_is_stored_past_the_end() -> None:
    block = bytearray(64)
    for first, count in ((8, 1), (0, 9), (2**63, 2**63), (1, 2**64 - 1)):
        with pytest.raises(IndexError):
            fill_entries(block, first, count, 0, 0, 1, 0)
    for first, count in ((33, 0), (32, 1), (1, 2**64 - 1)):
        with pytest.raises(IndexError):
            count_refcounts(block, first, count, 4)
    with pytest.raises(IndexError):
        add_refcount(block, 32, 4)
    assert block == bytes(64)
