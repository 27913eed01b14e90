# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Real daemons as hosts on a real pool: whatever happens to the manager, one at a time, and another follows.

Death of a host takes the daemon 68 seconds at its shortest, so all faults of
that kind run side by side, each on a pool of its own.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spm.timing import LeaseTiming
from storage_pool.embedded import FileToken
from storage_pool.file_domain import FileDomain
from storage_pool.ids import make_id
from storage_pool.lease_records import lockspace_area
from storage_pool.pool import StoragePool

from .conftest import IO_TIMEOUT_S, sanlock_daemon

pytestmark = [pytest.mark.real("sanlock"), pytest.mark.bare]

TIMING = LeaseTiming(io_timeout_s=float(IO_TIMEOUT_S))
PROGRAM = Path(__file__).parent / "failover_host.py"


class Host:
    """A daemon and the process of a host; its output goes to a file."""

    def __init__(self, stack, pool, run_dir, number):
        self.daemon = stack.enter_context(sanlock_daemon(run_dir, f"host{number}"))
        self.output = run_dir / "host.output"
        with open(self.output, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, PROGRAM, run_dir, str(number), pool.path, pool.journal],
                stdout=output,
                stderr=output,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            )
        stack.callback(self.process.wait)
        stack.callback(self.process.kill)

    def said(self):
        return self.output.read_text().splitlines()


class Pool:
    """A file domain that is a pool, with hosts."""

    def __init__(self, folder):
        folder.mkdir()
        self.journal = folder / "journal"
        uuid = make_id()
        with FileToken(str(folder / "lock")) as token:
            domain = FileDomain.create(
                token, str(folder), uuid, version=5, storage_type="NFS", remote_path="server:/x", ctime=1
            )
            StoragePool.create(token, make_id(), "pool", domain)
            domain.close()
        self.path = folder / uuid
        (self.path / "dom_md/ids").write_bytes(lockspace_area(uuid, io_timeout_s=IO_TIMEOUT_S))
        self.hosts = []

    def start(self, stack, run_dirs, count=3):
        self.hosts = [Host(stack, self, run_dirs(), number) for number in range(1, count + 1)]

    def manager(self):
        """Return the host that says it manages the pool."""
        for host in self.hosts:
            said = host.said()
            if said and said[-1].startswith("spm"):
                return host
        return None

    def epochs(self):
        return [int(line.split()[1]) for line in self.journal.read_text().splitlines()]


def wait_for(what, limit_s):
    end = time.monotonic() + limit_s
    while not what():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {limit_s} s")
        time.sleep(0.05)


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


FAULTS = {
    "process killed": (kill_process, nothing),
    "daemon killed": (kill_daemon, nothing),
    "daemon stopped": (stop_daemon, nothing),
    "both stopped, process continued first": (stop_both, continue_both),
}


@pytest.fixture(scope="module")
def histories(tmp_path_factory, run_dirs):
    """Do all faults at once; give by name the pool and the manager that met it."""
    folder = tmp_path_factory.mktemp("failover")
    with contextlib.ExitStack() as stack:
        pools = {name: Pool(folder / str(number)) for number, name in enumerate(FAULTS)}
        for pool in pools.values():
            pool.start(stack, run_dirs)
        for pool in pools.values():
            wait_for(lambda pool=pool: pool.manager() is not None and len(pool.epochs()) > 5, 60)
            wait_for(lambda pool=pool: all(host.said() for host in pool.hosts), 60)
        victims = {}
        for name, (fault, _) in FAULTS.items():
            victims[name] = pools[name].manager()
            fault(victims[name])
        limit_s = TIMING.death_s + TIMING.landing_s + 60
        for pool in pools.values():
            wait_for(lambda pool=pool: max(pool.epochs()) > 1 and pool.epochs()[-1] > 1, limit_s)
        for name, (_, end) in FAULTS.items():
            end(victims[name])
        for pool in pools.values():
            more = len(pool.epochs()) + 20
            wait_for(lambda pool=pool, more=more: len(pool.epochs()) >= more, 60)
        yield {name: (pool, victims[name]) for name, pool in pools.items()}


@pytest.mark.parametrize("name", FAULTS)
def test_s1_changes_of_two_managers_never_mix(histories, name):
    pool, _ = histories[name]
    epochs = pool.epochs()
    assert epochs == sorted(epochs)
    writers = {line.split()[1]: set() for line in pool.journal.read_text().splitlines()}
    for line in pool.journal.read_text().splitlines():
        writers[line.split()[1]].add(line.split()[2])
    assert all(len(pids) == 1 for pids in writers.values())


@pytest.mark.parametrize("name", FAULTS)
def test_s6_another_host_took_over(histories, name):
    pool, victim = histories[name]
    assert pool.epochs()[-1] > 1
    pids = [int(line.split()[2]) for line in pool.journal.read_text().splitlines()]
    assert pids[0] == victim.process.pid != pids[-1]


@pytest.mark.parametrize("name", FAULTS)
def test_structure_is_intact_after_the_failover(histories, name):
    pool, _ = histories[name]
    domain = FileDomain.open(str(pool.path))
    try:
        assert domain.metadata.spm_lver >= pool.epochs()[-1]
        assert domain.metadata.role == "Master"
    finally:
        domain.close()


def test_s2_manager_without_its_daemon_stops_by_itself(histories):
    _, victim = histories["daemon killed"]
    assert any(line.startswith("lost") for line in victim.said())


def test_s2_manager_whose_daemon_stands_still_stops_before_another_begins(histories):
    _, victim = histories["daemon stopped"]
    assert any(line.startswith("lost") for line in victim.said()) or victim.process.poll() is not None
