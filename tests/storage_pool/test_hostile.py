# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Domains that somebody wrote to do harm: one clear line, nothing outside is touched, bounded time and memory."""

import json
import os
import resource

import pytest

from storage_pool import snapshot, volume
from storage_pool.cli.main import main
from storage_pool.embedded import FileToken
from storage_pool.file_domain import FileDomain
from storage_pool.ids import make_id
from storage_pool.sealed import from_lines, to_lines

MIB = 1 << 20
CTIME = 1617235200
SECRET = b"the secret of another file"


@pytest.fixture
def victim(tmp_path):
    """A domain with a disk and a snapshot, and a file outside that must not be read or changed."""
    mount = tmp_path / "mount"
    mount.mkdir()
    (tmp_path / "outside").write_bytes(SECRET)
    with FileToken(str(tmp_path / "lock")) as token:
        options = {"version": 5, "storage_type": "NFS", "remote_path": "server:/x", "ctime": CTIME}
        with FileDomain.create(token, str(mount), make_id(), **options) as domain:
            spec = volume.VolumeSpec(make_id(), make_id(), MIB)
            volume.create_volume(token, domain, spec, CTIME)
            leaf = snapshot.create_snapshot(token, domain, spec.image, ctime=CTIME)
            folder = domain.root.path
    return mount, f"{folder}/images/{spec.image}", spec.volume, leaf


def reseal(path, **changes):
    lines = path.read_text().splitlines()
    values = from_lines(lines, str(path)) | changes
    path.write_text("".join(f"{line}\n" for line in to_lines(values)))


def record(path, **changes):
    lines = dict(line.split("=", 1) for line in path.read_text().splitlines() if "=" in line) | changes
    path.write_text("".join(f"{key}={value}\n" for key, value in sorted(lines.items())) + "EOF\n")


def link(path, target):
    path.unlink()
    path.symlink_to(target)


def long_file(path):
    os.truncate(path, 1 << 40)


DAMAGE = {
    "a version that does not exist": lambda d, b, t, o: reseal(d, VERSION="99"),
    "no number as version": lambda d, b, t, o: reseal(d, VERSION="9" * 5000),
    "no alignment": lambda d, b, t, o: reseal(d, ALIGNMENT="0"),
    "a huge alignment": lambda d, b, t, o: reseal(d, ALIGNMENT=str(1 << 60)),
    "a block size of 3": lambda d, b, t, o: reseal(d, BLOCK_SIZE="3"),
    "another uuid": lambda d, b, t, o: reseal(d, SDUUID=make_id()),
    "a uuid that leads away": lambda d, b, t, o: reseal(d, SDUUID="../../outside"),
    "a broken seal": lambda d, b, t, o: d.write_text(d.read_text().replace("CLASS=Data", "CLASS=Iso")),
    "metadata without end": lambda d, b, t, o: long_file(d),
    "metadata that is a link": lambda d, b, t, o: link(d, o),
    "metadata of many lines": lambda d, b, t, o: d.write_text("".join(f"K{n}=\n" for n in range(50000))),
    "metadata of nothing": lambda d, b, t, o: d.write_bytes(b""),
    "a record without end": lambda d, b, t, o: long_file(b.with_suffix(".meta")),
    "a record that is a link": lambda d, b, t, o: link(b.with_suffix(".meta"), o),
    "a record of other bytes": lambda d, b, t, o: b.with_suffix(".meta").write_bytes(bytes(range(256)) * 2),
    "a negative size": lambda d, b, t, o: record(b.with_suffix(".meta"), CAP="-1"),
    "a size beyond all": lambda d, b, t, o: record(b.with_suffix(".meta"), CAP="9" * 400),
    "a format that does not exist": lambda d, b, t, o: record(b.with_suffix(".meta"), FORMAT="../x"),
    "its own parent": lambda d, b, t, o: record(b.with_suffix(".meta"), PUUID=b.name),
    "a circle": lambda d, b, t, o: record(b.with_suffix(".meta"), PUUID=t.name),
    "a parent that leads away": lambda d, b, t, o: record(t.with_suffix(".meta"), PUUID="../../../../outside"),
    "a parent that is not there": lambda d, b, t, o: record(t.with_suffix(".meta"), PUUID=make_id()),
    "a generation beyond all": lambda d, b, t, o: record(t.with_suffix(".meta"), GEN="9" * 300),
    "escapes in a description": lambda d, b, t, o: record(t.with_suffix(".meta"), DESCRIPTION="\x1b[2J\x07"),
    "data that is a link": lambda d, b, t, o: link(b, o),
    "a lease that is a link": lambda d, b, t, o: link(b.with_suffix(".lease"), o),
    "a lease that is a pipe": lambda d, b, t, o: (b.with_suffix(".lease").unlink(), os.mkfifo(b.with_suffix(".lease"))),
    "a record that is a pipe": lambda d, b, t, o: (b.with_suffix(".meta").unlink(), os.mkfifo(b.with_suffix(".meta"))),
    "an image that is none": lambda d, b, t, o: b.write_bytes(b"QFI\xfb" + b"\xff" * 600),
    "an image that stands on a file outside": lambda d, b, t, o: b.write_bytes(backed(o)),
    "an image directory that is a link": lambda d, b, t, o: (
        b.parent.rename(o.parent / "moved"),
        b.parent.symlink_to(o.parent / "moved"),
    ),
    "lockspace of other bytes": lambda d, b, t, o: (d.parent / "ids").write_bytes(b"\xff" * 4096),
    "an index of other bytes": lambda d, b, t, o: (d.parent / "xleases").write_bytes(b"\xff" * (2 * MIB)),
    "a note that leads away": lambda d, b, t, o: t.with_suffix(".note").write_text("move:../../outside"),
    "a note of another kind": lambda d, b, t, o: t.with_suffix(".note").write_bytes(b"merge:\xff\x00" * 20),
    "a note of no volume": lambda d, b, t, o: t.with_suffix(".note").write_text(f"merge:{make_id()}"),
}


def backed(outside):
    from qcowlib.qcow2.create import CreateOptions, create
    from qcowlib.storage.memory import MemoryStorage

    storage = MemoryStorage(0)
    create(storage, CreateOptions(size=MIB, version=3, backing_file=str(outside).encode(), backing_format=b"raw"))
    data = bytearray(storage.size)
    storage.read_into(0, [data])
    return bytes(data)


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_domain_is_told_in_one_line_and_harms_nothing(victim, tmp_path, capfd, what):
    mount, folder, base, leaf = victim
    outside = tmp_path / "outside"
    metadata = next(mount.glob("*/dom_md/metadata"))
    from pathlib import Path

    DAMAGE[what](metadata, Path(folder, base), Path(folder, leaf), outside)
    image = Path(folder).name
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for command in (
        ["domain", "show", mount],
        ["domain", "dump", mount],
        ["check", mount],
        ["volume", "list", mount],
        ["image", "show", mount, image],
        ["image", "download", mount, image, tmp_path / "copy"],
        ["check", mount, "--mend"],
        ["check", mount],
        ["image", "remove", mount, image],
    ):
        status = main([*map(str, command), "--lock", str(tmp_path / "lock"), "--output=json"])
        got = capfd.readouterr()
        assert status in (0, 1, 3), command
        assert "Traceback" not in got.err and len(got.err.splitlines()) <= 2, (command, got.err)
        assert got.err.isprintable() or "\x1b" not in got.err
        assert status != 1 or got.err.startswith("qpool: ")
        if got.out:
            json.loads(got.out)
        assert SECRET.decode() not in got.out + got.err
    assert outside.read_bytes() == SECRET
    assert not (tmp_path / "copy").exists() or SECRET not in (tmp_path / "copy").read_bytes()
    # In KiB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
