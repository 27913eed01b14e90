# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Names, tags, slots and areas."""

import pytest

from storage_pool import layout
from storage_pool.errors import InvalidName, MetadataError, NoSpace
from storage_pool.ids import BLANK, make_id


def test_bd04_slot_and_lease_offsets_of_v4_and_v5(tables):
    for row in tables["slots"]:
        assert layout.slot_offset(row["slot"], 4) == row["v4_offset"]
        assert layout.slot_offset(row["slot"], 5) == row["v5_offset"]
        assert layout.lease_offset(row["slot"]) == row["lease_offset_1m"]
        assert layout.lease_offset(row["slot"], 8 << 20) == row["lease_offset_8m"]


def test_bd05_the_lowest_free_slot_is_chosen_and_reserved_ones_skipped():
    assert layout.choose_slot([], 4) == 4
    assert layout.choose_slot([], 5) == 1
    assert layout.choose_slot([1, 2, 4], 5) == 3
    assert layout.choose_slot([1, 2, 3, 4, 6], 4) == 5


def test_slots_end_where_the_leases_end():
    assert layout.choose_slot(range(1947), 5) == 1947
    with pytest.raises(NoSpace, match="1947"):
        layout.choose_slot(range(1948), 5)


def test_bd06_tags_are_read_or_named_as_missing_or_bad():
    parent, image = make_id(), make_id()
    tags = layout.volume_tags(7, parent, image)
    assert layout.parse_volume_tags(["MS_4", *tags]) == layout.VolumeTags(7, parent, image)
    for prefix in ("MD_", "PU_", "IU_"):
        with pytest.raises(MetadataError, match=prefix):
            layout.parse_volume_tags([tag for tag in tags if not tag.startswith(prefix)])
    for bad in ("MD_x", "MD_", "MD_-1", "MD_٣"):
        with pytest.raises(MetadataError, match="slot"):
            layout.parse_volume_tags([bad, *tags[1:]])
        assert layout.slot_of([bad]) is None
    with pytest.raises(MetadataError, match="bad tags"):
        layout.parse_volume_tags([*tags[:2], "IU_../x"])


@pytest.mark.parametrize(("mark", "zeroing"), [("_remove_me_", False), ("_remove_me_ZERO_", True)])
def test_removed_volumes_are_told_by_their_image_tag(mark, zeroing):
    image = make_id()
    got = layout.parse_volume_tags(["MD_5", f"PU_{BLANK}", f"IU_{mark}{image}"])
    assert (got.image, got.removed, got.zeroing) == (image, True, zeroing)
    assert got.image_name == mark + image


def test_tags_are_made_of_checked_names_only():
    for arguments in ((1, "x", make_id()), (1, BLANK, "@all"), (-1, BLANK, make_id()), (1, BLANK, BLANK)):
        with pytest.raises(InvalidName):
            layout.volume_tags(*arguments)


def test_mount_directories_are_named_as_other_hosts_name_them(tables):
    for row in tables["mount_names"]:
        assert layout.normal_remote_path(row["remote"]) == row["normal"]
        assert layout.mount_directory(row["remote"]) == row["dir"]
    assert layout.mount_directory("server:/a/") == "server:_a"


@pytest.mark.parametrize("bad", ["", ".", "..", "-o", "a b", "a\nb", "server:/a,ro", "a\0"])
def test_remote_paths_that_mean_something_else_are_refused(bad):
    with pytest.raises(InvalidName):
        layout.mount_directory(bad)


def test_special_volumes_by_version():
    assert list(layout.special_volumes(3)) == ["metadata", "ids", "inbox", "outbox", "leases", "master"]
    assert layout.special_volumes(5)["xleases"] == 1024
    assert layout.has_xleases(4, "NFS") and not layout.has_xleases(5, "LOCALFS") and not layout.has_xleases(3, "NFS")
