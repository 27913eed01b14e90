# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Compaction of every structure: compressed runs, tables, bitmaps, refcount blocks, in images that qemu wrote."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qcowlib
from qcowlib.jobs.compact import compact, plan_compact
from qcowlib.luks import LuksHeader
from qcowlib.native import BLOCK_CLUSTER, DATA_CLUSTER, PACKED, TABLE_CLUSTER
from qcowlib.qcow2.check import check
from qcowlib.qcow2.compact import Compaction
from qcowlib.qcow2.create import CreateOptions, Encryption, create
from qcowlib.qcow2.directories import read_header
from qcowlib.qcow2.image import Qcow2Image
from qcowlib.qcow2.relocation import ALONE, BITS, BLOCKS_GONE, ITEM, Batch
from qcowlib.storage.memory import MemoryStorage
from qcowlib.testing.crash import CrashState, Finding, assert_crash_safe
from qcowlib.testing.recorder import OpLog, RecordingStorage
from tests.conftest import LONG
from tests.qcowlib.jobs.samples import qemu_img

pytestmark = pytest.mark.real("qemu-img", "qemu-io")

KiB, MiB = 1 << 10, 1 << 20
SIZES = [256 * KiB, 2 * MiB, 8 * MiB]
OPTIONS = [
    "cluster_size=512",
    "cluster_size=512,refcount_bits=64",
    "cluster_size=1024,refcount_bits=4",
    "cluster_size=4096",
    "cluster_size=16384,extended_l2=on",
    "cluster_size=1024,compat=0.10",
    "cluster_size=4096,compression_type=zstd",
]


def write(rng: random.Random, path: Path, cluster: int, size: int, packed: float, taken: set[int]) -> None:
    """Plain and compressed writes by qemu, compressed ones to clusters that were never written (it refuses others)."""
    noise = path.with_name("noise")
    noise.write_bytes(bytes(rng.choice(b"abcdefghijklmnopqrstuvwxyz012345") for _ in range(cluster)))
    words: list[str] = []
    for _ in range(rng.randrange(5, 15)):
        if rng.random() < packed:
            for number in {rng.randrange(size // cluster) for _ in range(rng.randrange(1, 6))} - taken:
                words += ["-c", f"write -q -c -s {noise} {number * cluster} {cluster}"]
                taken.add(number)
        else:
            length = rng.randrange(1, 8) * 512
            at = rng.randrange((size - length) // 512) * 512
            words += ["-c", f"write -q -P {rng.randrange(1, 255)} {at} {length}"]
            taken.update(range(at // cluster, (at + length - 1) // cluster + 1))
    subprocess.run(["qemu-io", "-t", "unsafe", "-f", "qcow2", *words, str(path)], check=True, capture_output=True)


def used_image(rng: random.Random, path: Path, size: int, options: str) -> None:
    """An image with holes below its end and a bit of everything above them."""
    path.unlink(missing_ok=True)
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, size)
    cluster = int(options.split(",")[0][13:])
    packed = 0.0 if "extended" in options else rng.choice([0, 0.3, 0.8])
    taken: set[int] = set()
    for _ in range(rng.randrange(2, 5)):
        write(rng, path, cluster, size, packed, taken)
        with qcowlib.open(path, "r+", cache="unsafe") as image:
            choice, held = rng.random(), list(image.snapshots())
            if choice < 0.4:
                image.create_snapshot(f"s{rng.randrange(1000)}")
            elif choice < 0.6 and held:
                image.delete_snapshot(held[0].id if isinstance(held[0].id, str) else held[0].id.decode())
            elif choice < 0.8 and "0.10" not in options:
                image.add_bitmap(f"b{rng.randrange(10000)}", 512)
            if rng.random() < 0.6:
                start = rng.randrange(size) // cluster * cluster
                image.discard(min(size - start, rng.choice([size // 3, size // 10, cluster * 4])), start)
    with qcowlib.open(path, "r+", cache="unsafe") as image:
        image.discard(size // 3 // cluster * cluster, rng.randrange(size // 2) // cluster * cluster)


def everything(path: Path | MemoryStorage, secret: str | None = None) -> list[Any]:
    """What an image shows: content, snapshots, bitmaps."""
    with qcowlib.open(path, format="qcow2", secret=secret) as image:
        found: list[Any] = [image.pread(image.size, 0)]
        names = [one.id for one in image.snapshots()]
        found += [(one.name, list(image.bitmap_extents(one.name))) for one in image.bitmaps()]
    for name in names:
        key = name if isinstance(name, str) else name.decode()
        with qcowlib.open(path, format="qcow2", snapshot=key, secret=secret) as image:
            found.append((key, image.pread(image.size, 0)))
    return found


@settings(max_examples=20 * LONG, deadline=None)
@given(seed=st.integers(0, 2**32), options=st.sampled_from(OPTIONS), size=st.sampled_from(SIZES))
def test_file_is_as_short_as_its_clusters_allow_and_as_planned(
    tmp_path_factory: pytest.TempPathFactory, seed: int, options: str, size: int
) -> None:
    folder = tmp_path_factory.mktemp("compact")
    path, copy = folder / "image", folder / "copy"
    used_image(random.Random(seed), path, size, options)
    before, length = everything(path), path.stat().st_size
    copy.write_bytes(path.read_bytes())
    plan = plan_compact(path)
    assert path.read_bytes() == copy.read_bytes()
    assert compact(path, cache="unsafe") == plan
    assert path.stat().st_size == plan.new_size <= length
    # The smallest file for the same clusters has no free one; room in one piece costs at most two.
    assert plan.free <= 2 * int(options.split(",")[0][13:])
    assert everything(path) == before
    qemu_img("check", path)
    qemu_img("compare", path, copy)
    for file in folder.iterdir():
        file.unlink()


#: Kinds of batches of which one image or another of the crash test has each.
ALL_KINDS = {DATA_CLUSTER, ALONE, BITS, TABLE_CLUSTER, BLOCK_CLUSTER, ITEM, PACKED, BLOCKS_GONE}


def batches(storage: MemoryStorage) -> list[Batch]:
    """What a compaction would do."""
    work = Compaction(storage, read_header(storage))
    end = work.plan().end
    return list(work.relocation().batches()) if end < work.used << work.bits else []


def judged_at_every_cut(storage: MemoryStorage, random_states: int, secret: str | None = None) -> int:
    """Compact *storage* and judge each state a power cut can leave; returns how many there are."""
    expected = everything(storage, secret)
    cipher = None
    if secret is not None:
        with qcowlib.open(MemoryStorage(bytearray(storage.getvalue())), format="qcow2", secret=secret) as image:
            top = image.layers[0]
            assert isinstance(top, Qcow2Image)
            cipher = top.reader.cipher
    log = OpLog()
    recorded = log.record(storage)
    Compaction(recorded, read_header(recorded), cipher).run(lambda _: None)

    def judge(state: CrashState) -> list[Finding]:
        image = MemoryStorage(bytearray(state.images[0]))
        report = check(image)
        if report.corruptions or report.check_errors:
            return [Finding("CORRUPT", str(report.findings[:2]))]
        try:
            shown = everything(image, secret)
        except qcowlib.Error as error:
            return [Finding("LOST", str(error))]
        if shown != expected:
            return [Finding("LOST", "it shows something else")]
        return [Finding("LEAK", "")] if report.leaks else []

    return assert_crash_safe(log, judge, random_states=random_states).distinct


@pytest.mark.crash
def test_i5_every_structure_moves_and_no_cut_leaves_more_than_leaks(tmp_path: Path) -> None:
    missing, seed, states = set(ALL_KINDS), 0, 0
    while missing:
        options = OPTIONS[seed % 4]
        used_image(random.Random(seed), tmp_path / "image", 192 * KiB, options)
        storage = MemoryStorage(bytearray((tmp_path / "image").read_bytes()))
        kinds = {batch.kind for batch in batches(storage)}
        if missing & kinds:
            missing -= kinds
            states += judged_at_every_cut(storage, 4)
        seed += 1
        assert seed < 200, f"no image in which {missing} move"
    assert states > 100


def long_run(path: Path) -> MemoryStorage:
    """A run of compressed clusters, shared by a snapshot, that is longer than any room below it; some is free there."""
    noise, rng = path.with_name("noise"), random.Random(3)
    noise.write_bytes(bytes(rng.choice(b"abcdefghijklmnopqrstuvwxyz012345") for _ in range(4096)))
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", path, MiB)
    words = ["-c", "write -q -P 7 0 160k"]
    for number in range(40, 140):
        words += ["-c", f"write -q -c -s {noise} {number * 4096} 4096"]
    subprocess.run(["qemu-io", "-t", "unsafe", "-f", "qcow2", *words, str(path)], check=True, capture_output=True)
    with qcowlib.open(path, "r+", cache="unsafe") as image:
        for number in (3, 4, 9, 11, 17, 18, 19, 25, 30):
            image.discard(4096, number * 4096)
        image.create_snapshot("kept")
        image.pwrite(b"own" * 100, 39 * 4096)
    return MemoryStorage(bytearray(path.read_bytes()))


@pytest.mark.crash
def test_i1_long_compressed_run_is_parted_and_no_cut_leaves_more_than_leaks(tmp_path: Path) -> None:
    storage = long_run(tmp_path / "image")
    assert any(batch.head for batch in batches(storage))
    assert judged_at_every_cut(storage, 8) > 20
    assert Compaction(storage, read_header(storage)).plan().free <= 2 * 4096
    (tmp_path / "image").write_bytes(storage.getvalue())
    qemu_img("check", tmp_path / "image")


@pytest.mark.crash
@pytest.mark.parametrize("method", [1, 2])
def test_i2_encrypted_data_read_the_same_at_every_cut(method: int) -> None:
    area = LuksHeader.create("key", cipher_alg="aes-128", iter_time=0)[0] if method == 2 else b""
    storage, rng = MemoryStorage(), random.Random(method)
    create(storage, CreateOptions(256 * KiB, cluster_size=4096, encrypt=Encryption(method, area)))
    with qcowlib.open(storage, "r+", format="qcow2", secret="key") as image:
        for number in range(16):
            image.pwrite(rng.randbytes(9000), number * 16384)
        image.create_snapshot("kept")
        image.pwrite(rng.randbytes(5000), 200000)
        image.delete_snapshot("1")
        image.create_snapshot("again")
        image.pwrite(rng.randbytes(5000), 100000)
        image.discard(80 * KiB, 0)
        image.delete_snapshot("1")
    assert judged_at_every_cut(storage, 1, "key") > 20


@pytest.mark.crash
def test_without_barriers_a_cut_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = long_run(tmp_path / "image")
    monkeypatch.setattr(RecordingStorage, "flush", lambda _: None)
    with pytest.raises(AssertionError, match="crash states with"):
        judged_at_every_cut(storage, 8)
