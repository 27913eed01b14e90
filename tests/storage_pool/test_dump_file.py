# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Dumps of file domains that others wrote, field by field."""

import json
from pathlib import Path

import pytest

from storage_pool.dump import dump_file
from storage_pool.file_domain import FileDomain
from storage_pool.testing.golden import rebuild_file_domain

GOLDEN = Path(__file__).parent / "golden/file"
CASES = sorted(path.name for path in GOLDEN.iterdir())
FIELDS = ("alignment", "all_images", "all_volumes", "block_size", "domain_metadata_raw", "external_leases", "info")
FIELDS += ("sd_uuid", "version", "volumes")


@pytest.fixture
def rebuild(tmp_path):
    def make(case):
        path = rebuild_file_domain(GOLDEN / case, tmp_path)
        return path, json.loads((GOLDEN / case / "expected.json").read_text())

    return make


def everything_below(path):
    return {item: (item.stat().st_mtime_ns, item.stat().st_ctime_ns) for item in path.rglob("*")}


@pytest.mark.parametrize("case", CASES)
def test_fd12_dump_of_a_domain_equals_what_its_writer_reads_in_it(rebuild, case):
    path, expected = rebuild(case)
    before = everything_below(path)
    with FileDomain.open(str(path)) as domain:
        document = json.loads(json.dumps(dump_file(domain)))
    for field in FIELDS:
        assert document.get(field) == expected.get(field), field
    by_volume = {lease["resource"]: lease for lease in expected.get("leases", {}).values()}
    assert document.get("leases", {}) == by_volume
    assert "problems" not in document
    assert everything_below(path) == before


def test_fd12_bad_metadata_is_told_and_the_rest_is_read(rebuild):
    path, expected = rebuild("v3_nfs")
    label = expected["labels"]["raw"]
    meta = path / "images" / label["image"] / f"{label['volume']}.meta"
    meta.write_text(meta.read_text().replace("VOLTYPE=LEAF\n", ""))
    with FileDomain.open(str(path)) as domain:
        document = dump_file(domain)
    want = dict(expected["volumes"][label["volume"]], status="INVALID")
    del want["voltype"]
    assert document["volumes"] == {**expected["volumes"], label["volume"]: want}
    assert document["problems"] == {label["volume"]: ["VOLTYPE is missing"]}


def test_fd12_unreadable_metadata_and_a_lost_file_are_told(rebuild):
    path, expected = rebuild("v5_nfs")
    raw, ovf = expected["labels"]["raw"], expected["labels"]["ovf"]
    meta = path / "images" / raw["image"] / f"{raw['volume']}.meta"
    meta.unlink()
    meta.symlink_to("/etc/passwd")
    (path / "images" / ovf["image"] / ovf["volume"]).unlink()
    with FileDomain.open(str(path)) as domain:
        document = dump_file(domain)
    assert document["volumes"][raw["volume"]]["status"] == "INVALID"
    assert document["volumes"][raw["volume"]]["image"] == raw["image"]
    assert document["volumes"][ovf["volume"]]["status"] == "INVALID"
    assert set(document["problems"]) == {raw["volume"], ovf["volume"]}


def test_fd12_a_volume_without_record_is_shown_as_being_made(rebuild):
    path, expected = rebuild("v3_nfs")
    label = expected["labels"]["raw"]
    (path / "images" / label["image"] / f"{label['volume']}.meta").unlink()
    with FileDomain.open(str(path)) as domain:
        assert dump_file(domain)["volumes"][label["volume"]] == {"image": label["image"], "status": "INIT"}


def test_a_damaged_lease_index_does_not_end_the_dump(rebuild):
    path, expected = rebuild("v5_nfs")
    with (path / "dom_md/xleases").open("r+b") as file:
        file.seek(1 << 20)
        file.write(bytes(4))
    with FileDomain.open(str(path)) as domain:
        document = dump_file(domain)
    assert document["volumes"] == expected["volumes"]
    assert "external_leases" in document["problems"]


def test_files_of_an_iso_domain_are_listed_with_their_folders(rebuild):
    path, _ = rebuild("iso")
    with FileDomain.open(str(path)) as domain:
        assert list(dump_file(domain)["files"]) == ["Fedora.iso", "floppy.vfd", "sub/virtio-win.iso"]
