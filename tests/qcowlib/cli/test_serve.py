# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``qcow serve`` as a process: where it listens, what it says, how signals end it; and a guest that boots from it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import qcowlib
from tests.qcowlib.nbd.wire import WRITE, Client
from tests.qcowlib.qemu import run

pytestmark = pytest.mark.bare

ROOT = Path(__file__).resolve().parents[3]
QCOW = [sys.executable, "-m", "qcowlib"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
MiB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qcowlib.create(path, 4 * MiB)
    return path


@contextmanager
def serving(*words: str | Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A running ``qcow serve`` and its first event."""
    command = [*QCOW, "serve", "--output=json", *map(str, words)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline() or '{"event": "none"}')
    finally:
        process.kill()
        process.communicate()


def refused(*words: str | Path) -> str:
    done = subprocess.run(
        [*QCOW, "serve", *map(str, words)], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    return done.stderr.splitlines()[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_makes_everything_durable_and_ends_well(disk: Path, tmp_path: Path, number: signal.Signals) -> None:
    path, pid_file = tmp_path / "sock", tmp_path / "pid"
    with serving("-w", "-k", path, "--pid-file", pid_file, disk) as (process, first):
        assert first == {"event": "listening", "export": "", "uri": f"nbd+unix:///?socket={path}"}
        client = Client(str(path))
        assert client.call(WRITE, 0, data=b"kept") == 0
        # A second look would come too early: the file is written once clients can connect.
        assert pid_file.read_text() == f"{process.pid}\n"
        process.send_signal(number)
        out, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and errors == "" and not path.exists()
    assert [json.loads(line)["event"] for line in out.splitlines()] == [
        "connected",
        "negotiated",
        "disconnected",
        "stopped",
    ]
    with qcowlib.open(disk) as image:
        assert image.pread(4, 0) == b"kept"


def test_once_ends_when_the_client_has_gone(disk: Path) -> None:
    with serving("--once", disk) as (process, first):
        client = Client(first["uri"].partition("socket=")[2])
        assert client.call(WRITE, 0, data=b"no") == 1
        client.close()
        process.communicate(timeout=30)
    assert process.returncode == 0


def test_plan_serves_nothing_and_tells_what_would_be(disk: Path, tmp_path: Path) -> None:
    with qcowlib.open(disk, "r+") as image:
        image.add_bitmap("b")
    done = run(*QCOW, "serve", "--plan", "--output=json", "-B", "b", "-k", tmp_path / "s", disk, cwd=ROOT)
    assert json.loads(done) == {
        "address": str(tmp_path / "s"),
        "exports": [
            {
                "filename": str(disk),
                "export-name": "",
                "size": 4 * MiB,
                "read-only": True,
                "contexts": ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b"],
            }
        ],
    }
    assert not (tmp_path / "s").exists()
    text = run(*QCOW, "serve", "--plan", "-w", disk, disk.with_name("nothing"), ok=False, cwd=ROOT)
    assert "nothing" in text


def test_what_cannot_be_served_is_one_line(disk: Path, tmp_path: Path) -> None:
    assert "Expecting at least one" in refused()
    assert "exclude each other" in refused("-r", "-w", disk)
    assert "exclude each other" in refused("-t", "--once", disk)
    assert "once for each file" in refused("-x", "a", "-x", "b", disk)
    assert "different names" in refused(disk, disk)
    assert "Can't find snapshot" in refused("-l", "none", disk)
    assert "only be served for reading" in refused("-w", "-l", "none", disk)
    assert "'none' not found" in refused("-B", "none", disk)
    assert "--port must be" in refused("-p", "65536", disk)
    assert "--shared must be" in refused("-e", "0", disk)
    assert "not on several" in refused("-p", "0", "-k", "x", disk)
    assert "descriptor 77" in refused("--fd", "77", disk)
    assert "Could not open" in refused(tmp_path / "absent")


@pytest.mark.real("nbdinfo")
def test_libnbd_starts_it_by_socket_activation(disk: Path) -> None:
    code = (
        "import nbd, sys; h = nbd.NBD(); h.connect_systemd_socket_activation(sys.argv[1:]);"
        "h.pwrite(b'activated', 0); h.flush(); print(h.get_size()); h.shutdown()"
    )
    command = ["/usr/bin/python3", "-c", code, *QCOW, "serve", "-q", "-w", "--once", str(disk)]
    done = subprocess.run(command, env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()[-1:], done.stderr) == (0, [str(4 * MiB)], "")
    with qcowlib.open(disk, lock=False) as image:
        assert image.pread(9, 0) == b"activated"


#: A boot sector that copies the letters behind its code to sector 1 of its disk, says D on port 0xe9 and halts.
_BOOT = bytes.fromhex(
    "fa31c08ed88ed08ec0bc007cfb"  # cli; segments to zero; stack; sti
    "b80103bb007eb90200ba8000cd13"  # ax=0301 bx=7e00 cx=0002 dx=0080 int 13h: write sector 2 from 7e00
    "7206b044e6e9ebfe"  # jc +6; al='D'; out e9; loop
    "f4ebfd"
)


@pytest.mark.real("qemu-system-x86_64")
def test_guest_boots_from_the_export_and_writes_to_it(disk: Path, tmp_path: Path) -> None:
    # At 7c00: fill 7e00 with 'g' first, so that the sector tells who wrote it.
    fill = bytes.fromhex("bf007eb90002b067fcf3aa")
    code = _BOOT[:13] + fill + _BOOT[13:]
    with qcowlib.open(disk, "r+") as image:
        image.pwrite(code.ljust(510, b"\0") + b"\x55\xaa", 0)
    with qcowlib.serve(disk, writable=True, socket=tmp_path / "sock"):
        machine = ["qemu-system-x86_64", "-accel", "tcg", "-m", "16", "-nodefaults", "-display", "none"]
        drive = f"driver=raw,node-name=d,file.driver=nbd,file.server.type=unix,file.server.path={tmp_path / 'sock'}"
        words = ["-blockdev", drive, "-device", "ide-hd,drive=d", "-debugcon", "stdio"]
        guest = subprocess.Popen([*machine, *words], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        assert guest.stdout is not None
        letter = b""
        while letter not in (b"D", b"F"):
            letter = guest.stdout.read(1)
            assert letter, "the guest ended"
        guest.terminate()
        guest.communicate(timeout=30)
    with qcowlib.open(disk) as image:
        assert image.pread(512, 512) == b"g" * 512
