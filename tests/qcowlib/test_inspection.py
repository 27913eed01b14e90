# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What is said about images that nobody trusts."""

from __future__ import annotations

import io
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qcowlib.ondisk as od
from qcowlib.errors import StorageError, UsageError
from qcowlib.inspection import Inspection, inspect
from qcowlib.ondisk import BitmapEntry, BitmapsExtension, Header, SnapshotEntry, pack_bitmap_directory, pack_snapshots
from qcowlib.qcow2.create import CreateOptions, create
from qcowlib.storage.memory import MemoryStorage

MiB = 1 << 20


def image(change: Callable[[Header], None] | None = None, **options: Any) -> bytearray:
    storage = MemoryStorage()
    data = MemoryStorage() if options.get("data_file") else None
    header = create(storage, CreateOptions(MiB, **options), data=data)
    content = bytearray(storage.getvalue())
    if change is not None:
        change(header)
        content[:65536] = header.pack()
    return content


def look(content: bytes | bytearray) -> Inspection:
    return inspect(io.BytesIO(content))


def kinds(content: bytes | bytearray) -> set[str]:
    return {finding.kind for finding in look(content).findings}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"version": 2},
        {"extended_l2": True, "compression_type": 1},
        {"preallocation": "metadata"},
        {"lazy_refcounts": True},
    ],
    ids=str,
)
def test_plain_image_is_safe(options: dict[str, Any]) -> None:
    result = look(image(**options))
    assert (result.safe, result.format, result.findings) == (True, "qcow2", ())


def test_raw_bytes_are_raw_and_safe() -> None:
    assert look(b"anything" * 1000)[:3] == ("raw", 8000, None)
    assert look(b"").safe


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (b"base.qcow2", "backing-file"),
        (b"sub/base", "backing-file"),
        (b"file:base", "backing-file"),
        (b"/etc/passwd", "backing-absolute"),
        (b"file:/etc/passwd", "backing-absolute"),
        (b"../base", "backing-outside"),
        (b"a/../../base", "backing-outside"),
        (b'json:{"file.filename": "/etc/passwd"}', "backing-json"),
        (b"nbd://host/x", "backing-protocol"),
        (b"fat:rw:/etc", "backing-protocol"),
    ],
)
def test_backing_name_is_never_safe(name: bytes, kind: str) -> None:
    result = look(image(backing_file=name, backing_format=b"raw"))
    assert [finding.kind for finding in result.findings] == [kind]
    assert not result.safe
    assert result.findings[0].offset == result.header.backing_file_offset  # type: ignore[union-attr]


def test_backing_format_must_be_told_and_known() -> None:
    assert "backing-format-missing" in kinds(image(backing_file=b"b"))
    assert "backing-format" in kinds(image(backing_file=b"b", backing_format=b"nbd"))


def test_data_file_is_a_danger() -> None:
    assert kinds(image(data_file=b"/etc/shadow")) == {"data-file"}


def test_names_with_control_characters_are_shown_on_one_line() -> None:
    result = look(image(backing_file=b"a\n\x1b[31mb\xff", backing_format=b"raw"))
    assert {"backing-file", "unprintable-name"} == {finding.kind for finding in result.findings}
    assert all(finding.message.isprintable() for finding in result.findings)


@pytest.mark.parametrize(
    ("magic", "offset", "name"),
    [
        (b"KDMV", 0, "vmdk"),
        (b"# Disk DescriptorFile\n", 0, "vmdk"),
        (b"\x7f\x10\xda\xbe", 64, "vdi"),
        (b"QFI\xfb\0\0\0\1", 0, "qcow"),
    ],
)
def test_foreign_format_is_a_danger(magic: bytes, offset: int, name: str) -> None:
    result = look(bytes(offset) + magic + bytes(1000))
    assert (result.format, result.safe) == (name, False)


def test_unknown_features_are_told_together_with_what_the_image_refers_to() -> None:
    def change(header: Header) -> None:
        header.incompatible_features |= 1 << 40

    assert kinds(image(change)) == {"unknown-feature"}
    result = look(
        image(lambda h: setattr(h, "refcount_table_clusters", 0), backing_file=b"/etc/x", backing_format=b"raw")
    )
    assert {finding.kind for finding in result.findings} == {"bad-header", "backing-absolute"}
    assert result.header is None


@pytest.mark.parametrize(
    ("field", "value", "kind", "safe"),
    [
        ("incompatible_features", 1, "dirty", True),
        ("incompatible_features", 2, "corrupt", False),
        ("compatible_features", 4, "unknown-compatible-feature", True),
        ("autoclear_features", 4, "unknown-autoclear-feature", True),
        ("crypt_method", 1, "encrypted", True),
        ("l1_table_offset", 1 << 40, "outside-file", False),
        ("l1_table_offset", 0, "overlap", False),
        ("l1_size", 1 << 21, "large-l1", False),
        ("refcount_table_offset", 0, "overlap", False),
        ("refcount_table_clusters", 100, "outside-file", False),
        ("unknown_extensions", (od.Extension(7, b"x"),), "unknown-extension", True),
        ("unknown_extensions", (od.Extension(7, b""),) * 100, "many-extensions", False),
        ("size", 1 << 60, "bad-header", False),
    ],
)
def test_header_field_gives_its_finding(field: str, value: Any, kind: str, safe: bool) -> None:
    result = look(image(lambda header: setattr(header, field, value)))
    assert kind in {finding.kind for finding in result.findings}
    assert result.safe == safe


@pytest.mark.parametrize(
    ("table", "entry", "kind"),
    [
        (0x30000, 0x40200, "unaligned"),
        (0x30000, 1 << 40, "outside-file"),
        (0x30000, 0x40000 | 1 << 60, "reserved-bits"),
        (0x10008, 0x20000, "shared-tables"),
        (0x10008, 0x20000 | 4, "reserved-bits"),
    ],
)
def test_table_entry_gives_its_finding(table: int, entry: int, kind: str) -> None:
    content = image(preallocation="metadata")
    struct.pack_into(">Q", content, table, entry)
    assert kind in kinds(content)


def with_snapshots(entries: list[SnapshotEntry], count: int | None = None) -> bytearray:
    def change(header: Header) -> None:
        header.nb_snapshots = len(entries) if count is None else count
        header.snapshots_offset = 0x40000

    content = image(change)
    content = content.ljust(0x40000, b"\0") + pack_snapshots(entries, MiB)
    return content.ljust(0x60000, b"\0")


def test_snapshots_are_judged_one_by_one() -> None:
    good = SnapshotEntry(0x50000, 1, b"1", b"first", 0, 0)
    assert look(with_snapshots([good])).safe
    assert kinds(with_snapshots([good._replace(l1_table_offset=1 << 50)])) == {"outside-file"}
    assert kinds(with_snapshots([good._replace(l1_table_offset=0x50200)])) == {"snapshot-l1"}
    assert kinds(with_snapshots([good._replace(l1_size=1 << 31)])) >= {"snapshot-l1", "large-snapshots"}
    assert kinds(with_snapshots([good._replace(name=b"a\nb")])) == {"unprintable-name"}
    assert kinds(with_snapshots([good], 65536)) == {"outside-file"}
    assert kinds(with_snapshots([good], 65537)) == {"bad-header"}
    assert kinds(with_snapshots([good._replace(unknown_extra=bytes(1010), extra_size=1034)])) == {"bad-snapshot-table"}


def test_the_list_of_findings_is_bounded() -> None:
    bad = [SnapshotEntry(1, 1, b"%d" % number, b"", 0, 0) for number in range(300)]
    result = look(with_snapshots(bad))
    assert len(result.findings) == 101
    assert result.findings[-1].kind == "more-findings"


def test_bitmap_directory_is_judged() -> None:
    def build(entry: BitmapEntry, count: int = 1) -> bytearray:
        directory = pack_bitmap_directory([entry])

        def change(header: Header) -> None:
            header.bitmaps = BitmapsExtension(count, len(directory), 0x40000)
            header.autoclear_features |= od.AUTOCLEAR_BITMAPS

        content = image(change).ljust(0x40000, b"\0") + directory
        return content.ljust(0x60000, b"\0")

    good = BitmapEntry(b"b", 16, 0x50000, 1)
    assert look(build(good)).safe
    assert kinds(build(good._replace(table_offset=1 << 40))) == {"outside-file"}
    assert kinds(build(good._replace(flags=8))) == {"bad-bitmap-directory"}
    assert kinds(build(good, 2)) == {"bad-bitmap-directory"}


class _Stream:
    """Gives what it has in odd pieces and cannot seek."""

    def __init__(self, content: bytes) -> None:
        self._file = io.BytesIO(content)
        self.taken = 0

    def read(self, length: int, /) -> bytes:
        piece = self._file.read(min(length, 70_001))
        self.taken += len(piece)
        return piece


def test_stream_is_judged_by_its_beginning() -> None:
    assert inspect(_Stream(bytes(image()))).safe
    stream = _Stream(bytes(image(lambda header: setattr(header, "l1_table_offset", 4 * MiB))).ljust(8 * MiB, b"\0"))
    result = inspect(stream)
    assert (result.complete, result.safe, result.file_size) == (False, False, None)
    assert [finding.kind for finding in result.findings] == ["not-read"]
    assert stream.taken == 2 * MiB


def test_pipe_is_read_without_seeking() -> None:
    reader, writer = os.pipe()
    content = bytes(image(backing_file=b"/etc/x", backing_format=b"raw"))

    def feed() -> None:
        with os.fdopen(writer, "wb") as file:
            file.write(content)

    thread = threading.Thread(target=feed)
    thread.start()
    with os.fdopen(reader, "rb") as file:
        result = inspect(file)
    thread.join()
    assert [finding.kind for finding in result.findings] == ["backing-absolute"]


def test_special_files_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero")):
        with pytest.raises(StorageError, match="to be a regular file"):
            inspect(path)
    with pytest.raises(StorageError, match="No such file"):
        inspect(tmp_path / "missing")
    with pytest.raises(UsageError, match="cannot be read"):
        inspect(object())  # type: ignore[arg-type]


def test_verdict_concerns_the_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(image())
    with path.open("rb") as file:
        (tmp_path / "other").write_bytes(image(backing_file=b"/etc/x", backing_format=b"raw"))
        (tmp_path / "other").rename(path)
        assert inspect(file.fileno()).safe
        assert not inspect(path).safe


@given(st.data())
def test_any_damage_gives_a_verdict_of_printable_lines(data: st.DataObject) -> None:
    content = with_snapshots([SnapshotEntry(0x50000, 1, b"1", b"first", 0, 0)])
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, 600) | st.integers(0x40000, 0x40080) | st.sampled_from([0x10000, 0x30000]))
        body = data.draw(st.binary(min_size=1, max_size=8))
        content[place : place + len(body)] = body
    del content[data.draw(st.integers(0, len(content))) :]
    for finding in look(content).findings:
        assert finding.message.isprintable()
        assert finding.severity in ("info", "warning", "danger")
