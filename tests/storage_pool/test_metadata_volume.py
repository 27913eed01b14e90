# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Records of volumes: byte for byte as written by others, and hostile values."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcowlib.errors import Error
from storage_pool.errors import InvalidName, MetadataError
from storage_pool.ids import BLANK, make_id
from storage_pool.metadata_volume import RECORD_SIZE, VolumeMetadata, next_generation, parse, parse_lenient

GOLDEN = Path(__file__).parent / "golden/volume_metadata"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())

DOMAIN, IMAGE = make_id(), make_id()


def volume(**changes):
    values = {
        "domain": DOMAIN,
        "image": IMAGE,
        "parent": BLANK,
        "capacity": 1 << 30,
        "format": "COW",
        "type": "SPARSE",
        "voltype": "LEAF",
        "disktype": "DATA",
        "description": "",
        "legality": "LEGAL",
        "ctime": 1617235200,
    }
    return VolumeMetadata(**{**values, **changes})


@pytest.mark.parametrize("row", EXPECTED["written"], ids=lambda row: row["file"])
def test_vm01_text_for_each_version_is_byte_for_byte(row):
    data = (GOLDEN / row["file"]).read_bytes()
    assert VolumeMetadata(**row["values"]).to_bytes(row["domain_version"]) == data
    assert {key: value for key, value in parse(data)._asdict().items() if key != "domain"} == row["read_back"]


def test_vm02_extra_keys_can_be_given_for_one_write():
    data = volume().to_bytes(5, {"SIZE": str((1 << 30) // 512), "MTIME": "0"})
    assert b"CAP=1073741824\n" in data and b"SIZE=2097152\n" in data
    assert data.splitlines() == [*sorted(data.splitlines()[:-1]), b"EOF"]


@pytest.mark.parametrize(
    "key",
    ["DOMAIN", "IMAGE", "PUUID", "FORMAT", "TYPE", "VOLTYPE", "DISKTYPE", "DESCRIPTION", "LEGALITY", "CTIME", "CAP"],
)
def test_vm03_each_missing_key_is_an_error_naming_it(key):
    lines = [line for line in volume().to_bytes(5).splitlines(True) if not line.startswith(key.encode() + b"=")]
    with pytest.raises(MetadataError, match=key):
        parse(b"".join(lines))


def test_vm03_generation_and_sequence_default_to_zero():
    lines = [
        line
        for line in volume(generation=7, sequence=9).to_bytes(5).splitlines(True)
        if line[:3] not in (b"GEN", b"SEQ")
    ]
    assert parse(b"".join(lines)) == volume()


def test_vm04_size_is_used_only_without_cap():
    data = volume().to_bytes(5, {"SIZE": "8"})
    assert parse(data).capacity == 1 << 30
    without = b"".join(line for line in data.splitlines(True) if not line.startswith(b"CAP"))
    assert parse(without).capacity == 4096


def test_vm04_bad_size_is_an_error():
    with pytest.raises(MetadataError, match="SIZE is not a number"):
        parse(volume().to_bytes(4, {"SIZE": "8 blocks"}))


@pytest.mark.parametrize("data", [b"", b"\0" * 512, b"EOF\n", b"EOF\n" + volume().to_bytes(5), b"=\n"])
def test_vm05_empty_records_are_errors(data):
    with pytest.raises(MetadataError) as caught:
        parse(data)
    assert len(caught.value.problems) == 11


@pytest.mark.parametrize("rest", [b"#" * 500 + b"\nEOF\n", b"\n" + volume().to_bytes(5)], ids=["alone", "with keys"])
def test_vm05_a_cleared_record_is_an_error_that_says_so_whatever_else_it_holds(rest):
    with pytest.raises(MetadataError, match="was cleared"):
        parse(b"NONE=" + rest)


@pytest.mark.parametrize("row", EXPECTED["parsed"], ids=lambda row: row["file"])
def test_vm06_what_can_be_read_of_partly_bad_text_is_given_with_its_status(row):
    data = (GOLDEN / row["file"]).read_bytes()
    got = parse_lenient(data)
    assert got.values == row["lenient_values"]
    assert len(got.problems) == row["lenient_error_count"]
    assert got.status == row["dump"]["status"]
    if row["strict"] == "ok":
        assert parse(data)._asdict() == row["lenient_values"]
    else:
        with pytest.raises(MetadataError):
            parse(data)


def test_vm06_a_line_that_is_not_utf8_is_an_error_and_the_others_count():
    got = parse_lenient(volume().to_bytes(5).replace(b"DESCRIPTION=", b"DESCRIPTION=\xff\xfe"))
    assert "description" not in got.values and got.values["capacity"] == 1 << 30
    assert got.status == "INVALID"


def test_vm07_description_is_cut_at_210_characters_and_the_worst_case_fits():
    worst = volume(
        description="x" * 300,
        capacity=2**63 - 512,
        disktype="DATA",
        type="PREALLOCATED",
        voltype="INTERNAL",
        legality="ILLEGAL",
        generation=999,
        sequence=2**32 - 1,
        ctime=2**40,
    )
    for version in (2, 3, 4, 5):
        data = worst.to_bytes(version)
        assert len(data) <= RECORD_SIZE
        assert parse(data).description == "x" * 210


def test_vm07_q02_a_record_over_512_bytes_is_refused_with_the_excess():
    with pytest.raises(MetadataError, match=r"needs \d+ bytes, its limit is 512") as caught:
        volume(description="日" * 200).to_bytes(5)
    assert "Shorten the description by" in caught.value.hint


def test_vm08_generation_wraps_after_999(tables):
    for row in tables["generation"]:
        assert next_generation(row["now"]) == row["next"]


@pytest.mark.parametrize(
    "hostile",
    [
        "a\nROLE=Master",
        "a\rEOF",
        "a\x0bb",
        "a\x0cb",
        "a\x1cb",
        "a\x1db",
        "a\x1eb",
        "a\x85b",
        "a\u2028b",
        "a\u2029b",
        "a\0b",
        "\ud800",
    ],
)
def test_a_description_that_would_end_its_line_is_refused(hostile):
    with pytest.raises(InvalidName):
        volume(description=hostile).to_bytes(5)


@pytest.mark.parametrize("field", ["domain", "image", "parent"])
@pytest.mark.parametrize(
    "bad", ["", "x", make_id() + "\n", make_id().upper(), "{" + make_id() + "}", make_id() + "/.."]
)
def test_a_reference_that_is_no_uuid_is_refused(field, bad):
    with pytest.raises(InvalidName):
        volume(**{field: bad}).to_bytes(5)


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("capacity", -1),
        ("generation", 1000),
        ("sequence", 2**32),
        ("ctime", -1),
        ("format", "RAW\nX"),
        ("legality", ""),
    ],
)
def test_values_outside_their_field_are_refused(field, bad):
    with pytest.raises(InvalidName):
        volume(**{field: bad}).to_bytes(5)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=600))
def test_any_bytes_give_values_or_problems_and_never_another_exception(data):
    got = parse_lenient(data)
    assert got.problems or parse(data)
    try:
        parse(data)
    except Error as error:
        assert "\n" not in str(error)


@settings(max_examples=60, deadline=None)
@given(
    description=st.text(max_size=80),
    capacity=st.integers(0, 2**53).map(lambda n: n * 512),
    generation=st.integers(0, 999),
    version=st.sampled_from([0, 2, 3, 4, 5]),
)
def test_what_is_accepted_comes_back_as_it_was(description, capacity, generation, version):
    before = volume(description=description, capacity=capacity, generation=generation)
    try:
        data = before.to_slot(version)
    except (InvalidName, MetadataError):
        return
    assert len(data) == RECORD_SIZE
    assert parse(data) == before._replace(description=description.strip())
