# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What a new manager does first, on real pools: tasks that were stored and operations that were cut are ended."""

import contextlib
import os
import subprocess
import time
from pathlib import Path

import pytest

from spm.cli.place import pool_lease
from spm.duties import PoolDuties
from spm.embedded import EmbeddedLeases
from spm.service import SpmHost, SpmService
from spm.tasks import Recovery, TaskManager, TaskStore
from spm.terms import MasterTerms
from spm.timing import LeaseTiming
from storage_pool import block_group
from storage_pool import merge as mg
from storage_pool import snapshot as sn
from storage_pool import volume as vol
from storage_pool.check import check_domain
from storage_pool.embedded import FileToken
from storage_pool.engine import connect
from storage_pool.file_domain import FileDomain
from storage_pool.ids import make_id
from storage_pool.lv_storage import volume_device
from storage_pool.master_files import master_files
from storage_pool.pool import StoragePool
from storage_pool.process import SystemRunner
from storage_pool.testing.killing import Killed, KillingDomain, killed_child
from storage_pool.testing.lvm import local_lvm, loop_devices

GIB = 1 << 30
MIB = 1 << 20
CTIME = 1617235200
TIMING = LeaseTiming(io_timeout_s=1.0)

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def panic(reason):
    raise AssertionError(reason)


class Pool:
    """A pool, and the ways to its domains that a host has."""

    def __init__(self, folder, open_master, open_engine):
        self.folder = folder
        self.open_master = open_master
        self.open_engine = open_engine
        self.told = []
        self.undone = []

    def manager(self, number=2):
        """Return the service of a host that is about to become the manager."""
        with contextlib.closing(self.open_master()) as master:
            area, lease = pool_lease(master)
        leases = EmbeddedLeases(str(self.folder), time.monotonic, time.sleep)
        leases.join(lease.lockspace, number, area)
        host = SpmHost(number, leases, TIMING, time.monotonic, time.sleep, panic)
        duties = PoolDuties(
            self.open_master,
            self.open_engine,
            self.told.append,
            undo={"note": lambda token, params: self.undone.append(params)},
            hosts=4,
        )
        return SpmService(host, lease, MasterTerms(self.open_master), duties.steps())

    def lead(self):
        """Have a host take the role and give it back."""
        service = self.manager()
        service.start()
        service.stop()


@pytest.fixture
def file_pool(tmp_path):
    with FileToken(str(tmp_path / "lock")) as token:
        made = FileDomain.create(
            token, str(tmp_path), make_id(), version=5, storage_type="LOCALFS", remote_path="/x", ctime=CTIME
        )
        StoragePool.create(token, make_id(), "pool", made)
        made.close()
    return Pool(
        tmp_path,
        lambda: FileDomain.open(made.name),
        lambda token: connect(tmp_path, token=token, lvm=local_lvm(tmp_path / "host", [])),
    )


@pytest.fixture
def block_pool(tmp_path):
    with loop_devices(tmp_path, 24 * GIB) as devices:
        lvm = local_lvm(tmp_path / "host", devices)
        uuid = make_id()
        with FileToken(str(tmp_path / "lock")) as token:
            domain = block_group.create_block_domain(token, lvm, SystemRunner(), uuid, devices, version=5, ctime=CTIME)
            StoragePool.create(token, make_id(), "pool", domain)
        with volume_device(lvm, SystemRunner(), domain.state, "master") as device:
            subprocess.run(["debugfs", "-w", "-R", "mkdir tasks", device], check=True, capture_output=True)
        made = Pool(
            tmp_path,
            lambda: block_group.BlockDomain.open(lvm, uuid),
            lambda token: connect(tmp_path, token=token, lvm=lvm),
        )
        made.devices = devices
        yield made


@pytest.fixture(params=["file", pytest.param("block", marks=pytest.mark.real("lvm", "losetup", "mke2fs"))])
def pool(request):
    return request.getfixturevalue(f"{request.param}_pool")


def tasks_of(pool):
    with (
        FileToken(str(pool.folder / "lock")) as token,
        contextlib.closing(pool.open_master()) as master,
        master_files(token, master, "tasks") as root,
    ):
        return root.names()


def begin_task(pool):
    """Store a task and die in it; to be called in a process of its own."""
    with (
        FileToken(str(pool.folder / "lock")) as token,
        contextlib.closing(pool.open_master()) as master,
        master_files(token, master, "tasks") as root,
        TaskManager(TaskStore(root), {}).task(token, "create") as task,
    ):
        for number in range(2):
            task.push(Recovery("step", "m", "o", "note", (str(number),)))
        os.kill(os.getpid(), 9)


def loops():
    """Return the loop devices by what they are on."""
    done = subprocess.run(["losetup", "--list", "--noheadings", "--output", "BACK-FILE,NAME"], capture_output=True)
    return dict(line.rsplit(maxsplit=1) for line in done.stdout.decode().splitlines())


def cut_merge(pool):
    """Leave a merge in the middle; returns the image and what it reads as."""
    with FileToken(str(pool.folder / "lock")) as token, contextlib.closing(pool.open_master()) as master:
        image, base = make_id(), make_id()
        vol.create_volume(token, master, vol.VolumeSpec(image, base, 128 * MIB), CTIME)
        leaf = sn.create_snapshot(token, master, image, ctime=CTIME)
        with vol.open_image(master, leaf, writable=True) as opened:
            opened.pwrite(b"hello", 5 * MIB)
        with pytest.raises(Killed):
            mg.merge(token, KillingDomain(master, 3), image, leaf)
        master.refresh()
        assert master.notes()
        return base


def test_s5_a_new_manager_ends_stored_tasks_and_cut_operations(pool):
    assert killed_child(1 << 30, lambda: begin_task(pool))
    base = cut_merge(pool)
    assert len(tasks_of(pool)) == 1
    pool.lead()
    assert pool.undone == [("1",), ("0",)] and pool.told == []
    assert tasks_of(pool) == []
    with contextlib.closing(pool.open_master()) as master:
        assert check_domain(master).clean and list(master.entries()) == [base]
        with vol.open_image(master, base) as opened:
            assert opened.pread(5, 5 * MIB) == b"hello"


@pytest.mark.real("lvm", "losetup", "mke2fs")
def test_a_master_is_mounted_for_nobody_else_and_for_no_longer_than_its_process(block_pool, tmp_path):
    def hold():
        with (
            FileToken(str(tmp_path / "lock")) as token,
            contextlib.closing(block_pool.open_master()) as master,
            master_files(token, master, "tasks") as root,
        ):
            root.replace("seen", b"durable")
            loop = loops()[block_pool.devices[0]]
            assert loop not in Path("/proc/self/mounts").read_text().split()
            os.kill(os.getpid(), 9)

    assert killed_child(1 << 30, hold)
    assert tasks_of(block_pool) == ["seen"]
    assert not set(block_pool.devices) & set(loops())


@pytest.mark.real("lvm", "losetup", "mke2fs")
def test_a_master_whose_file_system_is_broken_keeps_nobody_from_starting(block_pool, tmp_path):
    base = cut_merge(block_pool)
    with contextlib.closing(block_pool.open_master()) as master, master.special("master", writable=True) as storage:
        storage.zero(0, 64 * MIB)
        storage.flush()
    block_pool.lead()
    assert len(block_pool.told) == 1 and "cannot be mended" in block_pool.told[0]
    with contextlib.closing(block_pool.open_master()) as master:
        assert check_domain(master).clean and list(master.entries()) == [base]
