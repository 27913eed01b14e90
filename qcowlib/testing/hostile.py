# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Named images that try to harm whoever opens them, with what a safe tool does.

Invariant: the same names give the same bytes; each image is a valid one
(:mod:`.tiny`) with as few changes as its name says.  Whatever the outcome, a
tool ends without a signal or traceback, within 10 s of CPU and 512 MiB.

Outcomes (:attr:`HostileCase.expect`):

========== ==================================================================
refuse     opening fails with an error of :mod:`qcowlib.errors`
open       opens and reads from end to end (``guest`` says what, if known)
unreadable opens, and reading from end to end fails with such an error
gate       opening with the policy ``same_directory`` fails, and nothing but
           the image itself was opened; looking at the image alone works
either     any of refuse, open, unreadable
========== ==================================================================
"""

from __future__ import annotations

import os
import socket
import struct
import zlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

from backports.zstd import compress as zstd_compress

from qcowlib.testing.tiny import TinyImage, TinySpec, build

__all__ = ["Expect", "HostileCase", "hostile_cases", "materialize"]

Expect = Literal["refuse", "open", "unreadable", "gate", "either"]

COPIED = 1 << 63
COMPRESSED = 1 << 62
BITMAPS, CRYPTO, BACKING_FORMAT, DATA_FILE = 0x23852875, 0x0537BE77, 0xE2792ACA, 0x44415441
FEATURES = 0x6803F857


class HostileCase(NamedTuple):
    """One image.

    ``corrupt`` says whether a check of it finds errors (``None``: not said).
    ``files`` are made beside it: bytes, or ``fifo``, ``folder``, ``socket``,
    ``link:TARGET``.  ``length`` makes the file longer, without content.
    ``whole`` is false where reading from end to end would take for ever.
    """

    name: str
    image: bytes
    expect: Expect
    corrupt: bool | None = None
    files: tuple[tuple[str, bytes | str], ...] = ()
    guest: bytes | None = None
    length: int = 0
    whole: bool = True


def hostile_cases() -> list[HostileCase]:
    """Return all cases; their names are unique."""
    cases: list[HostileCase] = []
    for maker in (_header, _features, _extensions, _truncated, _l1, _l2, _compressed, _zstd, _extended, _refcounts,
                  _snapshots, _bitmaps, _backing, _data_files, _resources):  # fmt: skip
        cases += maker()
    return cases


def materialize(case: HostileCase, folder: str) -> str:
    """Write the image and what lies beside it into *folder*; return the path of the image."""
    for name, content in case.files:
        path = os.path.join(folder, name)
        if isinstance(content, bytes):
            with open(path, "wb") as file:
                file.write(content)
        elif content == "fifo":
            os.mkfifo(path)
        elif content == "folder":
            os.mkdir(path)  # noqa: PTH102
        elif content == "socket":
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(path)
        else:
            os.symlink(content.removeprefix("link:"), path)  # noqa: PTH211
    path = os.path.join(folder, "image.qcow2")
    with open(path, "wb") as file:
        file.write(case.image)
        if case.length:
            file.truncate(case.length)
    return path


_PLAIN = build(TinySpec())
_SNAP = build(TinySpec(snapshot=True))
_BITS = build(TinySpec(bitmap=True))
_V2 = build(TinySpec(version=2))


def _header() -> Iterator[HostileCase]:
    image = _PLAIN
    refused = {
        "magic": (0, 0x514649FA, 0x4B444D56),
        "version": (0, 1, 4, 1 << 31, (1 << 32) - 1),
        "cluster_bits": (0, 1, 8, 22, 31, 32, 63, 64, (1 << 32) - 1),
        "size": (1 << 56, 1 << 62, (1 << 63) - 512, 1 << 63, (1 << 64) - 1),
        "l1_size": (0, (1 << 22) + 1, (1 << 29) + 1, (1 << 31) - 1, (1 << 32) - 1),
        "l1_table_offset": (1, 511, 512, image.l1 + 8, (1 << 63) - 4096, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1),
        "refcount_table_offset": (1, image.table + 8, (1 << 63) - 4096, 1 << 63, (1 << 64) - 4096),
        "refcount_table_clusters": (0, (1 << 11) + 1, (1 << 17) + 1, 1 << 31, (1 << 32) - 1),
        "refcount_order": (7, 8, 31, 32, 63, 1 << 31, (1 << 32) - 1),
        "header_length": (0, 8, 72, 96, 103, 4104, 1 << 16, 1 << 31, (1 << 32) - 8),
        "compression_type": (1, 2, 255),
        "crypt_method": (2, 3, 1 << 31, (1 << 32) - 1),
    }
    for field, values in refused.items():
        for value in values:
            yield HostileCase(f"hdr-{field.replace('_', '-')}-{value:x}", image.with_field(field, value), "refuse")
    either = {
        "size": (0, 1, 513, (1 << 18) - 1),
        "l1_size": (1 << 22,),
        "l1_table_offset": (0, image.table, 1 << 40),
        "refcount_table_offset": (0, image.l1, 1 << 40),
        "refcount_table_clusters": (1 << 11,),
        "header_length": (104, 105, 120, 4096),
        "crypt_method": (1,),
    }
    for field, values in either.items():
        for value in values:
            yield HostileCase(f"hdr-{field.replace('_', '-')}-{value:x}", image.with_field(field, value), "either")
    for name, offset, length in (
        ("bk-off-2^64-1", (1 << 64) - 1, 4),
        ("bk-off-2^63", 1 << 63, 4),
        ("bk-off-cluster", 4096, 4),
        ("bk-off-past-cluster", 4097, 4),
        ("bk-len-1024", 200, 1024),
        ("bk-len-2^31", 200, 1 << 31),
        ("bk-len-2^32-1", 200, (1 << 32) - 1),
        ("bk-len-past-cluster", 4090, 10),
    ):
        raw = image.with_bytes(8, struct.pack(">QI", offset, length))
        yield HostileCase(name, raw, "refuse")
    yield HostileCase("hdr-empty", b"", "refuse")
    yield HostileCase("hdr-vmdk", b'# Disk DescriptorFile\nversion=1\ncreateType="monolithicFlat"\n' * 8, "refuse")
    version1 = struct.pack(">4sIQIIQBBHIQ", b"QFI\xfb", 1, 0, 0, 0, 1 << 63, 12, 63, 0, 0, 72) + bytes(4096)
    yield HostileCase("hdr-qcow1-l2-bits-63", version1, "refuse")


def _features() -> Iterator[HostileCase]:
    image = _PLAIN
    for bit in (5, 6, 7, 31, 32, 62, 63):
        yield HostileCase(f"feat-incompatible-{bit}", image.with_field("incompatible_features", 1 << bit), "refuse")
    yield HostileCase("feat-zstd-bit-without-type", image.with_field("incompatible_features", 8), "refuse")
    yield HostileCase("feat-extended-small-cluster", image.with_field("incompatible_features", 16), "refuse")
    yield HostileCase("feat-all-incompatible", image.with_field("incompatible_features", (1 << 64) - 1), "refuse")
    yield HostileCase("feat-dirty", image.with_field("incompatible_features", 1), "open", guest=image.guest)
    yield HostileCase("feat-corrupt", image.with_field("incompatible_features", 2), "open", guest=image.guest)
    for bit in (1, 31, 63):
        raw = image.with_field("compatible_features", 1 << bit)
        yield HostileCase(f"feat-compatible-{bit}", raw, "open", False, guest=image.guest)
    for bit in (2, 31, 63):
        raw = image.with_field("autoclear_features", 1 << bit)
        yield HostileCase(f"feat-autoclear-{bit}", raw, "open", False, guest=image.guest)
    yield HostileCase("feat-raw-without-data-file", image.with_field("autoclear_features", 2), "either")
    yield HostileCase("feat-bitmaps-without-extension", image.with_field("autoclear_features", 1), "either")
    names = b"".join(struct.pack(">BB46s", 0, bit, b"evil\n\x1b[31mname" + bytes([bit])) for bit in range(64))
    named = build(TinySpec(extensions=((FEATURES, names[:2400]),)))
    yield HostileCase("feat-names-control", named.with_field("incompatible_features", 1 << 40), "refuse")


def _extensions() -> Iterator[HostileCase]:
    unknown = build(TinySpec(extensions=((0x12345678, b"12345678"),)))
    at = unknown.extensions[0x12345678]
    for length in (4096, 1 << 16, (1 << 31) - 1, (1 << 32) - 1, (1 << 32) - 8):
        yield HostileCase(f"ext-len-{length:x}", unknown.with_bytes(at + 4, struct.pack(">I", length)), "refuse")
    for length in (16, 255):
        made = build(TinySpec(extensions=((BACKING_FORMAT, b"x" * length),)))
        yield HostileCase(f"ext-format-len-{length}", made.raw, "refuse")
    for length in (0, 23, 25, 32):
        made = build(TinySpec(extensions=((BITMAPS, bytes(length)),)))
        yield HostileCase(f"ext-bitmaps-len-{length}", made.with_field("autoclear_features", 1), "refuse")
    for length in (0, 15, 16, 17):
        made = build(TinySpec(extensions=((CRYPTO, bytes(length)),)))
        yield HostileCase(f"ext-crypto-unexpected-{length}", made.raw, "refuse")
    for length in (0, 1, 47, 49):
        made = build(TinySpec(extensions=((FEATURES, bytes(length)),)))
        yield HostileCase(f"ext-features-len-{length}", made.raw, "open", guest=made.guest)
    many = build(TinySpec(cluster_bits=16, size=512 << 10, extensions=((0x77, b""),) * 8000))
    yield HostileCase("ext-8000", many.raw, "open", False, guest=many.guest)
    twice = build(TinySpec(extensions=((BACKING_FORMAT, b"raw"), (BACKING_FORMAT, b"qcow2"))))
    yield HostileCase("ext-twice", twice.raw, "either")


def _truncated() -> Iterator[HostileCase]:
    image = _PLAIN
    for length in (1, 3, 4, 7, 8, 20, 71, 72, 103):
        yield HostileCase(f"trunc-{length}", image.raw[:length], "refuse")
    for length in (104, 111, 112, 120, 512, 4096, image.block, image.l1):
        yield HostileCase(f"trunc-{length}", image.raw[:length], "either")
    for name, length in (("l2", image.l2), ("data", image.data), ("compressed", image.compressed)):
        yield HostileCase(f"trunc-before-{name}", image.raw[:length], "unreadable")


def _pointers(image: TinyImage) -> dict[str, int]:
    return {"l1": image.l1, "l2": image.l2, "refcount-table": image.table, "refcount-block": image.block}


def _l1() -> Iterator[HostileCase]:
    image = _PLAIN
    for name, target in _pointers(image).items():
        if name != "l2":
            yield HostileCase(f"l1-on-{name}", image.with_word(image.l1, COPIED | target), "either", True)
    yield HostileCase("l1-unaligned", image.with_word(image.l1, COPIED | image.l2 + 512), "unreadable", True)
    for target in (1 << 30, 1 << 40, (1 << 56) - 4096):
        yield HostileCase(f"l1-past-{target:x}", image.with_word(image.l1, COPIED | target), "unreadable", True)
    for bit in (0, 1, 8, 56, 62):
        raw = image.with_word(image.l1, COPIED | image.l2 | 1 << bit)
        yield HostileCase(f"l1-reserved-{bit}", raw, "open", True, guest=image.guest)
    yield HostileCase("l1-copied-clear", image.with_word(image.l1, image.l2), "open", True, guest=image.guest)
    wide = build(TinySpec(cluster_bits=9))
    entry = wide.raw[wide.l1 : wide.l1 + 8]
    yield HostileCase("l1-all-one-table", wide.with_bytes(wide.l1, entry * 8), "open", True)


def _l2() -> Iterator[HostileCase]:
    image = _PLAIN
    for name, target in _pointers(image).items():
        yield HostileCase(f"l2-on-{name}", image.with_word(image.l2, COPIED | target), "open", True)
    yield HostileCase("l2-unaligned", image.with_word(image.l2, COPIED | image.data + 512), "unreadable", True)
    for target in (1 << 30, 1 << 40, (1 << 56) - 4096):
        yield HostileCase(f"l2-past-{target:x}", image.with_word(image.l2, COPIED | target), "unreadable", True)
    for bit in (1, 8, 56, 61):
        raw = image.with_word(image.l2, COPIED | image.data | 1 << bit)
        yield HostileCase(f"l2-reserved-{bit}", raw, "open", True, guest=image.guest)
    yield HostileCase("l2-two-owners", image.with_word(image.l2 + 24, COPIED | image.data), "open", True)
    yield HostileCase("l2-copied-clear", image.with_word(image.l2, image.data), "open", True, guest=image.guest)
    raw = image.with_word(image.l2 + 8, COPIED | 1 << 40 | 1)
    yield HostileCase("l2-zero-past", raw, "open", True, guest=image.guest)
    yield HostileCase("l2-zero-v2", _V2.with_word(_V2.l2 + 8, 1), "unreadable")
    noise = b"".join(struct.pack(">Q", COPIED | index * 4096) for index in range(512))
    yield HostileCase("l2-every-cluster", image.with_bytes(image.l2, noise), "either", True)


def _descriptor(image: TinyImage, offset: int, extra: int) -> int:
    return COMPRESSED | extra << (70 - (image.cluster.bit_length() - 1)) | offset


def _compressed() -> Iterator[HostileCase]:
    image = _PLAIN
    slot, at = image.l2 + 16, image.compressed

    def stream(name: str, data: bytes, expect: Expect) -> HostileCase:
        raw = image.with_bytes(at, data[:4096] + bytes(max(0, 4096 - len(data))))
        return HostileCase(f"cz-{name}", raw, expect, False)

    yield stream("garbage", b"\xff" * 4096, "unreadable")
    yield stream("zeros", bytes(4096), "unreadable")
    coder = zlib.compressobj(9, zlib.DEFLATED, -12)
    half = coder.compress(b"x" * 2048) + coder.flush()
    yield stream("short", half, "unreadable")
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    yield stream("amplify", coder.compress(bytes(1 << 22)) + coder.flush(), "open")
    yield stream("cut", b"\x00\xff\x0f\x00\xf0" + b"stored block without its end", "either")
    for name, offset in (("past", 1 << 40), ("past-2^55", 1 << 55), ("end", len(image.raw))):
        yield HostileCase(f"cz-{name}", image.with_word(slot, _descriptor(image, offset, 0)), "unreadable", True)
    for name, offset in (("on-header", 0), ("on-l2", image.l2), ("on-table", image.table)):
        yield HostileCase(f"cz-{name}", image.with_word(slot, _descriptor(image, offset, 15)), "either", True)
    (entry,) = struct.unpack_from(">Q", image.raw, slot)
    yield HostileCase("cz-copied", image.with_word(slot, entry | COPIED), "open", True, guest=image.guest)
    raw = image.with_word(slot, _descriptor(image, image.compressed, 15))
    yield HostileCase("cz-longest", raw, "either", guest=image.guest)
    everywhere = b"".join(struct.pack(">Q", entry) for _ in range(64))
    yield HostileCase("cz-all-one-stream", image.with_bytes(image.l2, everywhere), "open", True)


def _zstd() -> Iterator[HostileCase]:
    image = build(TinySpec(zstd=True))
    valid = zstd_compress(image.guest[8192:12288])
    halves = zstd_compress(image.guest[8192:10240]) + zstd_compress(image.guest[10240:12288])
    magic = b"\x28\xb5\x2f\xfd"
    streams: dict[str, tuple[bytes, Expect]] = {
        "garbage": (b"\xff" * 512, "unreadable"),
        "zeros": (bytes(512), "unreadable"),
        "short": (zstd_compress(b"x" * 100), "unreadable"),
        "two-frames": (halves, "open"),
        "cut": (valid[: len(valid) // 2] + b"\xff" * 200, "unreadable"),
        "window-128m": (magic + b"\x00\x88" + b"\x01\x00\x00", "unreadable"),
        "window-2t": (magic + b"\x00\xf8" + b"\x01\x00\x00", "unreadable"),
        "claims-2^62": (magic + b"\xe0" + struct.pack("<Q", 1 << 62) + b"\x03\x00\x00x", "unreadable"),
        "rle-4g": (magic + b"\xa0" + struct.pack("<I", 0xFFFFFFFF) + b"\xfb\xff\xffx" * 100, "unreadable"),
        "skippable-only": (b"\x50\x2a\x4d\x18\x00\x00\x00\x00" * 64, "unreadable"),
        "skippable-huge": (b"\x50\x2a\x4d\x18\xff\xff\xff\xff" + valid, "unreadable"),
        "empty-frames": (zstd_compress(b"") * 40, "unreadable"),
    }
    for name, (data, expect) in streams.items():
        raw = image.with_bytes(image.compressed, data[:512] + bytes(max(0, 512 - len(data))))
        guest = image.guest if expect == "open" else None
        yield HostileCase(f"zs-{name}", raw, expect, False, guest=guest)


def _extended() -> Iterator[HostileCase]:
    image = build(TinySpec(cluster_bits=14, extended_l2=True))
    every = (1 << 64) - 1
    yield HostileCase("xl-alloc-and-zero", image.with_word(image.l2 + 8, every), "unreadable", True)
    yield HostileCase("xl-alloc-without-host", image.with_word(image.l2 + 5 * 16 + 8, 1), "unreadable", True)
    (entry,) = struct.unpack_from(">Q", image.raw, image.l2)
    yield HostileCase("xl-zero-flag", image.with_word(image.l2, entry | 1), "either")
    yield HostileCase("xl-compressed-with-bitmap", image.with_word(image.l2 + 40, every), "either", True)
    yield HostileCase("xl-unaligned", image.with_word(image.l2, entry + 512), "unreadable", True)


def _refcounts() -> Iterator[HostileCase]:
    image = _PLAIN
    guest = image.guest
    for name, value in {
        "reserved": image.block | 1,
        "unaligned": image.block + 512,
        "past": 1 << 40,
        "past-2^63": 1 << 63,
        "on-l1": image.l1,
        "on-table": image.table,
        "on-data": image.data,
        "none": 0,
    }.items():
        yield HostileCase(f"rb-{name}", image.with_word(image.table, value), "open", True, guest=guest)
    yield HostileCase("rb-shared", image.with_word(image.table + 8, image.block), "open", True, guest=guest)
    for name, cluster in (("header", 0), ("table", 1), ("block", 2), ("l1", 3), ("l2", 4), ("data", 5)):
        raw = image.with_bytes(image.block + 2 * cluster, b"\0\0")
        yield HostileCase(f"rc-zero-{name}", raw, "open", True, guest=guest)
    raw = image.with_bytes(image.block + 10, b"\xff\xff")
    yield HostileCase("rc-65535", raw, "open", True, guest=guest)
    yield HostileCase("rc-leak", image.with_bytes(image.block + 200, b"\0\1" * 50), "open", False, guest=guest)


def _snapshots() -> Iterator[HostileCase]:
    image = _SNAP
    for value in (2, 65536, 65537, 1 << 31, (1 << 32) - 1):
        yield HostileCase(f"sn-count-{value:x}", image.with_field("nb_snapshots", value), "either")
    for value in (1, 512, image.snapshot_table + 8, 1 << 40, (1 << 63) - 4096, 1 << 63, (1 << 64) - 4096):
        yield HostileCase(f"sn-table-{value:x}", image.with_field("snapshots_offset", value), "either")
    yield HostileCase("sn-table-on-header", image.with_field("snapshots_offset", 0), "either")
    table = image.snapshot_table
    for name, offset, fmt, values in (
        ("l1-offset", 0, ">Q", (0, 1, 512, 1 << 40, (1 << 63) - 4096, (1 << 64) - 4096)),
        ("l1-size", 8, ">I", (0, (1 << 22) + 1, 1 << 28, (1 << 31) - 1, (1 << 32) - 1)),
        ("id-size", 12, ">H", (0, 65535)),
        ("name-size", 14, ">H", (0, 65535)),
        ("extra", 36, ">I", (0, 8, 15, 1025, 1 << 20, 1 << 31, (1 << 32) - 1)),
        ("disk-size", 48, ">Q", (0, 1, 1 << 50, 1 << 63, (1 << 64) - 1)),
        ("vm-state", 40, ">Q", (1 << 40, (1 << 64) - 1)),
    ):
        for value in values:
            raw = image.with_bytes(table + offset, struct.pack(fmt, value))
            yield HostileCase(f"sn-{name}-{value:x}", raw, "either")
    for name, text in (("control", b"\n\x1b]0"), ("utf8", b"\xff\xfe\xc0\x80"), ("nul", b"a\0b\0")):
        raw = image.with_bytes(table + 65, text)
        yield HostileCase(f"sn-name-{name}", raw, "open", False, guest=image.guest)


def _bitmaps() -> Iterator[HostileCase]:
    image = _BITS
    entry = image.bitmap_directory
    extension = image.extensions[BITMAPS] + 8
    fields: tuple[tuple[str, int, str, tuple[int, ...]], ...] = (
        ("table", 0, ">Q", (0, 1, 512, 1 << 40, (1 << 64) - 4096)),
        ("entries", 8, ">I", (0, 2, (1 << 27) + 1, (1 << 32) - 1)),
        ("flags", 12, ">I", (1, 4, 8, 1 << 31)),
        ("type", 16, ">B", (0, 2, 255)),
        ("granularity", 17, ">B", (0, 8, 32, 63, 64, 255)),
        ("name-size", 18, ">H", (0, 1024, 65535)),
        ("extra", 20, ">I", (1, 8, 1 << 31, (1 << 32) - 1)),
    )
    for name, offset, fmt, values in fields:
        for value in values:
            raw = image.with_bytes(entry + offset, struct.pack(fmt, value))
            yield HostileCase(f"bm-{name}-{value:x}", raw, "either")
    for value in (1, 1 << 8, 1 << 40 | 1, 1 << 40, 1 << 56):
        yield HostileCase(f"bm-word-{value:x}", image.with_word(image.bitmap_table, value), "either")
    fields = (
        ("count", 0, ">I", (0, 2, 65536, (1 << 32) - 1)),
        ("reserved", 4, ">I", (1,)),
        ("directory-size", 8, ">Q", (0, 31, 33, 1 << 27, 1 << 32, (1 << 64) - 1)),
        ("directory", 16, ">Q", (0, 1, 512, 1 << 40, (1 << 64) - 4096)),
    )
    for name, offset, fmt, values in fields:
        for value in values:
            raw = image.with_bytes(extension + offset, struct.pack(fmt, value))
            yield HostileCase(f"bm-{name}-{value:x}", raw, "either")
    for name, text in (("control", b"\n\x1b]0"), ("utf8", b"\xff\xfe\xc0\x80"), ("nul", b"a\0b\0")):
        raw = image.with_bytes(entry + 24, text)
        yield HostileCase(f"bm-name-{name}", raw, "either")


def _backing() -> Iterator[HostileCase]:
    outside: dict[str, bytes] = {
        "absolute": b"/etc/passwd",
        "parent": b"../secret",
        "parent-inside": b"sub/../../secret",
        "link-out": b"link",
        "stdin": b"/dev/stdin",
        "fd": b"/dev/fd/0",
        "zero": b"/dev/zero",
        "proc": b"/proc/self/mem",
        "file-protocol": b"file:/etc/passwd",
        "json-file": b'json:{"driver":"raw","file":{"driver":"file","filename":"/etc/passwd"}}',
        "json-nbd": b'json:{"driver":"nbd","host":"127.0.0.1","port":"1"}',
        "json-deep": b"json:" + b"[" * 900,
        "json-number": b'json:{"a":' + b"9" * 900 + b"}",
        "nbd": b"nbd://127.0.0.1:1/x",
        "nbd-unix": b"nbd:unix:/tmp/none.sock",
        "http": b"http://127.0.0.1:1/x",
        "ssh": b"ssh://root@127.0.0.1:1/etc/passwd",
        "vvfat": b"fat:rw:/etc",
        "blkdebug": b"blkdebug::/etc/passwd",
        "null": b"null-co://",
        "fifo": b"fifo",
        "folder": b"folder",
        "socket": b"socket",
        "self": b"image.qcow2",
        "missing": b"missing",
        "empty-part": b"./",
        "nul": b"base\0/etc/passwd",
        "control": b"no\n\x1b[31mVirtual size: 0",
        "utf8": b"\xff\xfe\xc0\x80",
        "dash": b"-o",
        "long": b"x" * 1023,
    }
    beside: tuple[tuple[str, bytes | str], ...] = (
        ("fifo", "fifo"),
        ("folder", "folder"),
        ("socket", "socket"),
        ("link", "link:/etc/passwd"),
    )
    for name, target in outside.items():
        format_ = b"qcow2" if name == "self" else b"raw"
        image = build(TinySpec(backing=target, backing_format=format_))
        yield HostileCase(f"bk-{name}", image.raw, "gate", files=beside)
    other = build(TinySpec(backing=b"image.qcow2", backing_format=b"qcow2"))
    image = build(TinySpec(backing=b"other", backing_format=b"qcow2"))
    yield HostileCase("bk-loop", image.raw, "gate", files=(("other", other.raw),))
    for format_ in (b"nbd", b"file", b"nonsense", b"raw\n", b"\xff"):
        image = build(TinySpec(backing=b"base", backing_format=format_))
        yield HostileCase(f"bk-fmt-{format_.hex()}", image.raw, "gate", files=(("base", bytes(4096)),))
    forged = build(TinySpec(backing=b"/etc/passwd", backing_format=b"raw"))
    image = build(TinySpec(backing=b"base"))
    yield HostileCase("bk-probe", image.raw, "gate", files=(("base", forged.raw),))
    image = build(TinySpec(backing=b"base", backing_format=b"raw"))
    yield HostileCase("bk-raw-is-raw", image.raw, "open", files=(("base", forged.raw),))


def _data_files() -> Iterator[HostileCase]:
    names: dict[str, bytes] = {
        "absolute": b"/etc/passwd",
        "parent": b"../secret",
        "json": b'json:{"driver":"file","filename":"/etc/passwd"}',
        "nbd": b"nbd://127.0.0.1:1/x",
        "self": b"image.qcow2",
        "fifo": b"fifo",
        "folder": b"folder",
        "link-out": b"link",
        "missing": b"missing",
        "control": b"no\n\x1b[31mname",
        "nul": b"data\0/etc/passwd",
        "empty": b"",
    }
    beside: tuple[tuple[str, bytes | str], ...] = (
        ("fifo", "fifo"),
        ("folder", "folder"),
        ("link", "link:/etc/passwd"),
    )
    for name, target in names.items():
        image = build(TinySpec(data_file=target, compressed=False))
        yield HostileCase(f"df-{name}", image.raw, "gate", files=beside)
        if name in ("absolute", "self"):
            yield HostileCase(f"df-raw-{name}", image.with_field("autoclear_features", 2), "gate", files=beside)
    image = build(TinySpec(data_file=b"data", compressed=False))
    beside = (("data", image.data_file),)
    moved = image.with_word(image.l2, COPIED | image.cluster)
    yield HostileCase("df-moved", moved, "unreadable", files=beside)
    raw = image.with_word(image.l2 + 16, COMPRESSED | image.l2)
    yield HostileCase("df-compressed", raw, "unreadable", True, files=beside)
    yield HostileCase("df-bit-without-name", _PLAIN.with_field("incompatible_features", 4), "refuse")


def _resources() -> Iterator[HostileCase]:
    image = build(TinySpec(cluster_bits=16, size=512 << 10))
    end = len(image.raw)
    header = struct.pack(">QI", 1 << 51, 0) + struct.pack(">IQ", 1 << 22, end)
    raw = image.with_bytes(24, header)
    yield HostileCase("res-2pib", raw, "open", length=end + (32 << 20), whole=False)
    small = build(TinySpec(cluster_bits=9))
    size = len(small.raw)
    count = 65536
    raw = small.with_bytes(24, struct.pack(">QIIQ", count * 64 * 512, 0, count, size))
    raw = bytes(raw) + struct.pack(">Q", COPIED | small.l2) * count
    yield HostileCase("res-one-l2-65536", raw, "open", True, whole=False)
    table = image.with_field("refcount_table_clusters", 128)
    yield HostileCase("res-8mib-refcount-table", table, "either", length=end + (8 << 20))
    tall = small.with_bytes(24, struct.pack(">QIIQ", 1 << 36, 0, 1 << 21, size))
    tall = tall + struct.pack(">Q", small.l2) * 4
    yield HostileCase("res-64gib-small-clusters", tall, "open", length=1 << 40, whole=False)
