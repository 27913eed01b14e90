# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Managers killed at every change that they record, each followed by one that takes the role and ends the work.

Each manager is a process with the pool's lease (local locks; the last test
has lease daemons): it starts as a host does,
with the recovery of what was left, and dies by SIGKILL in the middle of one
operation.  By default a part of the steps is tried; ``./run crash`` tries all,
and kills the manager that recovers as well.

Invariant: S5.
"""

import contextlib
import functools
import itertools
import os
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import storage_pool
from qcowlib.errors import StorageError
from qcowlib.storage.file import FileStorage
from spm.cli.endpoint import ask
from storage_pool.check import check_domain
from storage_pool.embedded import FileToken
from storage_pool.image_group import ImageGroup
from storage_pool.testing.killing import die_at_record, killed_child

from . import test_host_process
from .conftest import IO_TIMEOUT_S, sanlock_daemon
from .pools import block_pool, file_pool
from .test_host_process import Host, make_pool, manager, wait_for

LONG = int(os.environ.get("QCOWLIB_LONG", "1")) > 1
MIB = 1 << 20
SIZE = 128 * MIB
PLACES = (0, 5 * MIB, 77 * MIB, SIZE - 512)

pytestmark = [pytest.mark.crash, pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")]


class Work(NamedTuple):
    """An operation: *act* gets the disk, another domain, and what *prepare* returned.

    *old* and *new* are the lengths of all chains before and after, here and
    in the other domain; with *looks* a chain of two is of a preview.
    """

    act: object
    old: tuple
    new: tuple
    prepare: object = lambda disk: disk.snapshots[-1]
    looks: bool = False


def previewed(disk):
    return disk.preview(disk.snapshots[-1])


WORKS = {
    "a snapshot": Work(lambda disk, other, first: disk.snapshot(), ([3], []), ([4], [])),
    "a preview": Work(lambda disk, other, first: disk.preview(first), ([3], []), ([2, 3], []), looks=True),
    "the end of a preview": Work(lambda disk, other, look: disk.undo(look), ([2, 3], []), ([3], []), previewed, True),
    "the commit of a preview": Work(
        lambda disk, other, look: disk.commit(look), ([2, 3], []), ([2], []), previewed, True
    ),
    "a merge": Work(lambda disk, other, first: disk.delete_snapshot(first), ([3], []), ([2], [])),
    "a merge by renames": Work(
        lambda disk, other, first: disk.delete_snapshot(first, by_renames=True), ([3], []), ([2], [])
    ),
    "a copy": Work(lambda disk, other, first: disk.copy(), ([3], []), ([3, 3], [])),
    "a move": Work(lambda disk, other, first: disk.move(other), ([3], []), ([], [3])),
    "a template": Work(lambda disk, other, first: disk.make_template(), ([3], []), ([1, 3], [])),
    "a removal": Work(lambda disk, other, first: disk.remove(), ([3], []), ([], [])),
}


@pytest.fixture(autouse=True)
def nothing_is_made_durable(monkeypatch):
    """The system keeps what a killed process wrote, so waiting for disks would prove nothing here."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(FileStorage, "flush", lambda self: None)


def sample(name, every):
    """Return the steps at which a manager is killed: all in the long run, else some, others for each operation."""
    return itertools.count(0) if LONG else itertools.count(sorted(WORKS).index(name) % every, every)


def make_disk(domain):
    """Make a disk of three volumes; returns it."""
    disk = domain.create_disk(SIZE)
    for number in range(3):
        if number:
            disk.snapshot()
        with disk.open("r+") as image:
            image.pwrite(b"volume %d" % number, PLACES[number])
    return disk


def second_member(engine):
    """Make another domain of the pool; returns its UUID."""
    made = engine.create_domain("other")
    pool = engine.pool()
    pool.attach(made)
    pool.activate(made)
    return made.uuid


def reads(disk, leaf):
    with disk.open(volume_id=leaf) as image:
        return [image.pread(8, place) for place in PLACES]


#: What a chain reads as, by its length: a preview shows the first volume alone.
FIRST = [b"volume 0", *[bytes(8)] * 3]
WHOLE = [b"volume 0", b"volume 1", b"volume 2", bytes(8)]


def chains(domain):
    """Return length of each chain of a domain and what it reads as."""
    domain.refresh()
    groups = [(disk, ImageGroup.load(domain.domain, disk.image)) for disk in domain.disks()]
    return [(len(group.chain(leaf)), reads(disk, leaf)) for disk, group in groups for leaf in group.leaves()]


def lengths(found):
    return [sorted(length for length, _ in chains) for chains in found]


@contextlib.contextmanager
def looking(pool, *domains):
    """Give the domains to somebody who prepares or looks, while no manager is there."""
    with pool.token() as token, pool.engine(token) as engine:
        yield [engine.domain(uuid) for uuid in domains]


def clean_up(domain):
    for disk in domain.disks():
        disk.remove()
    assert check_domain(domain.domain).clean and not domain.domain.entries()


def killed(pool, number, work, at):
    """Have a manager, a process, do *work* and die before change number *at* is recorded; returns whether it did."""

    def live(engine):
        die_at_record(at)
        work(engine)

    return killed_child(None, lambda: pool.manage(number, live))


def take_over(pool, step):
    """Have another process take the role and recover; in the long run one before it dies while it does."""
    if LONG:

        def die():
            die_at_record(step % 7)
            pool.manage(3)

        killed_child(None, die)

    def recover():
        pool.manage(4)
        assert not pool.told, pool.told

    assert not killed_child(None, recover)


def every_step(pool, work, home, other, steps):
    """Kill a manager at each of *steps* of *work*; returns how often it was killed."""
    for step in steps:
        with looking(pool, home) as (domain,):
            disk = make_disk(domain)
            prepared = work.prepare(disk)

        def act(engine, image=disk.image, prepared=prepared):
            work.act(engine.domain(home).disk(image), engine.domain(other), prepared)

        died = killed(pool, 2, act, step)
        take_over(pool, step)
        with looking(pool, home, other) as domains:
            assert all(check_domain(domain.domain).clean for domain in domains), step
            found = [chains(domain) for domain in domains]
            shape = tuple(lengths(found))
            assert shape == work.new or (died and shape == work.old), (step, shape)
            for length, content in itertools.chain(*found):
                assert content == (FIRST if work.looks and length == 2 else WHOLE), (step, length)
            for domain in domains:
                clean_up(domain)
        if not died:
            return


@pytest.mark.parametrize("name", WORKS)
def test_s5_a_manager_of_a_file_pool_killed_at_every_record(tmp_path, name):
    with file_pool(tmp_path) as pool:
        with pool.token() as token, pool.engine(token) as engine:
            other = second_member(engine)
        with contextlib.closing(pool.open_master()) as master:
            home = master.uuid
        every_step(pool, WORKS[name], home, other, sample(name, 5))


@pytest.mark.real("lvm", "losetup", "mke2fs")
@pytest.mark.parametrize("name", WORKS if LONG else ["a merge", "a merge by renames", "a move", "a template"])
def test_s5_a_manager_of_a_pool_on_a_volume_group_killed_at_every_record(tmp_path, name):
    with block_pool(tmp_path) as pool:
        with pool.token() as token, pool.engine(token) as engine:
            other = second_member(engine)
        with contextlib.closing(pool.open_master()) as master:
            home = master.uuid
        # A command of LVM takes 50 ms: by default one step in the middle.
        every_step(pool, WORKS[name], home, other, sample(name, 5) if LONG else [3])


@pytest.mark.parametrize(("start", "end"), [(0, 3), (3, 5)])
def test_s5_a_manager_killed_at_every_record_of_an_upgrade(tmp_path, start, end):
    """The next one finds a domain of one version or the other, and ends what is asked for again."""
    with file_pool(tmp_path) as pool:
        for step in itertools.count(0, 1 if LONG else 3):
            with pool.token() as token, pool.engine(token) as engine:
                domain = engine.create_domain(f"old{step}", version=start)
                uuid, image = domain.uuid, make_disk(domain).image

            def upgrade(engine, uuid=uuid):
                engine.domain(uuid).upgrade(end)

            died = killed(pool, 2, upgrade, step)
            take_over(pool, step)
            with looking(pool, uuid) as (domain,):
                assert domain.version in ((start, 4, end) if died else (end,))
                assert check_domain(domain.domain).clean and chains(domain) == [(3, WHOLE)]
            assert not killed_child(None, functools.partial(pool.manage, 5, upgrade))
            with looking(pool, uuid) as (domain,):
                assert domain.version == end
                assert check_domain(domain.domain).clean and chains(domain) == [(3, WHOLE)]
                assert domain.disk(image).chain
                domain.destroy()
            if not died:
                break
        assert step > 2


@pytest.mark.bare
@pytest.mark.real("sanlock")
def test_s5_hosts_with_daemons_end_what_the_other_was_killed_in(tmp_path, run_dirs, monkeypatch):
    """Whoever manages the pool dies while it deletes a snapshot; the other ends that, and dies while it takes one."""
    master = make_pool(tmp_path, "NFS")
    uuid = master.name
    with contextlib.ExitStack() as stack:
        with FileToken(str(tmp_path / "lock")) as token, storage_pool.connect(tmp_path, token=token) as engine:
            disk = make_disk(engine.domain(uuid))
            image, taken = disk.image, disk.snapshots[0]
        daemons = []
        for name in ("host1", "host2"):
            daemons.append(run_dirs())
            stack.enter_context(sanlock_daemon(daemons[-1], name))
        monkeypatch.setattr(
            test_host_process, "QPOOL", [sys.executable, str(Path(__file__).with_name("killed_host.py"))]
        )

        def start(number, at):
            words = ("--contend", "--sanlock-run-dir", daemons[number - 1], "--io-timeout", IO_TIMEOUT_S)
            return Host(stack, tmp_path, master, number, *words, environment={"KILL_AT": str(at)})

        def dies_in(host, *words):
            wait_for(lambda: host.role() == "SPM", 120, [host])
            with pytest.raises(StorageError, match="no host answers"):
                pytest.fail(str(ask(host.socket, "/run", {"argv": list(words)})))
            assert host.process.wait(30) == -9

        def look(*possible):
            with storage_pool.connect(tmp_path) as engine:
                found = chains(engine.domain(uuid))
                assert found in [[(length, WHOLE)] for length in possible]
                assert check_domain(engine.domain(uuid).domain).clean

        hosts = [start(1, 2), start(2, 2)]
        first = wait_for(lambda: manager(hosts), 120, hosts)
        second = hosts[2 - first.number]
        dies_in(first, "snapshot", "delete", str(master), image, taken)
        wait_for(lambda: second.role() == "SPM", 120, hosts)
        look(2, 3)
        dies_in(second, "snapshot", "create", str(master), image)
        third = start(first.number, 1 << 30)
        wait_for(lambda: third.role() == "SPM", 120, [third])
        look(2, 3, 4)
        third.process.terminate()
        assert third.process.wait(60) == 0
        assert [max(line["lver"] for line in host.lines()) for host in (second, third)] == [2, 3]
