# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Sizes against tables made by the real functions."""

import pytest

from storage_pool import sizes
from storage_pool.errors import IllegalSpec, InvalidName
from storage_pool.thin import ThinPolicy, thin_max_size


def test_bd09_lv_size_for_every_mix_of_type_format_capacity_and_initial_size(tables):
    for row in tables["block_alloc"]["rows"]:
        arguments = (row["capacity"], row["format"], row["type"], row["initial_size"])
        if "error" in row:
            with pytest.raises(IllegalSpec):
                sizes.new_lv_size(*arguments)
            continue
        size = sizes.new_lv_size(*arguments)
        assert (size, sizes.lvcreate_mib(size), sizes.lv_size(size)) == (
            row["alloc"],
            row["lvcreate_mib"],
            row["lv_bytes"],
        ), row


def test_bd11_max_sizes_of_raw_and_cow_on_both_kinds_of_storage(tables):
    for row in tables["max_size"]:
        assert sizes.max_size(row["capacity"], row["format"], block=True) == row["block"]
        assert sizes.max_size(row["capacity"], row["format"], block=False) == row["file"]


def test_bd11_optimal_sizes_of_leaf_and_internal_volumes(tables):
    for row in tables["optimal_cow_size"]:
        assert sizes.optimal_cow_size(row["required"], row["capacity"], leaf=row["leaf"]) == row["optimal"], row


def test_bd10_small_cow_volumes_do_not_exceed_capacity_rounded_to_an_extent():
    size = sizes.new_lv_size(1 << 20, "COW", "SPARSE")
    assert sizes.lv_size(size) == sizes.EXTENT


def test_thin_extension_asks_for_the_sizes_that_others_would(tables):
    for row in tables["extend"]["rows"]:
        policy = ThinPolicy().replicating() if row["replicating"] else ThinPolicy()
        assert policy.chunk == row["chunk"]
        assert policy.limit == row["watermark_limit"]
        assert policy.threshold(row["current"]) == row["threshold"]
        assert policy.next_size(row["current"], row["capacity"]) == row["next_size"]
        assert thin_max_size(row["capacity"]) == row["max_size"]


def test_thin_volume_grows_only_below_its_limit_of_free_space():
    policy, capacity, size = ThinPolicy(), 1 << 40, 8 << 30
    assert not policy.needs_growth(size, size - policy.limit, capacity)
    assert policy.needs_growth(size, size - policy.limit + 1, capacity)
    assert not policy.needs_growth(thin_max_size(capacity), thin_max_size(capacity), capacity)
    assert policy.is_faulty(size, policy.next_size(size, capacity) + 1, capacity)


def test_ls12_alignment_by_block_size_and_number_of_hosts(tables):
    for row in tables["alignment"]:
        if "error" in row:
            with pytest.raises(InvalidName):
                sizes.sanlock_alignment(row["block_size"], row["max_hosts"])
        else:
            assert sizes.sanlock_alignment(row["block_size"], row["max_hosts"]) == row["alignment"]


def test_fd09_capacity_is_rounded_up_to_4096():
    assert [sizes.capacity_for(size) for size in (1, 4096, 4097)] == [4096, 4096, 8192]


@pytest.mark.parametrize("size", [0, -1, 2**63])
def test_capacity_outside_what_a_record_holds_is_refused(size):
    with pytest.raises(IllegalSpec):
        sizes.capacity_for(size)


def test_fd06_initial_size_is_ignored_for_raw_preallocated_and_refused_beyond_capacity():
    assert sizes.file_initial_size(8192, "RAW", "PREALLOCATED", 4096) is None
    with pytest.raises(IllegalSpec):
        sizes.file_initial_size(8192, "RAW", "PREALLOCATED", 8193)


@pytest.mark.parametrize(("fmt", "kind"), [("RAW", "SPARSE"), ("COW", "SPARSE"), ("COW", "PREALLOCATED")])
def test_fd07_initial_size_of_other_volumes_in_files_is_refused(fmt, kind):
    assert sizes.file_initial_size(8192, fmt, kind, 0) is None
    with pytest.raises(IllegalSpec):
        sizes.file_initial_size(8192, fmt, kind, 4096)
