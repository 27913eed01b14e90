# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Real daemons as hosts on a real pool: whatever happens to the manager, one at a time, and another follows.

Death of a host takes the daemon 68 seconds at its shortest, so all faults
run side by side, each on a pool of its own.
"""

import contextlib
import fcntl
import functools
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spm.timing import ElectionTiming, LeaseTiming
from storage_pool.block_domain import BlockDomain
from storage_pool.block_group import create_block_domain
from storage_pool.check import check_domain
from storage_pool.embedded import FileToken
from storage_pool.file_domain import FileDomain
from storage_pool.ids import make_id
from storage_pool.lease_records import lockspace_area, parse_leader, write_area
from storage_pool.pool import StoragePool
from storage_pool.process import SystemRunner
from storage_pool.testing.lvm import attached, local_lvm, loop_devices

from .conftest import IO_TIMEOUT_S, MIB, sanlock_daemon

pytestmark = [
    pytest.mark.real("sanlock", "lvm", "losetup", "mke2fs", "bindfs"),
    pytest.mark.bare,
    pytest.mark.timeout(600),
]

TIMING = LeaseTiming(io_timeout_s=float(IO_TIMEOUT_S))
ROUND_S = ElectionTiming().round_s
LOOP_SET_STATUS64 = 0x4C04
LOOP_GET_STATUS64 = 0x4C05
PROGRAM = Path(__file__).parent / "failover_host.py"


class Host:
    """A daemon and the process of a host; its output goes to a file."""

    def __init__(self, stack, pool, run_dir, number):
        self.number = number
        self.pool = pool
        self.daemon = stack.enter_context(sanlock_daemon(run_dir, f"host{number}"))
        self.output = run_dir / "host.output"
        #: What this host alone reaches the storage through: a loop device, or the process of a file system.
        self.path, master, words, variables = pool.of_host(stack, run_dir)
        with open(self.output, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, PROGRAM, run_dir, str(number), master, pool.journal, *words],
                stdout=output,
                stderr=output,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **variables},
            )
        stack.callback(self.process.wait)
        stack.callback(self.process.kill)
        # What waits for storage that stands still cannot be ended before it.
        stack.callback(pool.cut_off, self)

    def said(self):
        return self.output.read_text().splitlines()


class Pool:
    """A domain that is a pool, with hosts."""

    def __init__(self, folder):
        self.journal = folder / "journal"
        self.folder = folder
        self.hosts = []

    def start(self, stack, run_dirs, count=3):
        self.hosts = [Host(stack, self, run_dirs(), number) for number in range(1, count + 1)]

    def cut_off(self, host):
        """End what serves this host alone."""

    def manager(self):
        """Return the host that says it manages the pool."""
        for host in self.hosts:
            said = host.said()
            if said and said[-1].startswith("spm"):
                return host
        return None

    def changes(self):
        """Return (clock, epoch, pid) of each change, in order."""
        rows = (line.split() for line in self.journal.read_text().splitlines()) if self.journal.exists() else ()
        return [(float(when), int(epoch), int(pid)) for when, epoch, pid in rows]

    def helped(self):
        """Return (clock, epoch) of each sign of life of a helper program."""
        lines = Path(f"{self.journal}.helper").read_text().splitlines()
        return [(float(when), int(epoch)) for when, epoch in (line.split() for line in lines)]

    def epochs(self):
        return [epoch for _, epoch, _ in self.changes()]


class FilePool(Pool):
    """On a directory; if asked on a small file system of its own, or with a mount of its own for each host."""

    def __init__(self, stack, folder, *, own_file_system=False, own_mounts=False):
        super().__init__(folder)
        self.own_mounts = own_mounts
        self.root = folder / "root"
        self.root.mkdir(parents=True)
        if own_file_system:
            image = folder / "image"
            with image.open("xb") as file:
                file.truncate(48 * MIB)
            subprocess.run(["mke2fs", "-q", "-t", "ext4", "-b", "4096", "-O", "^has_journal", image], check=True)
            subprocess.run(["mount", "-o", "loop", image, self.root], check=True)
            stack.callback(subprocess.run, ["umount", "--lazy", self.root], check=True)
        self.uuid = make_id()
        with FileToken(str(folder / "lock")) as token:
            domain = FileDomain.create(
                token, str(self.root), self.uuid, version=5, storage_type="NFS", remote_path="server:/x", ctime=1
            )
            StoragePool.create(token, make_id(), "pool", domain)
            domain.close()
        self.ids = self.root / self.uuid / "dom_md/ids"
        self.ids.write_bytes(lockspace_area(self.uuid, io_timeout_s=IO_TIMEOUT_S))

    def of_host(self, stack, run_dir):
        if not self.own_mounts:
            return None, self.root / self.uuid, [], {}
        seen = run_dir / "root"
        seen.mkdir()
        options = "direct_io,attr_timeout=0,entry_timeout=0,negative_timeout=0"
        server = subprocess.Popen(["bindfs", "-f", "--forward-odirect=512", "-o", options, self.root, seen])
        stack.callback(subprocess.run, ["umount", "--lazy", seen], check=True)
        stack.callback(server.wait)
        stack.callback(server.kill)
        wait_for(seen.is_mount, 30)
        return server, seen / self.uuid, [], {}

    def cut_off(self, host):
        if host.path is not None:
            host.path.kill()

    @contextlib.contextmanager
    def opened(self):
        domain = FileDomain.open(str(self.root / self.uuid))
        try:
            yield domain
        finally:
            domain.close()


class BlockPool(Pool):
    """On a volume group, which each host sees through a loop device of its own."""

    def __init__(self, stack, folder):
        super().__init__(folder)
        folder.mkdir()
        self.disk = folder / "lun0"
        self.master = make_id()
        self.devices = stack.enter_context(loop_devices(folder, 24 << 30))
        self.lvm = local_lvm(folder / "maker", self.devices)
        with FileToken(str(folder / "lock")) as token:
            create_block_domain(token, self.lvm, SystemRunner(), self.master, self.devices, version=5, ctime=1)
            with contextlib.closing(BlockDomain.open(self.lvm, self.master)) as domain:
                StoragePool.create(token, make_id(), "pool", domain)
                with domain.special("ids", writable=True) as ids:
                    write_area(ids, 0, lockspace_area(self.master, io_timeout_s=IO_TIMEOUT_S))
                    ids.flush()

    def of_host(self, stack, run_dir):
        (device,) = stack.enter_context(attached([self.disk]))
        local_lvm(run_dir / "host", [device])
        variables = {"LVM_SYSTEM_DIR": run_dir / "host/lvm", "QPOOL_LVM_LOCKING_DIR": run_dir / "host/lock"}
        return device, self.master, [device], variables

    def stored_order(self):
        """Every version of the group's metadata is still in LVM's ring on the disk, with its number."""
        with open(self.disk, "rb") as disk:
            ring = disk.read(160 << 20)
        found = re.findall(rb'seqno = (\d+)\n[^\0]*?MDT_DESCRIPTION=change&32&\d+&32&of&32&(\d+)"', ring)
        return [int(epoch) for _, epoch in sorted(found, key=lambda row: int(row[0]))]

    def opened(self):
        return contextlib.closing(BlockDomain.open(self.lvm, self.master))


def clock_s():
    """Return the clock of the hosts' journals."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def wait_for(what, limit_s, name=""):
    end = time.monotonic() + limit_s
    while not what():
        if time.monotonic() > end:
            raise TimeoutError(f"{name}: not within {limit_s} s")
        time.sleep(0.1)


def kill_process(host):
    host.process.kill()


def kill_daemon(host):
    host.daemon.kill()


def stop_daemon(host):
    host.daemon.send_signal(signal.SIGSTOP)


def stop_both(host):
    host.daemon.send_signal(signal.SIGSTOP)
    host.process.send_signal(signal.SIGSTOP)


def continue_both(host):
    """The process goes on before its daemon can notice anything."""
    host.process.send_signal(signal.SIGCONT)
    time.sleep(0.5)
    host.daemon.send_signal(signal.SIGCONT)


def nothing(host):
    """The host stays as it is."""


def lose_disk(host):
    """The host's own path to the disk ends before the first extent: every access fails, nobody else's does."""
    with open(host.path, "rb") as device:
        status = bytearray(232)
        fcntl.ioctl(device, LOOP_GET_STATUS64, status)
        status[32:40] = (1 << 20).to_bytes(8, "little")
        fcntl.ioctl(device, LOOP_SET_STATUS64, bytes(status))


def lose_mount(host):
    """Every access of the host fails at once, also through what is open."""
    host.path.kill()


def hang_mount(host):
    """No access of the host returns."""
    host.path.send_signal(signal.SIGSTOP)


def fill_disk_and_kill(host):
    """Nobody can change the pool, nor store the epoch of a new term, until there is room again."""
    root = host.pool.root

    def failing(hosts):
        with contextlib.suppress(OSError), open(root / "filler", "ab", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
        return any("No space left" in line for one in hosts for line in one.said())

    wait_for(lambda: failing([host]), 60, "manager on a full disk")
    renewed = parse_leader(host.pool.ids.read_bytes()[(host.number - 1) * 512 :]).timestamp
    wait_for(lambda: parse_leader(host.pool.ids.read_bytes()[(host.number - 1) * 512 :]).timestamp > renewed, 60)
    assert host.pool.manager() is host
    host.process.kill()
    wait_for(lambda: failing([other for other in host.pool.hosts if other is not host]), 60, "others on a full disk")
    (root / "filler").unlink()


def damage_record(host):
    """The checksum of the host's own record in the lockspace becomes wrong, and stays so."""
    with open(host.pool.ids, "r+b", buffering=0) as ids:
        end_s = clock_s() + 2 * TIMING.renewal_s
        while clock_s() < end_s:
            # A renewal that is just under way may write the record as it was.
            record = os.pread(ids.fileno(), 512, (host.number - 1) * 512)
            if parse_leader(record).valid:
                os.pwrite(ids.fileno(), bytes([record[168] ^ 0xFF]), (host.number - 1) * 512 + 168)
            time.sleep(0.2)


MountedPool = functools.partial(FilePool, own_mounts=True)
FAULTS = {
    "process killed": (FilePool, kill_process, nothing),
    "daemon killed": (FilePool, kill_daemon, nothing),
    "daemon stopped": (FilePool, stop_daemon, nothing),
    "both stopped, process continued first": (FilePool, stop_both, continue_both),
    "storage unreadable": (MountedPool, lose_mount, nothing),
    "storage hangs, then is gone": (MountedPool, hang_mount, lose_mount),
    "wrong checksum in ids": (FilePool, damage_record, nothing),
    "disk full": (functools.partial(FilePool, own_file_system=True), fill_disk_and_kill, nothing),
    "block, process killed": (BlockPool, kill_process, nothing),
    "block, both stopped, process continued first": (BlockPool, stop_both, continue_both),
    "block, storage unreadable": (BlockPool, lose_disk, nothing),
}


@pytest.fixture(scope="module")
def histories(tmp_path_factory, run_dirs):
    """Do all faults at once; give by name the pool, the manager that met it and the clock when it did."""
    folder = tmp_path_factory.mktemp("failover")
    with contextlib.ExitStack() as stack:
        pools = {name: kind(stack, folder / str(number)) for number, (name, (kind, _, _)) in enumerate(FAULTS.items())}
        for pool in pools.values():
            pool.start(stack, run_dirs)
        for name, pool in pools.items():
            wait_for(lambda pool=pool: pool.manager() is not None and len(pool.epochs()) > 5, 120, name)
            wait_for(lambda pool=pool: all(host.said() for host in pool.hosts), 120, name)
        met = {}
        for name, (_, fault, _) in FAULTS.items():
            victim = pools[name].manager()
            met[name] = victim, clock_s()
            fault(victim)
        limit_s = TIMING.death_s + TIMING.landing_s + 60
        for name, pool in pools.items():
            wait_for(lambda pool=pool: max(pool.epochs()) > 1, limit_s, name)
        for name, (_, _, end) in FAULTS.items():
            end(met[name][0])
        for name, pool in pools.items():
            more = len(pool.epochs()) + 20
            wait_for(lambda pool=pool, more=more: len(pool.epochs()) >= more, 120, name)
        yield {name: (pool, *met[name]) for name, pool in pools.items()}


@pytest.mark.parametrize("name", FAULTS)
def test_s1_changes_of_two_managers_never_mix(histories, name):
    pool, _, _ = histories[name]
    # Each manager finds its own last change stored; a stopped one may end late, but not change anything then.
    assert not [line for host in pool.hosts for line in host.said() if line.startswith("overwritten")]
    if isinstance(pool, BlockPool):
        order = pool.stored_order()
        assert order == sorted(order) and len(set(order)) > 1
    terms = {}
    for when_s, epoch, pid in pool.changes():
        terms.setdefault(epoch, []).append((when_s, pid))
    assert all(len({pid for _, pid in term}) == 1 for term in terms.values())
    # By the clock that all processes of this machine share, too, each term ends before the next begins.
    ends = [(min(term)[0], max(term)[0]) for _, term in sorted(terms.items())]
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ends))


@pytest.mark.parametrize("name", FAULTS)
def test_s2_helper_programs_end_before_another_manager_begins(histories, name):
    pool, _, _ = histories[name]
    begins = {}
    for when_s, epoch, _ in pool.changes():
        begins.setdefault(epoch, when_s)
    last = {}
    for when_s, epoch in pool.helped():
        last[epoch] = when_s
    assert 1 in last
    assert all(last[epoch] <= begin for epoch in last for later, begin in begins.items() if later > epoch)


@pytest.mark.parametrize("name", FAULTS)
def test_s6_another_host_took_over_in_time(histories, name):
    pool, victim, fault_s = histories[name]
    pids = [pid for _, _, pid in pool.changes()]
    assert pids[0] == victim.process.pid != pids[-1]
    first_s = next(when_s for when_s, epoch, _ in pool.changes() if epoch > 1)
    # The last renewal was before the fault.
    assert first_s - fault_s < TIMING.death_s + TIMING.landing_s + ROUND_S


@pytest.mark.parametrize("name", FAULTS)
def test_structure_is_intact_after_the_failover(histories, name):
    pool, _, _ = histories[name]
    with pool.opened() as domain:
        assert domain.metadata.spm_lver >= pool.epochs()[-1]
        assert domain.metadata.role == "Master"
        # Where the lease was given back in time nobody needs the damaged record before its host joins again.
        allowed = {"ids"} if name == "wrong checksum in ids" else set()
        assert {finding.volume for finding in check_domain(domain).findings} <= allowed


@pytest.mark.parametrize("name", ["daemon killed", "storage unreadable", "block, storage unreadable"])
def test_s2_manager_without_daemon_or_storage_stops_by_itself(histories, name):
    _, victim, _ = histories[name]
    assert any(line.startswith("lost") for line in victim.said()) or victim.process.poll() is not None


@pytest.mark.parametrize("name", ["daemon stopped", "storage hangs, then is gone"])
def test_s2_manager_whose_daemon_or_storage_stands_still_ends(histories, name):
    _, victim, _ = histories[name]
    assert any(line.startswith("lost") for line in victim.said()) or victim.process.poll() is not None
