# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Keys of domains and pools, the V1 text, mapping of physical volumes."""

import json
from pathlib import Path

import pytest

from storage_pool import metadata_domain as md
from storage_pool.errors import InvalidName, MetadataError, UnsupportedVersion
from storage_pool.ids import BLANK, make_id
from storage_pool.sealed import to_tags

GOLDEN = Path(__file__).parent / "golden/domain_metadata"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())


def test_md10_a_mapping_with_colons_in_its_names_decodes(tables):
    row = tables["pv_info"]
    entry = md.PvEntry.decode(row["text"])
    assert entry._asdict() == row["dict"]
    assert entry.encode() == row["text"]
    assert row["tag"] in to_tags({"PV3": row["text"]})
    assert md.PvEntry.decode(row["text"].replace("360014055f3d4f50", "scsi:1:2")).guid == "scsi:1:2"


@pytest.mark.parametrize("bad", ["a,b", "", "a b", "a\nb"])
def test_a_device_name_that_would_break_the_mapping_is_refused(bad):
    with pytest.raises(InvalidName):
        md.PvEntry(bad, "u", 0, 1, 0).encode()


@pytest.mark.parametrize("row", EXPECTED["v1_block"], ids=lambda row: row["file"])
def test_v1_text_of_a_block_domain_is_byte_for_byte(row):
    data = (GOLDEN / row["file"]).read_bytes()
    assert md.unpack_v1(data) == row["raw"]
    assert md.pack_v1(row["raw"]) == data
    assert md.v1_bytes_needed(row["raw"]) == row["text_bytes"]
    view = md.DomainMetadata(row["raw"])
    decoded = row["decoded"]
    assert (view.version, view.uuid, view.role) == (0, decoded["SDUUID"], decoded["ROLE"])
    assert {f"PV{n}": entry.as_dict() for n, entry in view.pv_mapping.items()} == {
        key: value for key, value in decoded.items() if key.startswith("PV")
    }


def test_v1_text_over_2048_bytes_is_refused_with_the_figure():
    values = dict(EXPECTED["v1_block"][0]["raw"])
    values["POOL_DOMAINS"] = ",".join(f"{make_id()}:Active" for _ in range(40))
    with pytest.raises(MetadataError, match=r"needs \d+ bytes, its limit is 2048"):
        md.pack_v1(values)


def test_v1_slot_comes_from_the_first_extent_and_skips_the_reserved_four():
    mapping = md.DomainMetadata(EXPECTED["v1_block"][0]["raw"]).pv_mapping
    for row in EXPECTED["v1_slot_mapping"]:
        assert md.v1_slot(mapping.values(), row["guid"], row["first_extent"]) == row["slot"]


def test_bd16_mapping_accepts_gaps_and_takes_the_lowest_free_number():
    present = {0: md.PvEntry("a", "ua", 0, 100, 0), 2: md.PvEntry("c", "uc", 0, 100, 200)}
    grown = md.mapping_for(present, [("d", "ud", 50), ("e", "ue", 10)])
    assert list(grown) == [0, 1, 2, 3]
    assert grown[1] == md.PvEntry("d", "ud", 0, 50, 300)
    assert grown[3] == md.PvEntry("e", "ue", 0, 10, 350)


def test_pool_domains_are_read_as_old_hosts_wrote_them(tables):
    for row in tables["pool_domains"]:
        assert md.decode_pool_domains(row["text"]) == row["dict"]
        assert md.decode_pool_domains(md.encode_pool_domains(row["dict"])) == row["dict"]


def test_a_pool_of_more_than_100_domains_is_refused():
    with pytest.raises(InvalidName, match="at most 100"):
        md.encode_pool_domains({make_id(): "Active" for _ in range(101)})


def test_blank_and_empty_pool_uuids_mean_unattached():
    raw = md.new_domain_values(make_id(), version=3, storage_type="NFS")
    assert md.DomainMetadata(raw).pools == ()
    assert md.DomainMetadata({**raw, "POOL_UUID": BLANK}).pools == ()
    assert md.DomainMetadata({**raw, "POOL_UUID": "a,b"}).pools == ("a", "b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"VERSION": "1"}, "version 1"),
        ({"VERSION": "x"}, "not a number"),
        ({"VERSION": "٣"}, "not a number"),
        ({"SDUUID": "../x"}, "not a UUID"),
        ({"BLOCK_SIZE": "4096"}, "512 bytes"),
    ],
)
def test_metadata_that_cannot_be_is_refused_at_open(changes, message):
    raw = md.new_domain_values(make_id(), version=3, storage_type="NFS")
    with pytest.raises(MetadataError, match=message):
        md.DomainMetadata({**raw, **changes})


def test_a_missing_key_is_named():
    raw = md.new_domain_values(make_id(), version=5, storage_type="NFS")
    del raw["ALIGNMENT"]
    with pytest.raises(MetadataError, match="lacks ALIGNMENT"):
        md.DomainMetadata(raw)


def test_fd01_domain_keys_at_creation_for_v3_v4_v5():
    for version in (0, 3, 4):
        assert not {"BLOCK_SIZE", "ALIGNMENT", "LOGBLKSIZE"} & set(
            md.new_domain_values(make_id(), version=version, storage_type="NFS")
        )
    raw = md.new_domain_values(make_id(), version=5, storage_type="LOCALFS", block_size=4096, alignment=8 << 20)
    assert (raw["BLOCK_SIZE"], raw["ALIGNMENT"]) == ("4096", "8388608")
    assert md.new_domain_values(make_id(), version=4, storage_type="FCP")["LOGBLKSIZE"] == "512"


@pytest.mark.parametrize(
    ("version", "storage_type", "domain_class", "block_size"),
    [
        (1, "NFS", "Data", 512),
        (6, "NFS", "Data", 512),
        (2, "NFS", "Data", 512),
        (3, "SMB", "Data", 512),
        (3, "NFS", "Disk", 512),
        (3, "NFS", "Iso", 512),
        (0, "FCP", "Iso", 512),
        (0, "ISCSI", "Backup", 512),
        (4, "LOCALFS", "Data", 4096),
        (5, "NFS", "Data", 4096),
        (5, "FCP", "Data", 4096),
    ],
)
def test_fd02_combinations_that_do_not_exist_are_refused(version, storage_type, domain_class, block_size):
    with pytest.raises(UnsupportedVersion):
        md.new_domain_values(
            make_id(), version=version, storage_type=storage_type, domain_class=domain_class, block_size=block_size
        )


def test_descriptions_are_ascii_below_v3_and_at_most_50_characters():
    assert md.check_description("données", 3)
    with pytest.raises(InvalidName, match="ASCII"):
        md.check_description("données", 0)
    with pytest.raises(InvalidName, match="limit is 50"):
        md.check_description("x" * 51, 5)
