# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A new image has the bytes and the length that qemu-img create gives it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qcowlib.errors import UsageError
from qcowlib.ondisk import CRYPT_AES, CRYPT_LUKS, Header
from qcowlib.qcow2.create import QCOW2_OPTIONS, RAW_OPTIONS, CreateOptions, Encryption, create, create_raw
from qcowlib.qcow2.directories import read_header
from qcowlib.storage.file import FileStorage
from qcowlib.storage.memory import MemoryStorage
from qcowlib.testing.crash import CrashState, Finding, assert_crash_safe
from qcowlib.testing.recorder import OpLog

MiB = 1 << 20
GiB = 1 << 30
TiB = 1 << 40

_NAMES = {
    "version": "compat",
    "backing_file": "backing_file",
    "backing_format": "backing_fmt",
}


def qemu_arguments(options: CreateOptions) -> list[str]:
    pairs = []
    for name, value in options._asdict().items():
        if name in ("size", "encrypt") or value == CreateOptions._field_defaults[name]:
            continue
        if name == "version":
            value = f"v{value}"
        elif name == "compression_type":
            value = ("zlib", "zstd")[value]
        elif isinstance(value, bool):
            value = "on" if value else "off"
        elif isinstance(value, bytes):
            value = os.fsdecode(value)
        pairs.append(f"{_NAMES.get(name, name)}={value}")
    return ["-u", *(["-o", ",".join(pairs)] if pairs else [])]


def data_pieces(fd: int, size: int) -> Iterator[tuple[int, int]]:
    position = 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError:
            return
        position = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, position


def difference(left: Path, right: Path) -> str | None:
    """Return where two sparse files differ, looking only where one has data."""
    if left.stat().st_size != right.stat().st_size:
        return f"length {left.stat().st_size} != {right.stat().st_size}"
    one, two = os.open(left, os.O_RDONLY), os.open(right, os.O_RDONLY)
    try:
        for fd in (one, two):
            for start, end in data_pieces(fd, left.stat().st_size):
                for offset in range(start, end, MiB):
                    count = min(MiB, end - offset)
                    a, b = os.pread(one, count, offset), os.pread(two, count, offset)
                    if a != b:
                        at = next(i for i in range(count) if a[i] != b[i])
                        return f"byte {offset + at:#x}: {a[at : at + 8].hex()} != {b[at : at + 8].hex()}"
    finally:
        os.close(one)
        os.close(two)
    return None


def compare_with_qemu(where: Path, options: CreateOptions) -> str | None:
    """Create with both; return the difference, or the two refusals if they differ."""
    ours, theirs, data = where / "ours", where / "theirs", where / "data"
    for path in (ours, theirs, data, where / "ours.data"):
        path.unlink(missing_ok=True)
    if options.data_file is not None:
        options = options._replace(data_file=os.fsencode(data))
    run = subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", *qemu_arguments(options), str(theirs), str(options.size)],
        capture_output=True,
        text=True,
    )
    refusal = run.stderr.strip().partition(f"{theirs}: ")[2] if run.returncode else ""
    storage = FileStorage.create(ours)
    data_storage = FileStorage.create(where / "ours.data") if options.data_file is not None else None
    try:
        create(storage, options, data=data_storage)
        ours_refusal = ""
    except UsageError as error:
        ours_refusal = error.message
    storage.close()
    if data_storage is not None:
        data_storage.close()
    if refusal or ours_refusal:
        return None if refusal == ours_refusal else f"{refusal!r} != {ours_refusal!r}"
    found = difference(theirs, ours)
    if found is None and options.data_file is not None:
        found = difference(data, where / "ours.data")
    return found


@pytest.mark.real("qemu-img")
@pytest.mark.parametrize(
    "options",
    [
        CreateOptions(64 * MiB),
        CreateOptions(0),
        CreateOptions(1000),
        CreateOptions(64 * MiB, version=2),
        CreateOptions(1 * GiB, cluster_size=512),
        CreateOptions(64 * GiB, cluster_size=512),
        CreateOptions(2 * GiB, cluster_size=512, refcount_bits=64),
        CreateOptions(64 * GiB, cluster_size=512, refcount_bits=1),
        CreateOptions(1 * TiB),
        CreateOptions(2 << 50),
        CreateOptions(1 << 60, cluster_size=2 * MiB, extended_l2=True),
        CreateOptions(0, preallocation="metadata"),
        CreateOptions(0, preallocation="full"),
        CreateOptions(1 * GiB, preallocation="metadata", cluster_size=4096),
        CreateOptions(1 * GiB, preallocation="falloc", cluster_size=4096),
        CreateOptions(30 * MiB, preallocation="metadata", cluster_size=512),
        CreateOptions(30 * MiB, preallocation="metadata", cluster_size=512, refcount_bits=64),
        CreateOptions(30 * MiB, preallocation="falloc", cluster_size=512, refcount_bits=64),
        CreateOptions(30 * MiB, preallocation="full", cluster_size=512, refcount_bits=1),
        CreateOptions(20 * GiB, preallocation="metadata"),
        CreateOptions(4 * GiB, preallocation="metadata", refcount_bits=64, extended_l2=True),
        CreateOptions(66048, preallocation="metadata"),
        CreateOptions(66048, preallocation="metadata", extended_l2=True),
        CreateOptions(66048, preallocation="full"),
        CreateOptions(66048, preallocation="full", extended_l2=True, backing_file=b"b", backing_format=b"raw"),
        CreateOptions(1 * MiB, data_file=b"d"),
        CreateOptions(66048, data_file=b"d", data_file_raw=True),
        CreateOptions(66048, data_file=b"d", preallocation="metadata", extended_l2=True),
        CreateOptions(1 * GiB, data_file=b"d", preallocation="falloc"),
        CreateOptions(3 << 50),
        CreateOptions(7 << 60),
        CreateOptions((1 << 63) - 1),
        CreateOptions(1 * MiB, backing_file=b"x" * 1023, backing_format=b"raw"),
        CreateOptions(1 * MiB, backing_file=b"x" * 1024, backing_format=b"raw"),
        CreateOptions(1 * MiB, backing_file=b"x" * 376, backing_format=b"raw", cluster_size=512),
        CreateOptions(1 * MiB, backing_file=b"x" * 377, backing_format=b"raw", cluster_size=512),
    ],
    ids=str,
)
def test_image_is_the_one_qemu_makes(tmp_path: Path, options: CreateOptions) -> None:
    assert compare_with_qemu(tmp_path, options) is None


def _options(**choices: st.SearchStrategy[Any]) -> st.SearchStrategy[CreateOptions]:
    return st.builds(CreateOptions, **choices)


@pytest.mark.real("qemu-img")
@given(
    _options(
        size=st.integers(0, 1 << 27) | st.integers(0, 1 << 52),
        version=st.sampled_from([3, 3, 3, 2]),
        cluster_size=st.sampled_from([0, 256, 512, 1000, 4096, 16384, 65536, 2 * MiB, 4 * MiB]),
        refcount_bits=st.sampled_from([16, 16, 1, 2, 8, 64, 3, 128, 0]),
        extended_l2=st.booleans(),
        lazy_refcounts=st.booleans(),
        compression_type=st.sampled_from([0, 0, 1]),
        backing_file=st.sampled_from([None, None, b"base", b"x" * 400]),
        backing_format=st.sampled_from([None, b"raw"]),
        preallocation=st.sampled_from(["off", "off", "metadata", "falloc"]),
        encrypt=st.none(),
        data_file=st.sampled_from([None, None, b"d"]),
        data_file_raw=st.booleans(),
    )
)
def test_any_combination_is_made_or_refused_as_by_qemu(
    tmp_path_factory: pytest.TempPathFactory, options: CreateOptions
) -> None:
    if options.backing_file is not None:
        # Without a format the command refuses before it creates.
        options = options._replace(backing_format=b"raw")
    if options.size > 1 << 40 and options.data_file_raw:
        options = options._replace(data_file_raw=False)
    if options.size > 1 << 27:
        options = options._replace(preallocation="off")
    where = tmp_path_factory.getbasetemp() / "any"
    where.mkdir(exist_ok=True)
    assert compare_with_qemu(where, options) is None


@pytest.mark.real("qemu-img")
@given(
    _options(
        size=st.integers(0, 1 << 24),
        cluster_size=st.sampled_from([512, 1024, 4096, 16384, 65536]),
        refcount_bits=st.sampled_from([1, 4, 16, 64]),
        extended_l2=st.booleans(),
        preallocation=st.sampled_from(["metadata", "falloc", "full"]),
        lazy_refcounts=st.booleans(),
        data_file=st.sampled_from([None, None, b"d"]),
        version=st.just(3),
        compression_type=st.just(0),
        backing_file=st.none(),
        backing_format=st.none(),
        data_file_raw=st.just(False),
        encrypt=st.none(),
    )
)
@example(CreateOptions(12345678, cluster_size=512, refcount_bits=64, preallocation="metadata"))
@example(CreateOptions(3869697, cluster_size=512, refcount_bits=64, preallocation="falloc"))
def test_preallocated_image_is_the_one_qemu_makes(
    tmp_path_factory: pytest.TempPathFactory, options: CreateOptions
) -> None:
    if options.cluster_size < 16384:
        options = options._replace(extended_l2=False)
    where = tmp_path_factory.getbasetemp() / "preallocated"
    where.mkdir(exist_ok=True)
    assert compare_with_qemu(where, options) is None


class _Ordered(MemoryStorage):
    """Notes what each flush finds in the first four bytes."""

    __slots__ = ("log",)

    def __init__(self, data: bytes = b"") -> None:
        super().__init__(data)
        self.log: list[bytes] = []

    def write(self, offset: int, buffers: Any) -> None:
        super().write(offset, buffers)
        self.log.append(self.getvalue()[:4] if offset else b"header")

    def flush(self) -> None:
        self.log.append(b"flush")


@pytest.mark.parametrize("old", [b"", b"QFI\xfb" + bytes(200_000)])
def test_i11_no_magic_until_everything_else_is_durable(old: bytes) -> None:
    storage = _Ordered(old)
    create(storage, CreateOptions(1 * MiB, preallocation="metadata"))
    assert storage.log.count(b"header") == 1
    assert storage.log[-3:] == [b"flush", b"header", b"flush"]
    assert b"QFI\xfb" not in storage.log[:-3]
    assert (storage.log[0] == b"flush") == bool(old)


@pytest.mark.crash
@pytest.mark.parametrize("old", [b"", b"QFI\xfb" + bytes(200_000)])
def test_i11_a_torn_write_of_the_header_is_no_image(old: bytes) -> None:
    """Invariant: I11, also where the name of the backing file lies behind the first sector."""
    storage, log = MemoryStorage(bytearray(old)), OpLog()
    name = b"b" * 900
    create(log.record(storage), CreateOptions(1 * MiB, backing_file=name, backing_format=b"qcow2"))

    def judge(state: CrashState) -> list[Finding]:
        content = MemoryStorage(state.images[0])
        if content.getvalue()[:4] != b"QFI\xfb" or content.getvalue() == old:
            return []
        return [Finding("TORN", "the name")] * (read_header(content, writable=True).backing_file != name)

    assert assert_crash_safe(log, judge, allow=()).distinct > 5


def test_refused_options_leave_the_storage_alone() -> None:
    storage = MemoryStorage(b"precious")
    with pytest.raises(UsageError):
        create(storage, CreateOptions(1 * MiB, cluster_size=1000))
    assert storage.getvalue() == b"precious"


def test_encryption_header_gets_clusters_of_its_own_and_a_pointer() -> None:
    storage = MemoryStorage()
    blob = b"LUKS\xba\xbe" + bytes(range(250)) * 300
    header = create(storage, CreateOptions(1 * MiB, encrypt=Encryption(CRYPT_LUKS, blob)))
    again = Header.parse(storage.getvalue()[:65536], storage.size)
    assert again.crypt_method == CRYPT_LUKS
    assert again.crypto == header.crypto == (0x40000, len(blob))
    assert storage.getvalue()[0x40000:] == blob.ljust(2 * 65536, b"\0")


def test_legacy_encryption_has_no_header_of_its_own() -> None:
    storage = MemoryStorage()
    create(storage, CreateOptions(1 * MiB, version=2, encrypt=Encryption(CRYPT_AES)))
    header = Header.parse(storage.getvalue()[:65536], storage.size)
    assert (header.crypt_method, header.crypto) == (CRYPT_AES, None)


@pytest.mark.real("qemu-img")
@pytest.mark.parametrize("size", [0, 1000, 4096, 1 * MiB])
@pytest.mark.parametrize("preallocation", ["off", "falloc", "full"])
def test_raw_image_has_the_length_and_blocks_qemu_gives(tmp_path: Path, size: int, preallocation: Any) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "raw", "-o", f"preallocation={preallocation}", theirs, str(size)], check=True
    )
    storage = FileStorage.create(ours)
    create_raw(storage, size, preallocation=preallocation)
    storage.close()
    assert difference(theirs, ours) is None
    assert ours.stat().st_blocks == theirs.stat().st_blocks


@pytest.mark.real("qemu-img")
@pytest.mark.parametrize(("format", "options"), [("qcow2", QCOW2_OPTIONS), ("raw", RAW_OPTIONS)])
def test_option_table_is_the_one_qemu_lists(format: str, options: Any) -> None:
    run = subprocess.run(["qemu-img", "create", "-f", format, "-o", "help", "x"], capture_output=True, text=True)
    types = {"bool": "bool (on/off)"}
    lines = [f"  {o.name}=<{types.get(o.type, o.type)}>".ljust(24) + f" - {o.help}" for o in options]
    assert run.stdout.splitlines()[1:] == lines
