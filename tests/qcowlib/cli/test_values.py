# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Sizes, option lists, JSON order and names, without running a command."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowlib.cli.console import Failure
from qcowlib.cli.jsonin import JsonError, parse_json
from qcowlib.cli.jsonout import compact, ordered, pretty
from qcowlib.cli.names import image_ref
from qcowlib.cli.values import MAX_SIZE, parse_number, parse_size, size_option, split_options

# The orders that qemu-img 7.2 prints.
ORDERS = (
    "backing-filename-format snapshots virtual-size filename cluster-size format actual-size "
    "format-specific full-backing-filename encrypted backing-filename dirty-flag",
    "icount vm-clock-nsec name date-sec date-nsec vm-clock-sec id vm-state-size",
    "compat compression-type lazy-refcounts bitmaps refcount-bits data-file encrypt data-file-raw corrupt extended-l2",
    "ivgen-alg hash-alg cipher-alg uuid ivgen-hash-alg format cipher-mode slots payload-offset master-key-iters",
    "image-end-offset compressed-clusters total-clusters corruptions corruptions-fixed check-errors leaks leaks-fixed "
    "allocated-clusters filename format fragmented-clusters",
    "bitmaps required fully-allocated",
)


@pytest.mark.parametrize("order", ORDERS)
def test_keys_come_in_hash_order_whatever_the_insertion(order: str) -> None:
    keys = order.split()
    for given_keys in (keys, keys[::-1], sorted(keys)):
        assert [key for key, _ in ordered(dict.fromkeys(given_keys, 1))] == keys


texts = st.text(st.characters(codec="utf-8"))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 62), 1 << 62) | texts,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(json_values)
def test_written_json_is_json(value: object) -> None:
    assert json.loads(pretty(value)) == value  # type: ignore[arg-type]
    assert json.loads(compact(value)) == value  # type: ignore[arg-type]


@given(json_values)
def test_reader_reads_what_was_written(value: object) -> None:
    assert parse_json(compact(value)) == value  # type: ignore[arg-type]


@given(st.text("{}[]\"':,\\u0123 tfn-", max_size=40))
def test_reader_refuses_or_agrees_with_json(text: str) -> None:
    try:
        expected = json.loads(text)
    except ValueError:
        expected = None
    try:
        found = parse_json(text)
    except JsonError:
        return
    if expected is not None and "'" not in text and '"' not in text and "-0" not in text:
        assert found == expected


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(JsonError):
        parse_json("[" * 100_000)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1b", 1),
        ("1k", 1024),
        (" 1K", 1024),
        ("+5k", 5120),
        ("1.5G", 3 << 29),
        ("0x10", 16),
        ("1.", 1),
        ("0.0001k", 0),
        ("9223372036854775808", 1 << 63),
    ],
)
def test_size_is_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "k", "1.5", "1.5b", "1e3", "0x", "0x1.8", "1kk", "1 k", "1_0", "-1", "inf", "١"])
def test_size_is_refused(text: str) -> None:
    assert parse_size(text) is None
    with pytest.raises(Failure):
        size_option("image size", text)


@given(st.text(max_size=30))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    try:
        size = size_option("image size", text)
    except Failure:
        return
    assert 0 <= size <= MAX_SIZE


@given(st.integers(0, MAX_SIZE))
def test_plain_numbers_are_exact(value: int) -> None:
    assert size_option("image size", str(value)) == value
    assert size_option("image size", hex(value)) == value
    assert parse_number("n", str(value)) == value


@given(st.lists(st.tuples(st.text("abc_-.", min_size=1), st.text("x,= ")), max_size=5))
def test_option_lists_survive_doubled_commas(items: list[tuple[str, str]]) -> None:
    text = ",".join(f"{name}={value.replace(',', ',,')}" for name, value in items)
    assert split_options(text) == items


def test_windows_are_parsed_from_the_outside_in() -> None:
    ref = image_ref(
        "driver=qcow2,file.driver=raw,file.offset=1M,file.size=2M,file.file.filename=x", None, image_opts=True
    )
    assert (ref.path, ref.format) == ("x", "qcow2")
    assert [(window.offset, window.size) for window in ref.windows] == [(1 << 20, 2 << 20)]


@given(st.text(max_size=40), st.sampled_from(("", "json:", "json:{", "file:", "driver=")), st.booleans())
def test_any_name_is_a_reference_or_refused(text: str, prefix: str, image_opts: bool) -> None:
    try:
        ref = image_ref(prefix + text, None, image_opts=image_opts)
    except Failure as failure:
        assert failure.messages
    else:
        assert ref.path
