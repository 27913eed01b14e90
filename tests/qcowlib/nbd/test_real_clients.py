# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Real clients on our server, and our answers beside those of qemu-nbd for the same image."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import qcowlib
from tests.qcowlib.qemu import qemu_img, run

pytestmark = [
    pytest.mark.bare,
    pytest.mark.real("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo", "nbdcopy", "fio"),
]

MiB = 1 << 20
SIZE = 24 * MiB


@contextmanager
def qemu_nbd(path: Path, folder: Path, *words: str, fmt: str = "qcow2") -> Iterator[str]:
    """The address of a qemu-nbd that serves *path* until the block ends."""
    where = folder / "qemu.sock"
    command = ["qemu-nbd", "-t", "-e", "8", "-k", str(where), "-f", fmt, "--pid-file", str(folder / "pid"), "--fork"]
    run(*command, *words, path)
    try:
        yield f"nbd+unix:///?socket={where}"
    finally:
        # It ends by itself when it is told to; nothing else knows its number.
        run("kill", (folder / "pid").read_text().strip())


def make_chain(folder: Path, seed: int, **options: Any) -> Path:
    """A chain of two with data, zeros, holes and a bitmap that knows the last changes."""
    chance = random.Random(seed)
    base, top = folder / "base.qcow2", folder / "top.qcow2"
    qcowlib.create(base, SIZE - 3 * MiB)
    qcowlib.create(top, SIZE, backing="base.qcow2", backing_format="qcow2", **options)
    for path in (base, top):
        with qcowlib.open(path, "r+") as image:
            image.add_bitmap("since", chance.choice([4096, 65536, 1 << 20]))
            for _ in range(30):
                offset = chance.randrange(image.size // 512) * 512
                length = min(chance.choice([512, 4096, 65536, 300_000]), image.size - offset)
                kind = chance.choice(["write", "write", "zero", "keep", "discard"])
                if kind == "write":
                    image.pwrite(chance.randbytes(length), offset)
                elif kind == "discard":
                    image.discard(length, offset)
                else:
                    image.zero(length, offset, unmap=kind == "zero")
    return top


def status(uri: str, context: str = "base:allocation") -> list[tuple[int, int, int]]:
    """What nbdinfo says, neighbours joined: servers cut their answers where they like."""
    found: list[tuple[int, int, int]] = []
    for entry in json.loads(run("nbdinfo", "--json", f"--map={context}", uri)):
        offset, length, kind = entry["offset"], entry["length"], entry["type"]
        if found and found[-1][2] == kind:
            found[-1] = found[-1][0], found[-1][1] + length, kind
        else:
            found.append((offset, length, kind))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_block_status_is_that_of_qemu_nbd(tmp_path: Path, seed: int) -> None:
    top = make_chain(tmp_path, seed, cluster_size=[65536, 4096, 65536][seed], extended_l2=seed == 2)
    names = ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:since")
    with qemu_nbd(top, tmp_path, "-r", "-A", "-B", "since") as theirs, qcowlib.serve(top, bitmaps=["since"]) as ours:
        for name in names:
            assert status(ours.uri, name) == status(theirs, name), name
        for key in ("export-size", "is_read_only", "can_df", "can_flush", "can_multi_conn", "can_cache", "contexts"):
            facts = [json.loads(run("nbdinfo", "--json", uri))["exports"][0] for uri in (ours.uri, theirs)]
            assert facts[0].get(key) == facts[1].get(key), key


def test_block_status_of_raw_and_of_raw_below_is_that_of_qemu_nbd(tmp_path: Path) -> None:
    raw, top = tmp_path / "base.raw", tmp_path / "top.qcow2"
    with raw.open("wb") as file:
        file.truncate(SIZE)
        file.seek(5 * MiB)
        file.write(b"d" * MiB)
    qcowlib.create(top, SIZE + MiB, backing="base.raw", backing_format="raw")
    with qcowlib.open(top, "r+") as image:
        image.pwrite(b"t" * 70000, 9 * MiB)
    for path, fmt in ((raw, "raw"), (top, "qcow2")):
        with qemu_nbd(path, tmp_path, "-r", "-A", fmt=fmt) as theirs, qcowlib.serve(path, format=fmt) as ours:
            for name in ("base:allocation", "qemu:allocation-depth"):
                assert status(ours.uri, name) == status(theirs, name), (fmt, name)


def test_qemu_io_does_the_same_to_both(tmp_path: Path) -> None:
    chance = random.Random(7)
    commands = ["-c", "write -P 1 0 64k"]
    for _ in range(60):
        offset = chance.randrange(SIZE // 512 - 800) * 512
        length = chance.choice([512, 4096, 65536, 401_408])
        verb = chance.choice(["write -P 7", "write -f -P 9", "write -z", "write -z -u", "discard", "read", "flush"])
        commands += ["-c", verb if verb == "flush" else f"{verb} {offset} {length}"]
    paths = [tmp_path / "ours", tmp_path / "theirs"]
    for path in paths:
        qcowlib.create(path, SIZE)
        with qcowlib.open(path, "r+") as image:
            image.add_bitmap("b", 65536)
    with qcowlib.serve(paths[0], writable=True) as server:
        run("qemu-io", "-d", "unmap", "-f", "raw", *commands, server.uri)
    with qemu_nbd(paths[1], tmp_path, "--discard=unmap") as uri:
        run("qemu-io", "-d", "unmap", "-f", "raw", *commands, uri)
    run("sh", "-c", f"while ! qemu-img info {paths[1]} >/dev/null 2>&1; do :; done")
    qemu_img("compare", *paths)
    qemu_img("check", paths[0])
    bitmaps = []
    for path in paths:
        with qcowlib.open(path) as image:
            bitmaps.append(list(image.bitmap_extents("b")))
    assert bitmaps[0] == bitmaps[1]


def test_copies_by_other_programs_are_equal(tmp_path: Path) -> None:
    top = make_chain(tmp_path, 11)
    with qcowlib.serve(top) as server:
        run("nbdcopy", server.uri, tmp_path / "copied.raw")
        qemu_img("convert", "-f", "raw", "-O", "qcow2", server.uri, tmp_path / "converted.qcow2")
        qemu_img("compare", "-f", "raw", "-F", "raw", server.uri, tmp_path / "copied.raw")
    qemu_img("compare", "-F", "raw", top, tmp_path / "copied.raw")
    qemu_img("compare", top, tmp_path / "converted.qcow2")
    target = tmp_path / "target.qcow2"
    qcowlib.create(target, SIZE)
    with qcowlib.serve(target, writable=True) as server:
        run("nbdcopy", "--flush", tmp_path / "copied.raw", server.uri)
    qemu_img("check", target)
    qemu_img("compare", "-F", "raw", target, tmp_path / "copied.raw")


def test_list_of_several_exports_and_a_snapshot(tmp_path: Path) -> None:
    for name in ("one", "two"):
        qcowlib.create(tmp_path / name, SIZE)
    with qcowlib.open(tmp_path / "one", "r+") as image:
        image.create_snapshot("before")
        image.pwrite(b"x", 0)
    with qcowlib.serve({"one": tmp_path / "one", "two": tmp_path / "two"}) as server:
        listed = json.loads(run("nbdinfo", "--json", "--list", server.uri))["exports"]
        assert [export["export-name"] for export in listed] == ["one", "two"]
        run("qemu-io", "-r", "-f", "raw", "-c", "read -P 120 0 1", server.uri_of("one"))
    with qcowlib.serve(tmp_path / "one", snapshot="before") as server:
        run("qemu-io", "-r", "-f", "raw", "-c", "read -P 0 0 512", server.uri)


def test_fio_verifies_its_random_writes(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcowlib.create(path, SIZE)
    with qcowlib.serve(path, writable=True) as server:
        words = ["--name=v", "--ioengine=nbd", f"--uri={server.uri}", "--rw=randwrite", "--bs=4k", "--size=8m"]
        run("fio", *words, "--iodepth=16", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", cwd=tmp_path)
    qemu_img("check", path)


#: Debian's module is of Debian's Python.
_LIBNBD = """
import nbd, sys
h = nbd.NBD()
h.add_meta_context("base:allocation")
h.connect_uri(sys.argv[1])
h.pwrite(b"libnbd" * 1000, 12345, nbd.CMD_FLAG_FUA)
assert h.pread(6000, 12345) == b"libnbd" * 1000
parts = []
h.pread_structured(3 << 20, 0, lambda data, at, status, error: parts.append((at, len(data), status)))
assert sum(length for _, length, _ in parts) == 3 << 20
h.zero(65536, 0, nbd.CMD_FLAG_FAST_ZERO)
h.zero(65536, 65536, nbd.CMD_FLAG_NO_HOLE)
h.trim(1 << 20, 1 << 20)
h.cache(4096, 0)
h.flush()
seen = []
h.block_status(2 << 20, 0, lambda name, at, entries, error: seen.extend(entries), nbd.CMD_FLAG_REQ_ONE)
assert len(seen) == 2, seen
h.set_strict_mode(0)
for wrong in (lambda: h.pread(1, h.get_size()), lambda: h.pwrite(b"x", h.get_size())):
    try:
        wrong()
    except nbd.Error as error:
        print(error.errno)
h.shutdown()
"""


def test_libnbd_uses_every_command(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcowlib.create(path, SIZE)
    with qcowlib.serve(path, writable=True) as server:
        assert run("/usr/bin/python3", "-c", _LIBNBD, server.uri).split() == ["EINVAL", "ENOSPC"]
    qemu_img("check", path)


def test_libnbd_fails_with_what_the_storage_says(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcowlib.create(path, SIZE)
    code = "import nbd, sys; h = nbd.NBD(); h.set_strict_mode(0); h.connect_uri(sys.argv[1]); h.pwrite(b'x', 0)"
    with qcowlib.serve(path) as server:
        assert "Operation not permitted" in run("/usr/bin/python3", "-c", code, server.uri, ok=False)
