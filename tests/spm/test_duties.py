# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What a new manager does first, on real pools: tasks that were stored and operations that were cut are ended."""

import contextlib
import os
import subprocess
from pathlib import Path

import pytest

from spm.tasks import Recovery, TaskManager, TaskStore
from storage_pool import merge as mg
from storage_pool import snapshot as sn
from storage_pool import volume as vol
from storage_pool.block_group import create_block_domain
from storage_pool.check import check_domain
from storage_pool.embedded import FileToken
from storage_pool.ids import make_id
from storage_pool.master_files import master_files
from storage_pool.process import SystemRunner
from storage_pool.testing.killing import Killed, KillingDomain, killed_child
from storage_pool.testing.lvm import local_lvm, loop_devices

from .pools import CTIME, GIB, block_pool, file_pool
from .test_host_process import wait_for

MIB = 1 << 20

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(params=["file", pytest.param("block", marks=pytest.mark.real("lvm", "losetup", "mke2fs"))])
def pool(request, tmp_path):
    with {"file": file_pool, "block": block_pool}[request.param](tmp_path) as made:
        yield made


@pytest.fixture(name="block_pool")
def only_block_pool(tmp_path):
    with block_pool(tmp_path) as made:
        yield made


def tasks_of(pool):
    with (
        pool.token() as token,
        contextlib.closing(pool.open_master()) as master,
        master_files(token, master, "tasks") as root,
    ):
        return root.names()


def begin_task(pool):
    """Store a task and die in it; to be called in a process of its own."""
    with (
        pool.token() as token,
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
    with pool.token() as token, contextlib.closing(pool.open_master()) as master:
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
    assert killed_child(None, lambda: begin_task(pool))
    base = cut_merge(pool)
    assert len(tasks_of(pool)) == 1
    pool.manage(2)
    assert pool.undone == [("1",), ("0",)] and pool.told == []
    assert tasks_of(pool) == []
    with contextlib.closing(pool.open_master()) as master:
        assert check_domain(master).clean and list(master.entries()) == [base]
        with vol.open_image(master, base) as opened:
            assert opened.pread(5, 5 * MIB) == b"hello"


@pytest.mark.real("lvm", "losetup", "mke2fs")
def test_a_master_is_mounted_for_nobody_else_and_for_no_longer_than_its_process(block_pool):
    def hold():
        with (
            block_pool.token() as token,
            contextlib.closing(block_pool.open_master()) as master,
            master_files(token, master, "tasks") as root,
        ):
            root.replace("seen", b"durable")
            loop = loops()[block_pool.devices[0]]
            assert loop not in Path("/proc/self/mounts").read_text().split()
            os.kill(os.getpid(), 9)

    assert killed_child(None, hold)
    assert tasks_of(block_pool) == ["seen"]
    # The kernel unmounts what a killed process had a little after it is gone.
    wait_for(lambda: not set(block_pool.devices) & set(loops()))


@pytest.mark.real("lvm", "losetup", "mke2fs")
def test_a_master_whose_file_system_is_broken_keeps_nobody_from_starting(block_pool):
    base = cut_merge(block_pool)
    with contextlib.closing(block_pool.open_master()) as master, master.special("master", writable=True) as storage:
        storage.zero(0, 64 * MIB)
        storage.flush()
    block_pool.manage(2)
    assert len(block_pool.told) == 1 and "cannot be mended" in block_pool.told[0]
    with contextlib.closing(block_pool.open_master()) as master:
        assert check_domain(master).clean and list(master.entries()) == [base]


def test_a_manager_leaves_what_another_pool_is_making(block_pool, tmp_path):
    """It looks like something that was cut, and is what the other pool's manager does now."""
    folder = tmp_path / "other"
    folder.mkdir()
    with loop_devices(folder, 24 * GIB) as devices, FileToken(str(folder / "lock")) as token:
        uuid, volume = make_id(), make_id()
        lvm = local_lvm(folder / "host", devices)
        other = create_block_domain(token, lvm, SystemRunner(), uuid, devices, version=5, ctime=CTIME)
        other.allocate(token, make_id(), volume, MIB)
        block_pool.devices.extend(devices)
        seen = []
        block_pool.manage(2, lambda engine: seen.extend(domain.uuid for domain in engine.domains()))
        assert uuid in seen and block_pool.told == []
        other.refresh()
        assert other.entries()[volume].initializing
