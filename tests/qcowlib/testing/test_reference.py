# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The second reader agrees with qemu-img on images that qemu made, whole and damaged."""

from __future__ import annotations

import json
import random
import struct
import subprocess
from pathlib import Path

import pytest

from qcowlib.testing.reference import ReferenceError, RefImage, reference_check, reference_read, reference_snapshots
from qcowlib.testing.tiny import TinySpec, build

pytestmark = pytest.mark.real("qemu-img", "qemu-io")

SIZE = 2 << 20

OPTIONS = [
    "",
    "compat=0.10",
    "cluster_size=512",
    "cluster_size=4k,refcount_bits=1",
    "cluster_size=4k,refcount_bits=2",
    "cluster_size=2k,refcount_bits=8",
    "cluster_size=4k,refcount_bits=32",
    "cluster_size=1k,refcount_bits=64",
    "cluster_size=16k,extended_l2=on",
    "cluster_size=64k,extended_l2=on,compression_type=zstd",
    "compression_type=zstd,cluster_size=8k",
    "cluster_size=2M",
    "preallocation=metadata,cluster_size=4k",
    "lazy_refcounts=on,cluster_size=4k",
]


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True)


def _make(path: Path, options: str, seed: int, *, backing: Path | None = None) -> None:
    args = ["qemu-img", "create", "-q", "-f", "qcow2"]
    if options:
        args += ["-o", options]
    if backing is not None:
        args += ["-b", str(backing), "-F", "raw"]
    assert _run(*args, str(path), str(SIZE)).returncode == 0
    chance = random.Random(seed)
    commands = []
    for _ in range(12):
        offset, length = chance.randrange(SIZE // 512) * 512, chance.randrange(1, 200) * 512
        length = min(length, SIZE - offset)
        verb = chance.choice(["write -P {p}", "write -P {p}", "write -z", "write -z -u", "discard"])
        commands += ["-c", f"{verb.format(p=chance.randrange(1, 255))} {offset} {length}"]
    cluster = RefImage(path.read_bytes()).cluster
    for _ in range(3):
        offset = chance.randrange(SIZE // cluster) * cluster
        commands += ["-c", f"write -c -P {chance.randrange(1, 255)} {offset} {cluster}"]
    _run("qemu-io", "-f", "qcow2", *commands, str(path))


def _qemu_bytes(path: Path, *options: str) -> bytes:
    out = path.with_suffix(".raw")
    result = _run("qemu-img", "convert", *options, "-f", "qcow2", "-O", "raw", str(path), str(out))
    assert result.returncode == 0, result.stderr
    return out.read_bytes()


def _qemu_check(path: Path) -> tuple[int, int]:
    result = _run("qemu-img", "check", "--output=json", "-f", "qcow2", str(path))
    report = json.loads(result.stdout)
    return report.get("corruptions", 0), report.get("leaks", 0)


@pytest.mark.parametrize("options", OPTIONS)
def test_reading_and_checking_agree_with_qemu(tmp_path: Path, options: str) -> None:
    path = tmp_path / "image"
    _make(path, options, 1)
    assert reference_read(path.read_bytes()) == _qemu_bytes(path)
    result = reference_check(path.read_bytes())
    assert (result.corruptions, result.leaks) == _qemu_check(path) == (0, 0), result.messages


def test_backing_bytes_show_through_and_end_where_they_end(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(random.Random(3).randbytes(SIZE // 2 + 512))
    for options in ("cluster_size=4k", "extended_l2=on"):
        path = tmp_path / f"top{options}"
        _make(path, options, 2, backing=base)
        assert reference_read(path.read_bytes(), backing=base.read_bytes()) == _qemu_bytes(path)


@pytest.mark.parametrize("raw", ["off", "on"])
def test_data_files_are_read(tmp_path: Path, raw: str) -> None:
    path, data = tmp_path / "image", tmp_path / "data"
    options = f"data_file={data},data_file_raw={raw}"
    assert _run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, str(path), str(SIZE)).returncode == 0
    _run("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 100k", "-c", "write -z 64k 64k", str(path))
    assert reference_read(path.read_bytes(), data=data.read_bytes()) == _qemu_bytes(path)
    assert reference_check(path.read_bytes(), data=data.read_bytes()).corruptions == 0
    with pytest.raises(ReferenceError):
        reference_read(path.read_bytes())


def test_snapshots_are_listed_read_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "image"
    _make(path, "cluster_size=4k", 5)
    before = _qemu_bytes(path)
    _run("qemu-img", "snapshot", "-c", "first", str(path))
    _run("qemu-io", "-f", "qcow2", "-c", f"write -P 99 0 {SIZE // 2}", str(path))
    _run("qemu-img", "snapshot", "-c", "second", str(path))
    content = path.read_bytes()
    assert [(entry.ident, entry.name, entry.size) for entry in reference_snapshots(content)] == [
        ("1", "first", SIZE),
        ("2", "second", SIZE),
    ]
    assert reference_read(content, snapshot="first") == before
    assert reference_read(content) == reference_read(content, snapshot="2") == _qemu_bytes(path)
    result = reference_check(content)
    assert (result.corruptions, result.leaks) == (0, 0), result.messages


def test_bitmaps_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "image"
    _make(path, "cluster_size=4k", 6)
    assert _run("qemu-img", "bitmap", "--add", "-g", "4096", str(path), "b1").returncode == 0
    _run("qemu-io", "-f", "qcow2", "-c", "write 0 512k", str(path))
    result = reference_check(path.read_bytes())
    assert (result.corruptions, result.leaks) == _qemu_check(path) == (0, 0), result.messages


def test_the_encryption_header_is_counted() -> None:
    plain = build(TinySpec(extensions=((0x0537BE77, bytes(16)),)))
    end = len(plain.raw)
    image = build(TinySpec(extensions=((0x0537BE77, struct.pack(">QQ", end, 600)),)))
    raw = bytearray(image.with_field("crypt_method", 2) + bytes(image.cluster))
    assert reference_check(bytes(raw)).corruptions == 1
    struct.pack_into(">H", raw, image.block + 2 * (end // image.cluster), 1)
    result = reference_check(bytes(raw))
    assert (result.corruptions, result.leaks) == (0, 0), result.messages


@pytest.mark.parametrize("seed", range(12))
def test_damaged_images_get_the_verdict_of_qemu(tmp_path: Path, seed: int) -> None:
    """Entries of L1, L2 and refcounts are changed; corrupt or not, and the leaks, must agree."""
    path = tmp_path / "image"
    _make(path, ["cluster_size=4k", "cluster_size=16k,extended_l2=on", "cluster_size=1k"][seed % 3], seed)
    content = bytearray(path.read_bytes())
    image = RefImage(bytes(content))
    chance = random.Random(seed)
    (block,) = image.words(image.table_offset, 1, "table")
    tables = [word & (1 << 56) - 512 for word in image.words(image.l1_offset, image.l1_size, "L1")]
    table = chance.choice([offset for offset in tables if offset])
    slots = [slot for slot in range(0, image.cluster, image.entry) if any(content[table + slot : table + slot + 8])]
    slot = table + chance.choice(slots)
    (entry,) = struct.unpack_from(">Q", content, slot)
    change = seed % 6
    if change == 0:
        entry ^= 1 << 63
    elif change == 1:
        entry = 0
    elif change == 2:
        entry = (entry & 1 << 63) | (image.cluster * chance.randrange(6, 20))
    elif change == 3:
        entry |= 1 << 57
    elif change == 4:
        entry = 1 << 63 | len(content) + 3 * image.cluster & -image.cluster
    else:
        struct.pack_into(">H", content, block + 2 * (slot // image.cluster), chance.choice([0, 2, 5]))
    struct.pack_into(">Q", content, slot, entry)
    path.write_bytes(content)
    ours = reference_check(bytes(content))
    corruptions, leaks = _qemu_check(path)
    assert (bool(ours.corruptions), ours.leaks) == (bool(corruptions), leaks), ours.messages


@pytest.mark.parametrize(
    ("offset", "value"),
    [(0, b"QFI\xfa"), (4, b"\0\0\0\1"), (20, b"\0\0\0\x08"), (72, b"\1"), (96, b"\0\0\0\7"), (40, b"\0\0\0\0\0\0\2\1")],
)
def test_what_cannot_be_opened_is_refused(tmp_path: Path, offset: int, value: bytes) -> None:
    path = tmp_path / "image"
    _make(path, "", 1)
    content = bytearray(path.read_bytes())
    content[offset : offset + len(value)] = value
    with pytest.raises(ReferenceError):
        reference_check(bytes(content))


def test_data_past_the_end_is_an_error_and_not_zeros(tmp_path: Path) -> None:
    path = tmp_path / "image"
    _run("qemu-img", "create", "-q", "-f", "qcow2", str(path), "1M")
    _run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", str(path))
    content = path.read_bytes()[:-65536]
    with pytest.raises(ReferenceError, match="past the end"):
        reference_read(content)
