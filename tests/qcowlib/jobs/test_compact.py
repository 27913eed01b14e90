# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Compact: the same bytes, snapshots and bitmaps in a shorter file, at every cut."""

from __future__ import annotations

import functools
import json
import random
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qcowlib
from qcowlib.jobs.compact import compact, plan_compact
from qcowlib.luks import LuksHeader
from qcowlib.qcow2.compact import Compaction
from qcowlib.qcow2.create import CreateOptions, Encryption, create
from qcowlib.qcow2.directories import read_header
from qcowlib.storage.file import FileStorage
from qcowlib.storage.linear import LinearStorage, Segment
from qcowlib.storage.memory import MemoryStorage
from qcowlib.testing.crash import CrashState, Finding, assert_crash_safe
from qcowlib.testing.recorder import OpLog
from tests.conftest import LONG
from tests.qcowlib.jobs.samples import qemu_img

KiB, MiB = 1 << 10, 1 << 20
OPTIONS: list[dict[str, Any]] = [
    {"cluster_size": 512},
    {"cluster_size": 4096},
    {"cluster_size": 16384, "extended_l2": True},
    {"cluster_size": 512, "refcount_bits": 64},
    {"cluster_size": 1024, "refcount_bits": 2},
    {"compat": "0.10", "cluster_size": 1024},
    {"cluster_size": 4096, "lazy_refcounts": True},
]


def used_image(rng: random.Random, path: Path | MemoryStorage, size: int, options: dict[str, Any]) -> None:
    """An image with holes below its end: what was written first went again."""
    qcowlib.create(path, size, **options)
    with qcowlib.open(path, "r+", format="qcow2") as image:
        for _ in range(10):
            length = rng.randrange(1, 30) * 512
            image.pwrite(rng.randbytes(length), rng.randrange((size - length) // 512) * 512)
        if rng.random() < 0.5 and options.get("compat") != "0.10":
            image.add_bitmap("kept", 512)
        if rng.random() < 0.5:
            image.create_snapshot("one")
        for _ in range(5):
            length = rng.randrange(1, 30) * 512
            image.pwrite(
                rng.choice([rng.randbytes(length), bytes(length)]), rng.randrange((size - length) // 512) * 512
            )
        if rng.random() < 0.3 and len(image.snapshots()):
            image.delete_snapshot("one")
        start = rng.randrange(size // 2) // 16384 * 16384
        image.discard(min(size - start, size // 3), start)
        image.flush()


def everything(path: Path | MemoryStorage) -> list[Any]:
    """What an image shows: content, snapshots, bitmaps."""
    with qcowlib.open(path, format="qcow2") as image:
        found: list[Any] = [image.pread(image.size, 0)]
        names = [one.id for one in image.snapshots()]
        found += [(one.name, list(image.bitmap_extents(one.name))) for one in image.bitmaps()]
    for name in names:
        key = name if isinstance(name, str) else name.decode()
        with qcowlib.open(path, format="qcow2", snapshot=key) as image:
            found.append((key, image.pread(image.size, 0)))
    return found


@pytest.mark.real("qemu-img")
@settings(max_examples=60 * LONG, deadline=None)
@given(seed=st.integers(0, 2**32), options=st.sampled_from(OPTIONS), zeros=st.booleans())
def test_plan_is_what_the_compaction_leaves(
    tmp_path_factory: pytest.TempPathFactory, seed: int, options: dict[str, Any], zeros: bool
) -> None:
    rng = random.Random(seed)
    path = tmp_path_factory.mktemp("compact") / "image"
    used_image(rng, path, rng.choice([256, 1024]) * KiB, options)
    before, length = everything(path), path.stat().st_size
    plan = plan_compact(path, zeros=zeros)
    done = compact(path, zeros=zeros)
    assert done == plan
    assert path.stat().st_size == plan.new_size <= length
    assert everything(path) == before
    qemu_img("check", path)
    again = plan_compact(path, zeros=zeros)
    assert (again.new_size, again.moved, again.leaks, again.zeros) == (plan.new_size, 0, 0, 0)
    path.unlink()


@pytest.mark.crash
@pytest.mark.parametrize("options", OPTIONS[:2] + OPTIONS[3:6], ids=str)
def test_i1_no_cut_leaves_more_than_leaks(options: dict[str, Any]) -> None:
    rng = random.Random(str(options))
    storage = MemoryStorage()
    plan = None
    while plan is None or not (plan.data and plan.tables):
        storage = MemoryStorage()
        used_image(rng, storage, 96 * KiB, options)
        plan = Compaction(storage, read_header(storage)).plan()
    expected = everything(storage)
    log = OpLog()
    recorded = log.record(storage)
    Compaction(recorded, read_header(recorded)).run(lambda _: None)

    def judge(state: CrashState) -> list[Finding]:
        image = MemoryStorage(bytearray(state.images[0]))
        with qcowlib.open(image, format="qcow2") as opened:
            report = opened.check()
        if report.corruptions or report.check_errors:
            return [Finding("CORRUPT", str(report.findings[:2]))]
        if everything(image) != expected:
            return [Finding("LOST", "it shows something else")]
        return [Finding("LEAK", "")] if report.leaks else []

    assert assert_crash_safe(log, judge, random_states=8).distinct > 20


@pytest.mark.crash
def test_cancelled_anywhere_it_is_done_by_calling_again(tmp_path: Path) -> None:
    rng = random.Random(5)
    path, copy = tmp_path / "image", tmp_path / "copy"
    used_image(rng, path, 1024 * KiB, {"cluster_size": 4096})
    with qcowlib.open(path, "r+") as image:
        image.discard(512 * KiB, 0)
    before, content = everything(path), path.read_bytes()
    size = plan_compact(path).new_size
    for most in range(4):
        copy.write_bytes(content)
        left = [most]

        def cancel(left: list[int] = left) -> bool:
            left[0] -= 1
            return left[0] < 0

        try:
            compact(copy, cancel=cancel)
        except qcowlib.Cancelled:
            assert everything(copy) == before
            assert qemu_img("check", copy, check=False).returncode in (0, 3)
        compact(copy)
        assert copy.stat().st_size == size
        assert everything(copy) == before


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(MiB))
    with pytest.raises(qcowlib.FormatError, match="not in qcow2 format"):
        compact(path)
    qcowlib.create(path, 1024 * KiB)
    with qcowlib.open(path, "r+"), pytest.raises(qcowlib.Busy):
        compact(path)
    with path.open("r+b") as file:
        file.seek(65536 * 2)
        file.write(bytes(2))
    with pytest.raises(qcowlib.Error, match="repair it first"):
        compact(path)


def worn(path: Path, secret: str | None) -> None:
    """Lets the image at *path* lose what was written first; a snapshot holds some of the rest."""
    rng = random.Random(7)
    with qcowlib.open(path, "r+", secret=secret) as image:
        for number in range(16):
            image.pwrite(rng.randbytes(60000), number * 65536)
        if not image.info().data_file:
            image.create_snapshot("kept")
            image.pwrite(rng.randbytes(200000), 700000)
            image.delete_snapshot("1")
            image.create_snapshot("kept")
        image.discard(512 * KiB, 0)


@functools.cache
def encrypted(kind: str) -> bytes:
    """A new image whose passphrase takes no time."""
    image = MemoryStorage()
    area = LuksHeader.create("abc", cipher_alg="aes-128", iter_time=0)[0] if kind == "luks" else b""
    create(image, CreateOptions(2 * MiB, cluster_size=4096, encrypt=Encryption(2 if area else 1, area)))
    return image.getvalue()


SECRET = ("--object", "secret,id=sec0,data=abc")


@pytest.mark.real("qemu-img", "qemu-io")
@pytest.mark.parametrize("kind", ["luks", "aes"])
@pytest.mark.parametrize("given", [True, False])
def test_encrypted_data_move_only_where_the_guest_reads_the_same_after_it(
    tmp_path: Path, kind: str, given: bool
) -> None:
    path, plain = tmp_path / "image", tmp_path / "plain"
    path.write_bytes(encrypted(kind))
    worn(path, "abc")
    with qcowlib.open(path, secret="abc") as image:
        expected = image.pread(image.size, 0)
    with qcowlib.open(path, secret="abc", snapshot="kept") as image:
        kept = image.pread(image.size, 0)
    secret = "abc" if given else None
    plan = plan_compact(path, secret=secret)
    opened = f"driver=qcow2,encrypt.key-secret=sec0,file.filename={path}"
    words = [*SECRET, "--image-opts", opened] if given else [str(path)]
    command = [sys.executable, "-m", "qcowlib", "compact", "--plan", "--output=json", *words]
    told = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert (told["done"], told["new-size"], told["left"]) == (False, plan.new_size, plan.left)
    assert compact(path, secret=secret) == plan
    assert path.stat().st_size == plan.new_size
    qemu_img("check", *SECRET, "--image-opts", opened)
    with qcowlib.open(path, secret="abc", snapshot="kept") as image:
        assert image.pread(image.size, 0) == kept
    qemu_img("convert", *SECRET, "--image-opts", opened, "-O", "raw", plain)
    assert plain.read_bytes() == expected
    # Of AES the guest's sector makes the initial vector, of LUKS the file's.
    stays = kind == "luks" and not given
    assert bool(plan.moved_data) != stays
    assert (plan.free == 0) != stays
    reason = "guest data stays where it is, as LUKS data cannot move without the passphrase"
    assert plan.left == (reason if stays else "")
    subprocess.run(["qemu-io", *SECRET, "-c", "write -q -P 5 0 64k", "--image-opts", opened], check=True)
    qemu_img("check", *SECRET, "--image-opts", opened)


def test_wrong_passphrase_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "image"
    before = encrypted("luks")
    path.write_bytes(before)
    with pytest.raises(qcowlib.SecretError):
        compact(path, secret="abd")
    assert path.read_bytes() == before


@pytest.mark.real("qemu-img")
@pytest.mark.parametrize("raw", [True, False])
def test_with_a_data_file_only_metadata_move(tmp_path: Path, raw: bool) -> None:
    path, data = tmp_path / "image", tmp_path / "data"
    options = f"cluster_size=512,data_file={data},data_file_raw={'on' if raw else 'off'}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, 2 * MiB)
    worn(path, None)
    with qcowlib.open(path, "r+") as image:
        image.add_bitmap("first", 512)
        image.pwrite(b"x" * 70000, 900000)
        image.add_bitmap("second", 512)
    with qcowlib.open(path, "r+") as image:
        image.remove_bitmap("first")
        image.resize(1200 * KiB, shrink=True)
    before, outside = everything(path), data.read_bytes()
    plan = plan_compact(path)
    assert compact(path) == plan
    assert path.stat().st_size == plan.new_size < plan.file_size
    assert (plan.moved_data, plan.free) == (0, 0) and plan.moved
    assert plan.left == "guest data in the external data file stays as it is"
    assert everything(path) == before and data.read_bytes() == outside
    qemu_img("check", path)


@pytest.mark.real("qemu-img")
@pytest.mark.parametrize("backed", [True, False])
def test_zeros_in_version_2_go_where_no_backing_file_would_show(tmp_path: Path, backed: bool) -> None:
    base, path = tmp_path / "base", tmp_path / "image"
    base.write_bytes(b"b" * MiB)
    words = ["-b", base, "-F", "raw"] if backed else []
    qemu_img("create", "-q", "-f", "qcow2", *words, "-o", "compat=0.10,cluster_size=4096", path, MiB)
    with qcowlib.open(path, "r+") as image:
        image.pwrite(bytes(256 * KiB), 0)
        image.pwrite(b"d" * 64 * KiB, 512 * KiB)
        before = image.pread(image.size, 0)
    if not backed:
        # Without a backing file zeros are not even stored; qemu stores them.
        words = ["qemu-io", "-f", "qcow2", "-c", "write -q -P 0 0 256k", str(path)]
        subprocess.run(words, check=True)
    plan = plan_compact(path, zeros=True)
    assert compact(path, zeros=True) == plan
    assert (plan.zeros, plan.zeros_kept) == ((0, 256 * KiB) if backed else (256 * KiB, 0))
    kept = "262144 bytes of zeros stay, as version 2 cannot hide a backing file by zero clusters"
    assert plan.left == (kept if backed else "")
    assert (path.stat().st_size < 256 * KiB) != backed
    with qcowlib.open(path) as image:
        assert image.pread(image.size, 0) == before
    qemu_img("check", path)


@pytest.mark.real("qemu-img")
def test_i10_unknown_autoclear_bits_go_before_anything_moves(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qcowlib.create(path, 2 * MiB, cluster_size=4096)
    worn(path, None)
    with path.open("r+b") as file:
        file.seek(88)
        file.write((1 << 40).to_bytes(8, "big"))
    assert compact(path).moved
    assert path.read_bytes()[88:96] == bytes(8)
    qemu_img("check", path)


#: Compacts, and tells of each piece that moved.
CHILD = """
import sys
from qcowlib.jobs.compact import compact
compact(sys.argv[1], rate=40_000_000, progress=lambda done, total: print("piece", flush=True))
"""


@pytest.mark.crash
@pytest.mark.real("qemu-img")
@pytest.mark.parametrize("pieces", [1, 2, 5, 20])
def test_killed_while_it_moves_it_is_done_by_calling_again(tmp_path: Path, pieces: int) -> None:
    rng = random.Random(pieces)
    path = tmp_path / "image"
    qcowlib.create(path, 16 * MiB, cluster_size=4096)
    with qcowlib.open(path, "r+") as image:
        for number in range(64):
            image.pwrite(rng.randbytes(65536), (number * 37 % 64) * 131072)
        image.create_snapshot("one")
        image.pwrite(rng.randbytes(3 * MiB), 9 * MiB)
        image.delete_snapshot("one")
        image.create_snapshot("two")
        image.discard(2 * MiB, 1 * MiB)
    with qcowlib.open(path, "r+") as image:
        image.delete_snapshot("1" if image.snapshots()[0].id in ("1", b"1") else "2")
        image.create_snapshot("kept")
    before = everything(path)
    assert plan_compact(path).moved >= MiB
    with subprocess.Popen([sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        for _ in range(pieces):
            child.stdout.readline()
        child.send_signal(signal.SIGKILL)
    assert everything(path) == before
    assert qemu_img("check", path, check=False).returncode in (0, 3)
    done = compact(path)
    assert everything(path) == before
    assert path.stat().st_size == done.new_size
    qemu_img("check", path)


def test_device_is_not_cut_and_told_what_it_must_keep() -> None:
    rng = random.Random(31)
    memory = MemoryStorage()
    used_image(rng, memory, 512 * KiB, {"cluster_size": 4096})
    while not Compaction(memory, read_header(memory)).plan().data:
        memory = MemoryStorage()
        used_image(rng, memory, 512 * KiB, {"cluster_size": 4096})
    room = 4096 * 1024
    # The rest of the last cluster is guest data, zeros past the file's end; behind it may lie anything.
    whole = -(-len(memory.getvalue()) // 4096) * 4096
    disk = MemoryStorage(bytearray(memory.getvalue().ljust(whole, b"\0").ljust(room, b"\xee")))
    volume = LinearStorage([Segment(disk, 0, room // 2), Segment(disk, room // 2, room // 2)])
    expected = everything(memory)
    plan = plan_compact(volume)
    assert disk.getvalue()[: len(memory.getvalue())] == memory.getvalue()
    done = compact(volume)
    assert (done.new_size, done.moved) == (plan.new_size, plan.moved) and volume.size == room and done.moved
    assert everything(volume) == expected
    # What it need not keep is not needed.
    kept = MemoryStorage(bytearray(disk.getvalue()[: done.new_size]))
    assert everything(kept) == expected


@pytest.mark.real("losetup", "qemu-img")
@pytest.mark.bare
def test_real_device_is_compacted(tmp_path: Path) -> None:
    lun = tmp_path / "lun"
    rng = random.Random(33)
    memory = MemoryStorage()
    used_image(rng, memory, 512 * KiB, {"cluster_size": 4096})
    lun.write_bytes(memory.getvalue().ljust(8 << 20, b"\0"))
    device = subprocess.run(["losetup", "-f", "--show", lun], capture_output=True, text=True, check=True).stdout.strip()
    try:
        plan = plan_compact(device)
        done = compact(device)
        assert done.new_size == plan.new_size < len(memory.getvalue())
        qemu_img("check", "-f", "qcow2", device)
        with closing(FileStorage.open(device)) as storage:
            assert everything(storage) == everything(memory)
    finally:
        subprocess.run(["losetup", "-d", device], check=True)
