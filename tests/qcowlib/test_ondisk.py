# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Header, extensions, snapshot table and bitmap directory as bytes."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qcowlib.ondisk as od
from qcowlib.errors import Error, FormatError, UnsupportedFeature, UsageError
from qcowlib.ondisk import Header, ShortTable, SnapshotEntry

PXD = Path(od.__file__).resolve().parents[1] / "_ondisk.pxd"


def header_bytes(**fields: object) -> bytearray:
    header = Header(size=64 << 20)
    header.l1_size, header.l1_table_offset = 1, 0x30000
    header.refcount_table_offset, header.refcount_table_clusters = 0x10000, 1
    for name, value in fields.items():
        setattr(header, name, value)
    return bytearray(header.pack())


def patched(offset: int, fmt: str, *values: int) -> bytes:
    data = header_bytes()
    struct.pack_into(fmt, data, offset, *values)
    return bytes(data)


def with_extension(kind: int, body: bytes, length: int | None = None, autoclear: int = 0) -> bytes:
    data = header_bytes(autoclear_features=autoclear)
    data[112:112] = struct.pack(">II", kind, len(body) if length is None else length) + body.ljust(
        -(-len(body) // 8) * 8, b"\0"
    )
    return bytes(data[:65536])


def test_masks_equal_those_of_the_compiled_core() -> None:
    found = {
        name: int(value, 16) for name, value in re.findall(r"#define QC_(\w+)\s+(0x[0-9A-F]+)ULL", PXD.read_text())
    }
    assert found == {
        "OFFSET_MASK": od.OFFSET_MASK,
        "L1_RESERVED": od.L1_RESERVED,
        "L2_RESERVED": od.L2_RESERVED,
        "RT_OFFSET_MASK": od.REFCOUNT_TABLE_OFFSET_MASK,
        "RT_RESERVED": od.REFCOUNT_TABLE_RESERVED,
        "COPIED": od.COPIED,
        "COMPRESSED": od.COMPRESSED,
        "ZERO": od.ZERO,
        "NO_OFFSET": (1 << 64) - 1,
    }


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "Image is not in qcow2 format"),
        (b"QFI\xfb", "Unsupported qcow2 version 0"),
        (patched(4, ">I", 4), "Unsupported qcow2 version 4"),
        (patched(20, ">I", 8), "Unsupported cluster size: 2^8"),
        (patched(20, ">I", 0xFFFFFFFF), "Unsupported cluster size: 2^4294967295"),
        (patched(100, ">I", 103), "qcow2 header too short"),
        (patched(100, ">I", 65544), "qcow2 header exceeds cluster size"),
        (patched(8, ">Q", 65537), "Invalid backing file offset"),
        (patched(8, ">QI", 65536 - 10, 11), "Backing file name too long"),
        (patched(8, ">QI", 1024, 1024), "Backing file name too long"),
        (patched(104, ">B", 2), "qcow2: unknown compression type: 2"),
        (patched(104, ">B", 1), "qcow2: Compression type incompatible feature bit must be set"),
        (patched(72, ">Q", 8), "qcow2: Compression type incompatible feature bit must not be set"),
        (patched(96, ">I", 7), "Reference count entry width too large; may not exceed 64 bits"),
        (patched(32, ">I", 3), "Unsupported encryption method 3"),
        (patched(32, ">I", 2), "Missing CRYPTO header for crypt method 2"),
        (patched(56, ">I", 0), "Image does not contain a reference count table"),
        (patched(56, ">I", 129), "Reference count table too large"),
        (patched(48, ">Q", 0x10200), "Reference count table offset invalid"),
        (patched(60, ">I", 65537), "Snapshot table too large"),
        (patched(64, ">Q", 512), "Snapshot table offset invalid"),
        (patched(36, ">I", (4 << 20) + 1), "Active L1 table too large"),
        (patched(40, ">Q", (1 << 64) - 65536), "Active L1 table offset invalid"),
        (patched(24, ">Q", 1 << 62), "Image is too big"),
        (patched(24, ">Q", (1 << 64) - 1), "Image is too big"),
        (patched(24, ">Q", (512 << 20) + 1), "L1 table is too small"),
        (patched(88, ">Q", 2), "data-file-raw requires a data file"),
        (with_extension(0x1234, b"", 0x7FFFFFFF), "Header extension too large"),
        (with_extension(od.EXT_BACKING_FORMAT, b"x" * 16), "ERROR: ext_backing_format: len=16 too large (>=16)"),
        (with_extension(od.EXT_BITMAPS, b"x" * 23), "bitmaps_ext: Invalid extension length"),
        (
            with_extension(od.EXT_BITMAPS, struct.pack(">IIQQ", 1, 1, 32, 0), autoclear=1),
            "bitmaps_ext: Reserved field is not zero",
        ),
        (
            with_extension(od.EXT_BITMAPS, struct.pack(">IIQQ", 0, 0, 32, 0), autoclear=1),
            "found bitmaps extension with zero bitmaps",
        ),
        (
            with_extension(od.EXT_BITMAPS, struct.pack(">IIQQ", 1, 0, 32, 512), autoclear=1),
            "bitmaps_ext: invalid bitmap directory offset",
        ),
    ],
)
def test_a_bad_header_is_refused_with_the_cause_qemu_gives(data: bytes, message: str) -> None:
    with pytest.raises(FormatError) as caught:
        Header.parse(data, len(data))
    assert caught.value.message == message


def test_unknown_incompatible_features_are_named_from_the_image() -> None:
    data = header_bytes(incompatible_features=1 << 40 | 1 << 41)
    struct.pack_into(">BB46s", data, 112 + 8, 0, 40, b"new\nthing")
    with pytest.raises(UnsupportedFeature) as caught:
        Header.parse(bytes(data), len(data))
    assert caught.value.message == (
        "Unsupported qcow2 feature(s): new\\nthing, Unknown incompatible feature: 20000000000"
    )


def test_a_name_at_the_cut_end_of_the_feature_table_counts() -> None:
    entry = b"\0\x28short"
    data = bytearray(bytes(header_bytes(incompatible_features=1 << 40)))
    start = data.index(struct.pack(">I", od.EXT_FEATURE_NAMES))
    data[start + 4 : start + 8] = struct.pack(">I", len(entry))
    data[start + 8 : start + 24] = entry.ljust(16, b"\0")
    with pytest.raises(UnsupportedFeature, match=r"feature\(s\): short$"):
        Header.parse(bytes(data), len(data))


def test_the_corrupt_bit_refuses_writing_but_not_repair() -> None:
    data = bytes(header_bytes(incompatible_features=od.INCOMPAT_CORRUPT))
    assert Header.parse(data, len(data)).is_corrupt
    assert Header.parse(data, len(data), writable=True, repair=True).is_corrupt
    with pytest.raises(FormatError, match="Image is corrupt; cannot be opened read/write"):
        Header.parse(data, len(data), writable=True)


def test_repair_lets_mendable_pointers_through() -> None:
    data = header_bytes(nb_snapshots=70000, snapshots_offset=13, refcount_table_clusters=0)
    header = Header.parse(bytes(data), len(data), repair=True)
    assert (header.nb_snapshots, header.snapshots_offset, header.refcount_table_clusters) == (70000, 13, 0)


def test_a_104_byte_header_has_no_compression_type_and_grows_on_rewrite() -> None:
    data = header_bytes()
    struct.pack_into(">I", data, 100, 104)
    data[104:112] = b""
    header = Header.parse(bytes(data), 196616)
    assert header.compression_type == 0
    assert header.unknown_extensions == ()
    assert header.pack() == bytes(header_bytes())


def test_unknown_fields_extensions_and_compatible_bits_survive_a_rewrite() -> None:
    data = bytes(
        header_bytes(
            unknown_fields=b"\1\2\3\4\5\6\7\x08",
            unknown_extensions=(od.Extension(0xCAFE, b"abc"), od.Extension(0xBEEF, b"")),
            compatible_features=1 << 50,
        )
    )
    header = Header.parse(data, len(data))
    assert header.header_length == 120
    assert header.unknown_extensions == ((0xCAFE, b"abc"), (0xBEEF, b""))
    assert header.pack() == data


@pytest.mark.real("qemu-img")
@pytest.mark.parametrize(
    "arguments",
    [
        ["-o", "compat=0.10", "64M"],
        ["-o", "compat=v3,lazy_refcounts=on,refcount_bits=1", "64M"],
        ["-o", "cluster_size=512", "1M"],
        ["-o", "cluster_size=4096", "1M"],
        ["-o", "cluster_size=8192", "1M"],
        ["-o", "cluster_size=2M,extended_l2=on,compression_type=zstd", "1G"],
        ["-u", "-b", "some/backing file", "-F", "raw", "1M"],
        ["-u", "-b", "b", "-F", "qcow2", "-o", "compat=0.10,cluster_size=512", "1M"],
    ],
)
def test_parse_then_pack_gives_the_bytes_qemu_wrote(tmp_path: Path, arguments: list[str]) -> None:
    image = tmp_path / "image"
    size = arguments.pop()
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *arguments, image, size], check=True)
    data = image.read_bytes()
    need = od.header_read_size(data[: od.HEADER_READ])
    header = Header.parse(data[:need], len(data))
    assert header.pack() == data[: header.cluster_size].ljust(header.cluster_size, b"\0")


def test_a_header_beyond_the_first_read_asks_for_its_cluster() -> None:
    data = bytes(header_bytes(unknown_extensions=(od.Extension(1, b"x" * 5000),), backing_file=b"base"))
    assert od.header_read_size(data[: od.HEADER_READ]) == 65536
    assert Header.parse(data, len(data)).backing_file == b"base"
    with pytest.raises(UsageError, match="needs 65536 bytes"):
        Header.parse(data[:4096], len(data))


def test_what_does_not_fit_in_one_cluster_is_refused() -> None:
    header = Header(cluster_bits=9)
    header.backing_file = b"x" * (512 - 112 - 8)
    assert len(header.pack()) == 512
    header.backing_file += b"x"
    with pytest.raises(UsageError, match="No space left in the file header"):
        header.pack()


@given(st.binary(max_size=600), st.integers(0, 2**64 - 1), st.booleans())
def test_any_bytes_parse_or_raise_one_printable_line(tail: bytes, features: int, repair: bool) -> None:
    data = bytes(header_bytes())[:112] + tail
    data = data[:72] + struct.pack(">Q", features & 0x1F) + data[80:]
    try:
        header = Header.parse(data, len(data), repair=repair)
    except Error as error:
        assert str(error).isprintable()
    else:
        header.pack()


# -- geometry ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cluster_bits", "extended", "size"),
    [(9, False, 128 << 30), (12, False, 8 << 40), (14, True, 64 << 40), (16, False, 2 << 50), (21, True, 1 << 60)],
)
def test_max_virtual_size_needs_exactly_the_largest_l1(cluster_bits: int, extended: bool, size: int) -> None:
    assert od.max_virtual_size(cluster_bits, extended) == size
    assert od.l1_entries(size, cluster_bits, extended) * 8 == od.MAX_L1_BYTES


@given(st.integers(0, 1 << 40), st.integers(9, 21), st.integers(0, 6))
def test_refcount_structures_cover_themselves_and_nothing_more(clusters: int, cluster_bits: int, order: int) -> None:
    blocks, tables = od.refcount_structures(clusters, cluster_bits, order)
    per_block = od.refcounts_per_block(cluster_bits, order)
    assert blocks * per_block >= clusters + blocks + tables
    assert tables * ((1 << cluster_bits) // 8) >= blocks
    if blocks:
        assert (blocks - 1) * per_block < clusters + blocks + tables


@given(st.data(), st.integers(9, 21))
def test_compressed_descriptor_covers_the_data_and_ends_with_its_sector(data: st.DataObject, cluster_bits: int) -> None:
    offset = data.draw(st.integers(0, (1 << min(70 - cluster_bits, 56)) - 1))
    length = data.draw(st.integers(1, 1 << cluster_bits))
    entry = od.pack_compressed(offset, length, cluster_bits)
    assert entry & od.COMPRESSED and not entry & od.COPIED
    found, available = od.unpack_compressed(entry, cluster_bits)
    assert found == offset
    assert 0 <= available - length < 512 and (found + available) % 512 == 0


@given(st.integers(0, 1 << 40), st.integers(14, 21), st.booleans())
def test_l1_and_l2_index_name_the_cluster(offset: int, cluster_bits: int, extended: bool) -> None:
    per_table = (1 << cluster_bits) // (16 if extended else 8)
    found = od.l1_index(offset, cluster_bits, extended) * per_table + od.l2_index(offset, cluster_bits, extended)
    assert found == offset >> cluster_bits


# -- snapshots -----------------------------------------------------------------

snapshot_entries = st.builds(
    SnapshotEntry,
    l1_table_offset=st.integers(0, 2**40).map(lambda n: n * 65536),
    l1_size=st.integers(0, 2**20),
    id=st.binary(max_size=12),
    name=st.binary(max_size=40),
    date_sec=st.integers(0, 2**32 - 1),
    date_nsec=st.integers(0, 10**9 - 1),
    vm_clock_nsec=st.integers(0, 2**64 - 1),
    vm_state_size=st.integers(0, 2**50),
    disk_size=st.integers(0, 2**50),
    icount=st.none() | st.integers(0, 2**63),
)


@given(st.lists(snapshot_entries, max_size=8), st.binary(max_size=30))
def test_snapshot_table_round_trips_and_asks_for_missing_bytes(entries: list[SnapshotEntry], extra: bytes) -> None:
    entries = [entry._replace(unknown_extra=extra, extra_size=24 + len(extra)) for entry in entries]
    table = od.pack_snapshots(entries, 1 << 30)
    assert od.parse_snapshots(table, len(entries)) == entries
    assert -(-od.snapshot_table_size(entries) // 8) * 8 == len(table)
    have = 0
    while True:
        try:
            assert od.parse_snapshots(table[:have], len(entries)) == entries
            break
        except ShortTable as short:
            assert have < short.needed <= len(table)
            have = short.needed


def test_snapshot_extra_data_over_the_limit_needs_repair() -> None:
    head = struct.pack(">QIHHIIQII", 0, 1, 1, 1, 0, 0, 0, 5, 1025)
    table = head + b"\0" * 1025 + b"1n"
    with pytest.raises(FormatError, match="Too much extra metadata in snapshot table entry 0"):
        od.parse_snapshots(table, 1)
    (entry,) = od.parse_snapshots(table, 1, repair=True)
    assert (entry.id, entry.name, len(entry.unknown_extra)) == (b"1", b"n", 1000)


def test_snapshot_without_extra_data_tells_no_disk_size() -> None:
    table = struct.pack(">QIHHIIQII", 0, 1, 1, 1, 0, 0, 0, 5, 0) + b"1n"
    (entry,) = od.parse_snapshots(table, 1)
    assert (entry.disk_size, entry.vm_state_size, entry.icount, entry.extra_size) == (None, 5, None, 0)


def test_snapshot_table_over_64_mib_is_refused_and_cut_by_repair() -> None:
    entry = struct.pack(">QIHHIIQII", 0, 1, 65535, 65535, 0, 0, 0, 5, 0) + b"\0" * (65535 * 2 + 2)
    table = entry * 520
    with pytest.raises(FormatError, match="Snapshot table is too big"):
        od.parse_snapshots(table, 520)
    assert len(od.parse_snapshots(table, 520, repair=True)) == (64 << 20) // len(entry)


def test_next_snapshot_id_is_above_every_number() -> None:
    entries = [SnapshotEntry(0, 0, name, b"", 0, 0) for name in (b"9", b"x", b"12abc", b"")]
    assert od.next_snapshot_id(entries) == b"13"
    assert od.next_snapshot_id([]) == b"1"


# -- bitmaps -------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.binary(min_size=1, max_size=1023), st.integers(16, 31), st.integers(0, 3)), min_size=1, max_size=5
    )
)
def test_bitmap_directory_round_trips(items: list[tuple[bytes, int, int]]) -> None:
    entries = [od.BitmapEntry(name, bits, 0x70000, 1, flags) for name, bits, flags in items]
    directory = od.pack_bitmap_directory(entries)
    assert od.parse_bitmap_directory(directory, len(entries), 64 << 20, 16) == entries
    with pytest.raises(FormatError, match="More bitmaps found"):
        od.parse_bitmap_directory(directory, len(entries) - 1, 64 << 20, 16)
    with pytest.raises(FormatError, match="Less bitmaps found"):
        od.parse_bitmap_directory(directory, len(entries) + 1, 64 << 20, 16)
    with pytest.raises(FormatError, match="Broken bitmap directory"):
        od.parse_bitmap_directory(directory[:-8], len(entries), 64 << 20, 16)


@pytest.mark.parametrize(
    "change",
    [
        {"table_offset": 0},
        {"table_offset": 512},
        {"table_size": 0},
        {"table_size": 8193},
        {"flags": 4},
        {"type": 2},
        {"granularity_bits": 8},
        {"granularity_bits": 32},
        {"name": b""},
        {"name": b"n" * 1024},
        {"granularity_bits": 9, "table_size": 1},
    ],
)
def test_a_bitmap_outside_the_limits_is_refused(change: dict[str, int]) -> None:
    entry = od.BitmapEntry(b"name", 16, 0x70000, 1)._replace(**change)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="doesn't satisfy the constraints"):
        od.parse_bitmap_directory(entry.pack(), 1, 1 << 40, 16)


def test_bitmap_table_entries_counts_clusters_of_bits() -> None:
    assert od.bitmap_table_entries(1 << 40, 16, 16) == 32
    assert od.bitmap_table_entries((1 << 40) + 1, 16, 16) == 33
    assert od.bitmap_table_entries(0, 16, 16) == 0
