# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""An image built front to back is clean, has the data, and lies as qemu-img convert lays it."""

from __future__ import annotations

import os
import subprocess
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcowlib.errors import OutOfRange, UsageError
from qcowlib.ondisk import CRYPT_LUKS, Header
from qcowlib.qcow2.build import Builder
from qcowlib.qcow2.create import CreateOptions, Encryption, new_header
from qcowlib.storage.file import FileStorage
from qcowlib.storage.memory import MemoryStorage

MiB = 1 << 20
Run = tuple[str, int, int]


def pattern(offset: int, length: int) -> bytes:
    """Return bytes that tell where they belong and compress well."""
    first = offset // 512
    sectors = b"".join(b"%015d\n" % sector * 32 for sector in range(first, (offset + length - 1) // 512 + 1))
    return sectors[offset % 512 : offset % 512 + length]


def deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(-1, zlib.DEFLATED, -12, 9)
    return packer.compress(data) + packer.flush()


def build(storage: Any, options: CreateOptions, runs: list[Run], data: Any = None, **how: Any) -> bytearray:
    """Build an image of *runs* and return what the guest must read."""
    header = new_header(options)
    size, cluster_size = header.size, header.cluster_size
    expected = bytearray(size)
    builder = Builder(storage, header, **how)
    target = storage if data is None else data
    for kind, start, length in runs:
        body = pattern(start, length)
        if kind == "zero":
            builder.place_zero(start, length)
        elif kind == "packed":
            packed = deflate(body.ljust(cluster_size, b"\0"))
            storage.write(builder.place_compressed(start // cluster_size, len(packed)), [packed])
        else:
            done = 0
            for host, count in builder.place_data(start, length):
                target.write(host, [body[done : done + count]])
                done += count
            assert done == length
        if kind != "zero":
            expected[start : start + length] = body
    if data is not None:
        data.flush()
    builder.finish()
    return expected


def assert_clean_and_equal(image: Path, expected: bytes) -> None:
    check = subprocess.run(["qemu-img", "check", image], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout + check.stderr
    raw = image.with_suffix(".raw")
    raw.write_bytes(expected)
    compare = subprocess.run(
        ["qemu-img", "compare", "-f", "qcow2", "-F", "raw", image, raw], capture_output=True, text=True
    )
    assert compare.returncode == 0, compare.stdout + compare.stderr


@st.composite
def workloads(draw: st.DrawFn) -> tuple[CreateOptions, list[Run]]:
    extended = draw(st.booleans())
    cluster_bits = draw(st.integers(14, 16) if extended else st.integers(9, 16))
    cluster_size = 1 << cluster_bits
    size = draw(st.integers(1, 600)) * min(cluster_size, 4096) + draw(st.sampled_from([0, 512]))
    data_file = draw(st.sampled_from([None, None, b"placeholder"]))
    options = CreateOptions(
        size,
        version=3 if extended or data_file else draw(st.sampled_from([2, 3])),
        cluster_size=cluster_size,
        extended_l2=extended,
        data_file=data_file,
        data_file_raw=data_file is not None and draw(st.booleans()),
    )
    if options.version == 3:
        options = options._replace(refcount_bits=draw(st.sampled_from([1, 2, 4, 8, 16, 32, 64])))
    kinds = ["data", "data"]
    if options.version == 3 and not options.data_file_raw:
        kinds.append("zero")
    if data_file is None:
        kinds.append("packed")
    runs: list[Run] = []
    position = 0
    while position < size:
        position += draw(st.sampled_from([0, 0, 1, 511, 512, 4096, 65536]))
        kind = draw(st.sampled_from(kinds))
        if kind != "data":
            position = -(-position // cluster_size) * cluster_size
        if position >= size:
            break
        length = draw(st.integers(1, 5 * cluster_size) | st.integers(1, 3 * MiB))
        if kind == "packed":
            length = cluster_size
        elif kind == "zero":
            length = -(-length // cluster_size) * cluster_size
        length = min(length, size - position)
        runs.append((kind, position, length))
        position += length
    return options, runs


@pytest.mark.real("qemu-img")
@settings(max_examples=60)
@given(workloads(), st.booleans())
def test_built_image_is_clean_and_reads_back(
    tmp_path_factory: pytest.TempPathFactory, workload: tuple[CreateOptions, list[Run]], used_before: bool
) -> None:
    options, runs = workload
    where = tmp_path_factory.getbasetemp() / "build"
    where.mkdir(exist_ok=True)
    image, data_path = where / "image", where / "image.data"
    image.unlink(missing_ok=True)
    data_path.unlink(missing_ok=True)
    data = None
    if options.data_file is not None:
        options = options._replace(data_file=os.fsencode(data_path))
        data = FileStorage.create(data_path)
        data.resize(-(-options.size // 65536) * 65536)
    elif used_before:
        image.write_bytes(b"\xa5" * (8 * MiB))
    storage = FileStorage.create(image)
    expected = build(storage, options, runs, data, zeroed=not storage.size)
    storage.close()
    if data is not None:
        data.close()
    assert_clean_and_equal(image, expected)


@pytest.mark.real("qemu-img")
@pytest.mark.parametrize(
    "options",
    [
        CreateOptions(24 * MiB),
        CreateOptions(24 * MiB, version=2),
        CreateOptions(24 * MiB, cluster_size=512),
        CreateOptions(24 * MiB, cluster_size=4096, refcount_bits=64),
        CreateOptions(24 * MiB, cluster_size=1024, refcount_bits=1),
        CreateOptions(24 * MiB, cluster_size=16384, refcount_bits=64, extended_l2=True),
        CreateOptions(24 * MiB, cluster_size=2 * MiB),
        CreateOptions(24 * MiB + 512),
    ],
    ids=lambda o: f"{o.cluster_size}-{o.refcount_bits}-v{o.version}-{o.size}",
)
@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "compressed"])
def test_image_has_the_bytes_of_a_conversion(tmp_path: Path, options: CreateOptions, compressed: bool) -> None:
    if compressed and options.refcount_bits < 16:
        options = options._replace(refcount_bits=8)
    unit = max(options.cluster_size, 65536)
    raw, theirs, ours = tmp_path / "raw", tmp_path / "theirs", tmp_path / "ours"
    pieces = [(0, 1), (2, 1), (5, 90), (100, 30), (200, 184)] if unit == 65536 else [(0, 1), (3, 4), (9, 3)]
    with raw.open("wb") as file:
        file.truncate(options.size)
        for start, count in pieces:
            file.seek(start * unit)
            file.write(pattern(start * unit, min(count * unit, options.size - start * unit)))
    pairs = (
        f"compat=v{options.version},cluster_size={options.cluster_size},refcount_bits={options.refcount_bits},"
        f"extended_l2={'on' if options.extended_l2 else 'off'}"
    )
    # One request at a time, so that the order is the guest's.
    how = ["-m", "1", *(["-c"] if compressed else []), "-o", pairs]
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *how, raw, theirs], check=True)
    runs: list[Run] = []
    for start, count in pieces:
        low, high = start * unit, min((start + count) * unit, options.size)
        if compressed:
            step = options.cluster_size
            runs += [("packed", at, min(step, high - at)) for at in range(low, high, step)]
        else:
            runs.append(("data", low, high - low))
    storage = FileStorage.create(ours)
    build(storage, options, runs)
    storage.close()
    left, right = theirs.read_bytes(), ours.read_bytes()
    length = min(len(left), len(right))
    assert left[:length] == right[:length]
    assert not left[length:].strip(b"\0") and not right[length:].strip(b"\0")


@pytest.mark.real("qemu-img")
def test_large_sparse_image_needs_no_memory_for_what_is_not_there(tmp_path: Path) -> None:
    storage = FileStorage.create(tmp_path / "image")
    builder = Builder(storage, new_header(CreateOptions(1 << 40)))
    (run,) = builder.place_data((1 << 40) - 4 * MiB, 4 * MiB)
    assert run[1] == 4 * MiB
    builder.finish()
    storage.close()
    check = subprocess.run(["qemu-img", "check", tmp_path / "image"], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout


@pytest.mark.real("qemu-img")
def test_zeros_cover_the_backing_file_and_subclusters_let_it_show(tmp_path: Path) -> None:
    base, image = tmp_path / "base", tmp_path / "image"
    content = pattern(0, 4 * 65536)
    base.write_bytes(content)
    options = CreateOptions(4 * 65536, extended_l2=True, backing_file=os.fsencode(base), backing_format=b"raw")
    storage = FileStorage.create(image)
    builder = Builder(storage, new_header(options))
    ((host, _),) = builder.place_data(65536 + 2048, 2048)
    storage.write(host, [b"\x01" * 2048])
    ((host, _),) = builder.place_data(65536 + 8192, 2048)
    storage.write(host, [b"\x02" * 2048])
    builder.place_zero(2 * 65536, 65536)
    with pytest.raises(UsageError, match="whole clusters"):
        builder.place_data(3 * 65536 + 512, 512)
    builder.finish()
    storage.close()
    expected = bytearray(content)
    expected[65536 + 2048 : 65536 + 4096] = b"\x01" * 2048
    expected[65536 + 8192 : 65536 + 10240] = b"\x02" * 2048
    expected[2 * 65536 : 3 * 65536] = bytes(65536)
    assert_clean_and_equal(image, bytes(expected))


def test_i11_nothing_is_an_image_before_finish() -> None:
    storage = MemoryStorage(b"QFI\xfb" + bytes(300_000))
    builder = Builder(storage, new_header(CreateOptions(MiB)), zeroed=False)
    assert storage.getvalue()[:4] == bytes(4)
    builder.place_data(0, MiB)
    assert storage.getvalue()[:4] == bytes(4)
    builder.finish()
    assert Header.parse(storage.getvalue()[:65536], storage.size).size == MiB


def test_what_cannot_be_placed_is_refused() -> None:
    builder = Builder(MemoryStorage(), new_header(CreateOptions(MiB)))
    for start, length in ((-512, 512), (0, MiB + 1), (MiB, 1), (0, -1)):
        with pytest.raises(OutOfRange):
            builder.place_data(start, length)
    for length in (0, 65536):
        with pytest.raises(UsageError, match="smaller than a cluster"):
            builder.place_compressed(0, length)
    with pytest.raises(OutOfRange):
        builder.place_compressed(16, 1)
    builder.place_data(65536, 65536)
    with pytest.raises(UsageError, match="ascend"):
        builder.place_data(0, 512)
    with pytest.raises(UsageError, match="whole clusters"):
        builder.place_zero(200_000, 65536)
    with pytest.raises(UsageError, match="no zero clusters"):
        Builder(MemoryStorage(), new_header(CreateOptions(MiB, version=2))).place_zero(0, 65536)
    with pytest.raises(UsageError, match="needs its encryption header"):
        Builder(MemoryStorage(), new_header(CreateOptions(MiB, encrypt=Encryption(CRYPT_LUKS, b"x"))))
