# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Thin volumes grow under their writers: by rule on simulated time, and for real with two hosts on one volume group."""

import contextlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from qcowlib.errors import StorageError
from qcowlib.storage.linear import LinearStorage, Segment
from qcowlib.storage.memory import MemoryStorage
from qcowlib.units import MiB
from spm.growth import GrowingStorage
from storage_pool.block_domain import BlockDomain
from storage_pool.block_group import create_block_domain
from storage_pool.check import check_domain
from storage_pool.embedded import FileToken
from storage_pool.ids import make_id
from storage_pool.lease_records import lockspace_area
from storage_pool.pool import StoragePool
from storage_pool.process import SystemRunner
from storage_pool.testing.lvm import attached, local_lvm
from storage_pool.thin import ThinPolicy
from storage_pool.volume import VolumeSpec, create_volume, open_image

from .conftest import IO_TIMEOUT_S, sanlock_daemon
from .test_host_process import Host, manager, wait_for

GIB = 1 << 30
ROOT = Path(__file__).parents[2]
WRITER = Path(__file__).parent / "growth_writer.py"


class Volume:
    """A volume in memory that grows some time after it was asked to."""

    def __init__(self, size, delay_s, limit=64 * MiB):
        self.disk = MemoryStorage(bytes(limit))
        self.size = size
        self.delay_s = delay_s
        self.limit = limit
        self.now_s = 0.0
        self.due = []
        self.asked = []
        inner = LinearStorage([Segment(self.disk, 0, size)])
        self.storage = GrowingStorage(
            inner, 32 * MiB, ThinPolicy(4 * MiB, 50), self.ask, self.more, lambda: self.now_s, self.sleep, limit_s=10.0
        )

    def ask(self, size):
        self.asked.append(size)
        self.due.append((self.now_s + self.delay_s, size))

    def sleep(self, seconds):
        self.now_s += seconds

    def more(self, size):
        for when, wanted in self.due:
            if when <= self.now_s:
                self.size = max(self.size, min(wanted, self.limit))
        return [Segment(self.disk, size, self.size - size)] if self.size > size else []


def test_growth_is_asked_for_at_the_watermark_and_nobody_waits():
    volume = Volume(8 * MiB, 0.5)
    for number in range(28):
        volume.storage.write(number * MiB, [bytes([number]) * MiB])
        volume.now_s += 0.6
    assert volume.storage.growth.pauses == 0 and volume.storage.growth.requests == len(volume.asked) > 3
    assert volume.asked == sorted(set(volume.asked))
    out = bytearray(28 * MiB)
    volume.storage.read_into(0, [out])
    assert all(out[number * MiB] == number for number in range(28))


def test_writer_that_is_faster_waits_and_loses_nothing():
    volume = Volume(8 * MiB, 2.0)
    for number in range(28):
        volume.storage.write(number * MiB, [bytes([number]) * MiB])
    growth = volume.storage.growth
    assert growth.pauses > 0 and 1.0 < growth.longest_pause_s < 3.0
    out = bytearray(28 * MiB)
    volume.storage.read_into(0, [out])
    assert all(out[number * MiB] == number for number in range(28))


def test_volume_that_does_not_grow_is_full_and_nothing_is_written():
    volume = Volume(8 * MiB, 1e9)
    with pytest.raises(StorageError) as caught:
        volume.storage.write(8 * MiB - 4096, [b"x" * 8192])
    assert caught.value.errno == 28
    out = bytearray(4096)
    volume.storage.read_into(8 * MiB - 4096, [out])
    assert not any(out)


def test_disk_has_an_end():
    volume = Volume(8 * MiB, 0.0)
    with pytest.raises(StorageError):
        volume.storage.write(60 * MiB, [b"x"])
    assert volume.asked == []


def told(growth):
    """Return the figures of a writer in words."""
    parts = [f"{growth['requests']} requests, {growth['pauses']} waits, the longest {growth['longest_pause_s']:.2f} s"]
    for name in ("extended_s", "refreshed_s"):
        times = growth[name]
        if times:
            least, middle, most = min(times), statistics.median(times), max(times)
            parts.append(f"{name.removesuffix('_s')} after {least:.2f} / {middle:.2f} / {most:.2f} s")
    return f"{', '.join(parts)}, {growth['seconds']:.1f} s in all"


# -- two hosts, a real group -------------------------------------------------------


@pytest.mark.real("lvm", "losetup", "sanlock")
@pytest.mark.bare
@pytest.mark.parametrize(
    ("chunk_mib", "percent", "total"),
    [(128, 50, 600), (1024, 50, 1500), (640, 20, 1500)],
    ids=["small chunks", "the reference's setting", "today's setting, a quarter of it"],
)
def test_writer_at_full_speed_never_runs_out(tmp_path, run_dirs, chunk_mib, percent, total):
    """The volume begins with one chunk; the figures are printed (``-s``) for docs/spm.md."""
    lun = tmp_path / "lun"
    lun.touch()
    os.truncate(lun, 40 * GIB)
    with contextlib.ExitStack() as stack:
        # Each host has a device of its own on the same storage.
        devices = [stack.enter_context(attached([lun]))[0] for _ in range(3)]
        lvm = local_lvm(tmp_path / "host0", [devices[0]])
        uuid = make_id()
        with FileToken(str(tmp_path / "lock")) as token:
            domain = create_block_domain(token, lvm, SystemRunner(), uuid, [devices[0]], version=5, ctime=1)
            StoragePool.create(token, make_id(), "pool", domain)
            with domain.special("ids", writable=True) as ids:
                ids.write(0, [lockspace_area(uuid, io_timeout_s=IO_TIMEOUT_S)])
                ids.flush()
            spec = VolumeSpec(make_id(), make_id(), 2 * GIB, format="COW", initial_size=chunk_mib * MiB)
            create_volume(token, domain, spec, ctime=1)
        hosts = []
        for number in (1, 2):
            local_lvm(tmp_path / f"host{number}", [devices[number]])
            run_dir = run_dirs()
            stack.enter_context(sanlock_daemon(run_dir, f"host{number}"))
            words = ["--place", tmp_path, "--device", devices[number], "--sanlock-run-dir", run_dir]
            words += ["--io-timeout", IO_TIMEOUT_S, "--contend"]
            environment = {
                "LVM_SYSTEM_DIR": str(tmp_path / f"host{number}/lvm"),
                "QPOOL_LVM_LOCKING_DIR": str(tmp_path / f"host{number}/lock"),
            }
            hosts.append(Host(stack, tmp_path, uuid, number, *words, environment=environment))
        first = wait_for(lambda: manager(hosts), 60, hosts)
        (other,) = [host for host in hosts if host is not first]
        wait_for(lambda: other.lines() and other.lines()[-1]["lockspace"] == "joined", 60, hosts)
        number = other.number
        command = [sys.executable, WRITER, tmp_path / f"host{number}", devices[number], uuid, spec.volume, other.socket]
        done = subprocess.run(
            [str(word) for word in (*command, total, chunk_mib, percent)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )
        assert done.returncode == 0, done.stderr + "".join(host.output.read_text() for host in hosts)
        growth = json.loads(done.stdout)
        assert growth["requests"] >= 1 and len(growth["refreshed_s"]) >= 1
        print(f"\n{chunk_mib} MiB, {percent} %: {told(growth)}")
        fresh = BlockDomain.open(local_lvm(tmp_path / "host0", [devices[0]]), uuid)
        assert fresh.size_of(spec.volume) >= total * MiB
        with open_image(fresh, spec.volume) as image:
            for number in (0, 1, 127, 128, 255, 256, total - 1):
                assert image.pread(8, number * MiB) == number.to_bytes(8, "big")
            assert image.check().clean
        # The manager of a pool on a volume group is killed too, and the other host follows.
        first.process.kill()
        wait_for(lambda: manager([other]), 90, hosts)
        assert other.lines()[-1]["lver"] == 2
        assert check_domain(fresh).clean
