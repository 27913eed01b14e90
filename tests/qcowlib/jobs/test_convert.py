# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Convert against qemu-img convert: content, allocation, and for plain copies the bytes."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qcowlib
from qcowlib.jobs.copy import used_runs
from qcowlib.storage.memory import MemoryStorage
from qcowlib.testing.crash import CrashState, Finding, assert_crash_safe
from qcowlib.testing.recorder import OpLog
from tests.conftest import LONG
from tests.qcowlib.jobs.samples import allocation, make_source, qemu_img, raw_image

KiB, MiB = 1 << 10, 1 << 20

TARGETS: list[tuple[list[str], dict[str, Any]]] = [
    (["-O", "raw"], {"format": "raw"}),
    ([], {}),
    (["-o", "cluster_size=512"], {"cluster_size": 512}),
    (["-o", "cluster_size=1k,refcount_bits=64"], {"cluster_size": 1024, "refcount_bits": 64}),
    (["-o", "cluster_size=2M"], {"cluster_size": 2 * MiB}),
    (["-o", "extended_l2=on"], {"extended_l2": True}),
    (["-o", "compat=0.10"], {"compat": "0.10"}),
    (["-o", "preallocation=metadata"], {"preallocation": "metadata"}),
    (["-o", "preallocation=full"], {"preallocation": "full"}),
    (["-c"], {"compress": True}),
    (["-c", "-o", "compression_type=zstd"], {"compress": True, "compression_type": "zstd"}),
    (["-c", "-o", "cluster_size=4k"], {"compress": True, "cluster_size": 4096}),
]
SPARSE = [None, None, 0, 512, 2048, 4096, 64 * KiB]


def assert_same_result(theirs: Path, ours: Path, *, offsets: bool, format: str) -> None:
    qemu_img("compare", "-f", format, "-F", format, theirs, ours)
    if format == "qcow2":
        qemu_img("check", ours)
    assert allocation(ours, offsets=offsets) == allocation(theirs, offsets=offsets)


@pytest.mark.real("qemu-img")
@pytest.mark.parametrize("kind", ["raw", "qcow2", "chain"])
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: " ".join(target[0]) or "default")
def test_result_is_allocated_as_by_qemu_img(
    tmp_path: Path, kind: str, target: tuple[list[str], dict[str, Any]]
) -> None:
    words, options = target
    for seed in range(LONG):
        rng = random.Random(f"{kind} {words} {seed}")
        source = make_source(rng, tmp_path, kind, rng.choice([512 * 37, MiB, 5 * MiB + 1536]))
        theirs, ours = tmp_path / "theirs", tmp_path / "ours"
        sparse = rng.choice(SPARSE)
        if sparse is not None:
            words, options = [*words, "-S", str(sparse)], {**options, "sparse_size": sparse}
        format = options.get("format", "qcow2")
        qemu_img("convert", "-f", "raw" if kind == "raw" else "qcow2", "-O", format, *words, source, theirs)
        qcowlib.convert(source, ours, source_format="raw" if kind == "raw" else "qcow2", **options)
        compressed = bool(options.get("compress"))
        assert_same_result(theirs, ours, offsets=not compressed, format=format)
        if not compressed:
            assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.real("qemu-img")
@pytest.mark.parametrize("words", ["", "-c", "-o compat=0.10", "-o extended_l2=on", "-S 64k", "-o cluster_size=4k"])
def test_over_a_backing_file_the_top_layer_alone_is_copied(tmp_path: Path, words: str) -> None:
    options: dict[str, Any] = {
        "": {},
        "-c": {"compress": True},
        "-o compat=0.10": {"compat": "0.10"},
        "-o extended_l2=on": {"extended_l2": True},
        "-S 64k": {"sparse_size": 65536},
        "-o cluster_size=4k": {"cluster_size": 4096},
    }[words]
    source = make_source(random.Random(words), tmp_path, "chain", 5 * MiB + 1536)
    theirs, ours, base = tmp_path / "theirs", tmp_path / "ours", tmp_path / "base"
    qemu_img("convert", "-O", "qcow2", *words.split(), "-B", base, "-F", "raw", source, theirs)
    qcowlib.convert(source, ours, backing=base, backing_format="raw", **options)
    assert_same_result(theirs, ours, offsets=not options.get("compress"), format="qcow2")


@pytest.mark.real("qemu-img")
@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize("is_zero", [False, True])
def test_existing_target_is_filled_as_by_qemu_img(tmp_path: Path, format: str, is_zero: bool) -> None:
    source = make_source(random.Random(f"{format} {is_zero}"), tmp_path, "qcow2", 3 * MiB)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for path in (theirs, ours):
        qemu_img("create", "-q", "-f", format, path, 4 * MiB)
        if not is_zero:
            with qcowlib.open(path, "r+", format=format) as image:
                image.pwrite(b"old" * 100000, 70000)
    flag = ["--target-is-zero"] if is_zero else []
    qemu_img("convert", "-n", *flag, "-O", format, source, theirs)
    qcowlib.convert(source, ours, format=format, existing=True, target_is_zero=is_zero)
    assert_same_result(theirs, ours, offsets=False, format=format)


@pytest.mark.real("qemu-img")
def test_several_sources_follow_each_other(tmp_path: Path) -> None:
    paths = []
    for number, size in enumerate((MiB + 512, 512 * 37, 2 * MiB)):
        paths.append(tmp_path / f"part{number}")
        raw_image(random.Random(number), paths[-1], size)
    for words, options in TARGETS[1], TARGETS[9]:
        theirs, ours = tmp_path / "theirs", tmp_path / "ours"
        qemu_img("convert", "-f", "raw", "-O", "qcow2", *words, *paths, theirs)
        qcowlib.convert(paths, ours, source_format="raw", **options)
        assert_same_result(theirs, ours, offsets=False, format="qcow2")


@pytest.mark.real("qemu-img")
def test_snapshot_is_copied_by_name(tmp_path: Path) -> None:
    source, ours = tmp_path / "src", tmp_path / "ours"
    qemu_img("create", "-q", "-f", "qcow2", source, MiB)
    with qcowlib.open(source, "r+") as image:
        image.pwrite(b"before" * 1000, 4096)
    qemu_img("snapshot", "-c", "first", source)
    with qcowlib.open(source, "r+") as image:
        image.pwrite(b"after!" * 1000, 4096)
    qcowlib.convert(source, ours, format="raw", snapshot="first")
    assert ours.read_bytes()[4096:10096] == b"before" * 1000


@pytest.mark.parametrize("options", [{}, {"compress": True}, {"extended_l2": True}, {"format": "raw"}], ids=str)
def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path, options: dict[str, Any]) -> None:
    source = tmp_path / "src"
    raw_image(random.Random(4), source, 40 * MiB)
    results = set()
    for workers in (1, 2, 7):
        ours = tmp_path / f"ours{workers}"
        qcowlib.convert(source, ours, source_format="raw", workers=workers, **options)
        results.add(ours.read_bytes())
    assert len(results) == 1


@pytest.mark.real("qemu-img")
@pytest.mark.parametrize("method", ["zlib", "zstd"])
def test_compressed_clusters_are_passed_on_without_what_lies_behind_them(tmp_path: Path, method: str) -> None:
    source, first, second = (tmp_path / name for name in ("src", "first", "second"))
    source.write_bytes(b"".join(bytes([n]) * 1000 + os.urandom(3000) for n in range(250)).ljust(MiB, b"\0"))
    options: dict[str, Any] = {"compress": True, "compression_type": method}
    qcowlib.convert(source, first, source_format="raw", **options)
    qcowlib.convert(first, second, **options)
    qemu_img("compare", "-f", "raw", "-F", "qcow2", source, second)
    qemu_img("check", second)
    assert second.read_bytes() == first.read_bytes()


@pytest.mark.real("qemu-img")
def test_copy_offload_copies_the_same_content(tmp_path: Path) -> None:
    source = make_source(random.Random(9), tmp_path, "qcow2", 12 * MiB)
    for format in ("raw", "qcow2"):
        qcowlib.convert(source, tmp_path / format, format=format, copy_offload=True)
        qemu_img("compare", "-f", "qcow2", "-F", format, source, tmp_path / format)


class Boom(Exception):
    pass


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_failed_job_leaves_no_target(tmp_path: Path, format: str, workers: int) -> None:
    source, target = tmp_path / "src", tmp_path / "target"
    source.write_bytes(os.urandom(16 * MiB))
    target.write_bytes(b"old")
    calls = 0

    def cancel() -> bool:
        nonlocal calls
        calls += 1
        return calls > 3

    with pytest.raises(qcowlib.Cancelled):
        qcowlib.convert(source, target, source_format="raw", format=format, cancel=cancel, workers=workers)
    assert not target.exists()


def test_used_target_is_refused_and_kept(tmp_path: Path) -> None:
    source, target = tmp_path / "src", tmp_path / "target"
    source.write_bytes(os.urandom(MiB))
    qcowlib.create(target, MiB)
    with qcowlib.open(target, "r+"), pytest.raises(qcowlib.Busy):
        qcowlib.convert(source, target, source_format="raw")
    with qcowlib.open(target) as image:
        assert image.size == MiB


def test_unreadable_sectors_are_an_error_or_salvaged_as_zeros(tmp_path: Path) -> None:
    below = MemoryStorage()
    content = os.urandom(MiB)
    below.write(0, [content])
    bad: list[int] = []

    class Bad:
        """The source with unreadable sectors."""

        name = "bad"

        def pread(self, length: int, offset: int) -> bytes:
            if offset < 66560 and offset + length > 65536:
                raise OSError(5, "Input/output error")
            return content[offset : offset + length]

        def seek(self, offset: int, whence: int = 0) -> int:
            return MiB

    with pytest.raises(qcowlib.StorageError, match="error while reading at byte"):
        qcowlib.convert(Bad(), tmp_path / "t", source_format="raw", format="raw")
    qcowlib.convert(
        Bad(), tmp_path / "t", source_format="raw", format="raw", salvage=lambda offset, _: bad.append(offset)
    )
    assert bad == [65536, 66048]
    assert (tmp_path / "t").read_bytes() == content[:65536] + bytes(1024) + content[66560:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "vmdk"}, "Unknown file format 'vmdk'"),
        ({"compress": True, "format": "raw"}, "Compression not supported for this file format"),
        ({"compress": True, "preallocation": "full"}, "Compression and preallocation not supported"),
        ({"sparse_size": 100}, "Invalid buffer size for sparse output"),
        ({"copy_offload": True, "compress": True}, "Cannot enable copy offloading when -c is used"),
        ({"target_is_zero": True}, "requires use of -n flag"),
        ({"backing": "base"}, "requires explicit backing format"),
        ({"workers": 17}, "Invalid number of coroutines"),
        ({"cluster_size": 1000}, "Cluster size must be a power of two"),
        ({"colour": "red"}, "Invalid parameter 'colour'"),
    ],
    ids=str,
)
def test_contradictions_are_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    (tmp_path / "src").write_bytes(bytes(4096))
    with pytest.raises(qcowlib.UsageError, match=message):
        qcowlib.convert(tmp_path / "src", tmp_path / "t", source_format="raw", **options)
    assert not (tmp_path / "t").exists()


def test_progress_ends_with_everything_done(tmp_path: Path) -> None:
    raw_image(random.Random(1), tmp_path / "src", 20 * MiB)
    seen: list[tuple[int, int]] = []
    qcowlib.convert(
        tmp_path / "src", tmp_path / "t", source_format="raw", progress=lambda done, total: seen.append((done, total))
    )
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1] > 0
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@given(
    data=st.lists(st.tuples(st.booleans(), st.integers(1, 40)), min_size=1, max_size=12),
    first=st.integers(0, 64),
    unit=st.integers(1, 40),
)
@settings(max_examples=200)
def test_zero_detection_covers_everything_and_never_calls_data_zero(
    data: list[tuple[bool, int]], first: int, unit: int
) -> None:
    content = b"".join((b"\1" if used else b"\0") * 512 * count for used, count in data)
    position = 0
    for start, length, zero in used_runs(memoryview(content), first * 512, unit * 512):
        assert start == position and length > 0
        position += length
        assert not zero or not any(content[start : start + length])
    assert position == len(content)


@pytest.mark.crash
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compress": True},
        {"backing": "base", "backing_format": "raw", "extended_l2": True},
        {"preallocation": "full"},
    ],
    ids=str,
)
def test_i11_a_cut_leaves_no_image_or_a_complete_one(tmp_path: Path, options: dict[str, Any]) -> None:
    rng = random.Random(str(options))
    size = 40 * KiB
    content = rng.randbytes(9 * KiB) + bytes(20 * KiB) + b"x" * (11 * KiB)
    source, below = MemoryStorage(), MemoryStorage()
    source.write(0, [content])
    if "backing" in options:
        base = tmp_path / "base"
        base.write_bytes(bytes(size))
        options = {**options, "backing": str(base), "cluster_size": 16 * KiB}
    else:
        options = {**options, "cluster_size": 512}
    log = OpLog()
    qcowlib.convert(source, log.record(below), source_format="raw", **options)

    def judge(state: CrashState) -> list[Finding]:
        data = bytes(state.images[0])
        if data[:4] != b"QFI\xfb":
            return []
        storage = MemoryStorage()
        storage.write(0, [data])
        try:
            with qcowlib.open(storage, format="qcow2") as image:
                seen = image.pread(size, 0)
                report = image.check()
        except qcowlib.Error as error:
            return [Finding("UNREADABLE", str(error))]
        if report.corruptions or seen != content:
            return [Finding("THIRD", "an image that is neither complete nor none")]
        return []

    assert assert_crash_safe(log, judge).distinct > 2
