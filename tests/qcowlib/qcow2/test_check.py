# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The check against qemu-img check: same lines, same counts, same verdict."""

from __future__ import annotations

import errno
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcowlib.errors import FormatError
from qcowlib.ondisk import Header
from qcowlib.qcow2.check import Report, check
from qcowlib.storage.file import FileStorage
from qcowlib.storage.memory import MemoryStorage
from tests.qcowlib.qcow2 import corpus

ALL = 1 << 20


def check_file(path: Path, limit: int = ALL) -> Report:
    storage = FileStorage.open(str(path))
    try:
        return check(storage, limit=limit)
    finally:
        storage.close()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, corpus.Image]:
    folder = tmp_path_factory.mktemp("images")
    return {name: corpus.Image(name, corpus.make(folder, name).read_bytes()) for name in corpus.OPTIONS}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "image.qcow2"


def assert_same(path: Path, *, luks: bool = False) -> Report | None:
    """Compare both checks of *path*; None if neither opens it."""
    real = corpus.qemu_check(path, luks=luks)
    if b"Could not open" in real.stderr:
        with pytest.raises(FormatError):
            check_file(path)
        return None
    report = check_file(path)
    assert corpus.lines(report) == corpus.qemu_lines(real)
    assert report.exit_status == real.returncode
    if real.stdout:
        assert corpus.counts(report) == corpus.qemu_counts(real)
    else:
        assert report.failure
    return report


@pytest.mark.real("qemu-img", "qemu-io")
@pytest.mark.parametrize("name", corpus.OPTIONS)
def test_sound_image_of_each_feature_is_clean(name: str, images: dict[str, corpus.Image], scratch: Path) -> None:
    scratch.write_bytes(images[name].data)
    report = assert_same(scratch, luks=name == "luks")
    assert report is not None
    assert report.clean
    assert report.allocated_clusters > 0


@pytest.mark.real("qemu-img", "qemu-io")
@settings(max_examples=100)
@given(data=st.data())
def test_damaged_image_gives_the_lines_of_qemu_img(
    data: st.DataObject, images: dict[str, corpus.Image], scratch: Path
) -> None:
    name = data.draw(st.sampled_from(sorted(images)))
    edits = data.draw(corpus.damages(images[name]))
    scratch.write_bytes(corpus.damaged(images[name], edits))
    assert_same(scratch, luks=name == "luks")


@pytest.mark.real("qemu-img", "qemu-io")
def test_flags_below_a_table_of_unknown_count_are_passed_over(images: dict[str, corpus.Image], scratch: Path) -> None:
    data = bytearray(images["bits64"].data)
    # The first refcount block is outside the file, and a data cluster counted by the second is free.
    data[512:520] = (1 << 63).to_bytes(8, "big")
    data[37888:37896] = bytes(8)
    scratch.write_bytes(data)
    assert_same(scratch)


@pytest.mark.real("qemu-img", "qemu-io")
def test_refcounts_left_behind_by_lazy_refcounts_are_found(tmp_path: Path) -> None:
    path = tmp_path / "lazy.qcow2"
    corpus.good("qemu-img", "create", "-f", "qcow2", "-o", "lazy_refcounts=on,cluster_size=4k", path, "1M")
    result = corpus.run("qemu-io", "-c", "write 0 100k", "-c", "flush", "-c", "sigraise 9", path)
    assert result.returncode != 0
    report = assert_same(path)
    assert report is not None
    assert report.exit_status == 2


def with_l1(entries: list[int], cluster_bits: int = 16, length: int | None = None) -> bytearray:
    """An image that has a header, a refcount table and an L1 table with *entries*."""
    size = 1 << cluster_bits
    header = Header(cluster_bits=cluster_bits, size=0)
    header.refcount_table_offset, header.refcount_table_clusters = size, 1
    header.l1_table_offset, header.l1_size = 3 * size, len(entries)
    data = bytearray(length or 3 * size + len(entries) * 8 + 2 * size)
    data[:size] = header.pack()
    data[size : size + 8] = (2 * size).to_bytes(8, "big")
    table = b"".join(entry.to_bytes(8, "big") for entry in entries)
    data[3 * size : 3 * size + len(table)] = table
    return data


def test_one_table_named_by_every_l1_entry_is_read_once() -> None:
    data = with_l1([11 << 16] * 65536, length=13 << 16)
    l2 = 11 << 16
    data[l2 : l2 + 65536] = (1 << 63 | 12 << 16).to_bytes(8, "big") * 8192
    report = check(MemoryStorage(data), limit=100)
    assert report.exit_status == 2
    assert report.allocated_clusters == 65536 * 8192
    assert len(report.findings) <= 101
    assert report.suppressed > 65536 * 8192 - 200


def test_tables_behind_the_end_are_counted_without_being_read() -> None:
    entries = [(1 << 40) + (index << 16) for index in range(1 << 16)]
    report = check(MemoryStorage(with_l1(entries)), limit=10)
    assert report.corruptions >= 1 << 16
    assert len(report.findings) == 10
    assert len(report.findings) + report.suppressed >= 1 << 16


def test_overlapping_tables_end_the_check_before_the_work_explodes() -> None:
    entries = [(3 << 21) + 512 * index for index in range(8192)]
    data = with_l1(entries, cluster_bits=21, length=6 << 21)
    report = check(MemoryStorage(data))
    assert report.failure == errno.EFBIG
    assert report.exit_status == 1


def test_memory_follows_what_is_allocated_not_the_length_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    data = with_l1([1 << 38], cluster_bits=9)
    with path.open("wb") as file:
        file.write(data)
        file.seek(1 << 38)
        file.write((1 << 63 | 1 << 37).to_bytes(8, "big"))
        file.truncate(1 << 39)
    tracemalloc.start()
    try:
        report = check_file(path)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert report.corruptions
    assert peak < 32 << 20


def test_findings_over_the_limit_are_counted() -> None:
    report = check(MemoryStorage(with_l1([0xF0 | 1 << 62] * 300)), limit=7)
    assert len(report.findings) == 7
    assert report.suppressed == report.corruptions + report.leaks - 7


def test_file_that_is_no_image_is_refused() -> None:
    with pytest.raises(FormatError):
        check(MemoryStorage(b"QFI"))


def test_findings_tell_where_they_are() -> None:
    data = with_l1([1 << 63 | 4 << 16 | 1], length=6 << 16)
    data[4 << 16 : (4 << 16) + 8] = (5 << 16 | 1 << 60).to_bytes(8, "big")
    report = check(MemoryStorage(data))
    found = {(finding.kind, finding.host_offset, finding.owner) for finding in report.findings}
    assert ("reserved", None, "active L1 entry 0") in found
    assert ("reserved", None, f"L2 at {4 << 16:#x}") in found
    assert ("refcount", 5 << 16, None) in found
