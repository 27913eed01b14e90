# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Sealed text: lines, tags, seal and transactions."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_pool import sealed
from storage_pool.errors import InvalidName, MetadataError

GOLDEN = Path(__file__).parent / "golden/domain_metadata"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())


class Place:
    """A storage of lines that counts, and fails when told."""

    def __init__(self, values):
        self.lines = sealed.to_lines(values)
        self.reads = self.writes = 0
        self.fail_read = self.fail_write = False

    def read(self):
        self.reads += 1
        if self.fail_read:
            self.fail_read = False
            raise OSError("read")
        return sealed.from_lines(self.lines)

    def write(self, new, old):
        self.writes += 1
        if self.fail_write:
            self.fail_write = False
            raise OSError("write")
        self.lines = sealed.to_lines(new)

    def store(self):
        return sealed.SealedStore(self.read, self.write)


def test_md01_values_come_back_sorted_and_sealed_with_the_right_sha1(tables):
    for row in tables["checksums"]:
        lines = sealed.to_lines(row["dict"])
        assert lines == [*row["lines"], f"_SHA_CKSUM={row['sha1']}"]
        assert sealed.from_lines(lines) == row["dict"]


@pytest.mark.parametrize("row", EXPECTED["texts"], ids=lambda row: row["file"])
def test_md02_good_seal_accepted_absent_seal_trusted_wrong_seal_refused(row):
    lines = sealed.split_lines((GOLDEN / row["file"]).read_bytes())
    if row["ok"]:
        assert sealed.from_lines(lines) == row["raw"]
    else:
        with pytest.raises(MetadataError, match="seal"):
            sealed.from_lines(lines)


def test_md03_one_write_per_transaction_and_nested_ones_join():
    place = Place({"A": "1"})
    store = place.store()
    with store.transaction() as outer:
        outer["A"] = "2"
        with store.transaction() as inner:
            inner["B"] = "3"
        store.update({"C": "4"})
        assert place.writes == 0
    assert place.writes == 1
    assert sealed.from_lines(place.lines) == {"A": "2", "B": "3", "C": "4"}


def test_md03_no_write_when_nothing_changed():
    place = Place({"A": "1"})
    with place.store().transaction() as values:
        values["A"] = "2"
        values["A"] = "1"
    assert place.writes == 0


@pytest.mark.parametrize("where", ["body", "nested", "write"])
def test_md04_an_exception_leaves_memory_and_storage_at_the_old_values(where):
    place = Place({"A": "1"})
    store = place.store()
    place.fail_write = where == "write"
    with pytest.raises(OSError), store.transaction() as values:
        values["A"] = "2"
        with store.transaction() as inner:
            inner["B"] = "3"
            if where == "nested":
                raise OSError
        if where == "body":
            raise OSError
    assert store.values() == {"A": "1"} == sealed.from_lines(place.lines)


def test_md05_a_read_or_write_error_once_works_the_next_time():
    place = Place({"A": "1"})
    store = place.store()
    place.fail_read = True
    with pytest.raises(OSError):
        store.values()
    assert store.values() == {"A": "1"}
    place.fail_write = True
    with pytest.raises(OSError):
        store.update({"A": "2"})
    store.update({"A": "2"})
    assert sealed.from_lines(place.lines) == {"A": "2"}


def test_md06_invalidate_forces_a_new_read():
    place = Place({"A": "1"})
    store = place.store()
    store.values()
    place.lines = sealed.to_lines({"A": "5"})
    assert store.values() == {"A": "1"}
    store.invalidate()
    assert store.values() == {"A": "5"} and place.reads == 2


def test_md07_unknown_keys_survive_a_rewrite():
    place = Place({"A": "1", "FUTURE_KEY": "kept"})
    place.store().update({"A": "2", "B": None})
    assert sealed.from_lines(place.lines) == {"A": "2", "FUTURE_KEY": "kept"}


def test_md08_text_padded_with_nuls_is_read():
    data = "\n".join(sealed.to_lines({"A": "1"})).encode() + b"\n" + b"\0" * 100
    assert sealed.from_lines(sealed.split_lines(data)) == {"A": "1"}


def test_md09_tags_of_all_special_characters(tables):
    for row in tables["lvm_tags"]:
        assert sealed.encode_tag(row["text"]) == row["encoded"]
        assert sealed.decode_tag(row["encoded"]) == row["decoded_again"]


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=60))
def test_md09_every_text_survives_a_tag(text):
    tag = sealed.encode_tag(text)
    assert sealed.decode_tag(tag) == text
    assert tag.isascii() and "@" not in tag and "," not in tag and " " not in tag


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.from_regex(r"[A-Z][A-Z_]{0,8}", fullmatch=True), st.text(max_size=40), max_size=6))
def test_what_is_accepted_comes_back_from_lines_and_tags(values):
    try:
        lines = sealed.to_lines(values)
    except InvalidName:
        return
    data = "".join(f"{line}\n" for line in lines).encode()
    assert sealed.from_lines(sealed.split_lines(data)) == values
    assert sealed.from_tags(sealed.to_tags(values)) == values


@pytest.mark.parametrize(
    "bad", ["a\nROLE=Master", "a\r", "a\x0b", "a\x0c", "a\x1c", "a\x1d", "a\x1e", "a\x85", "a\u2028", "\0"]
)
def test_a_value_that_would_make_another_line_is_refused(bad):
    with pytest.raises(InvalidName):
        sealed.to_lines({"DESCRIPTION": bad})


@pytest.mark.parametrize("bad", ["", "a", "A=B", "A\nB", " A", "A ", "É"])
def test_a_key_that_is_no_key_is_refused(bad):
    with pytest.raises(InvalidName):
        sealed.to_lines({bad: "x"})


def test_a_value_too_long_for_a_tag_is_refused_before_lvm_sees_it():
    with pytest.raises(InvalidName, match="limit is 1024"):
        sealed.to_tags({"POOL_DOMAINS": "x" * 1100})
