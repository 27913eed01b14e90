# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A damaged record of a host id keeps everybody out until it is mended, and it is mended only when its host is dead."""

import contextlib
import os
import threading
import time

import pytest

from spm.errors import LeaseError, LeaseHeld
from spm.host_records import RECORD_SIZE, Damaged, RecordMender, read_sector
from spm.sanlock import SanlockLeases
from spm.timing import LeaseTiming
from storage_pool.ids import make_id
from storage_pool.lease_records import left_host_record, lockspace_area, parse_leader
from storage_pool.leases import Lease, LeaseArea

from .conftest import IO_TIMEOUT_S, MIB, lease_file, library_client, sanlock_daemon

TIMING = LeaseTiming(io_timeout_s=float(IO_TIMEOUT_S))
HOST_ID = 3


class Table:
    """A lockspace in a file, in which the record of a host is damaged, and a clock."""

    def __init__(self, path, block_size, io_timeout_s=IO_TIMEOUT_S):
        self.block_size = block_size
        self.path = path
        self.now_s = 1000.0
        path.write_bytes(lockspace_area("space", block_size=block_size, io_timeout_s=io_timeout_s))
        self.area = LeaseArea(str(path), 0)
        sizes = {"block_size": block_size, "alignment": MIB, "io_timeout_s": io_timeout_s}
        record = bytearray(left_host_record("space", HOST_ID, 4, **sizes))
        record[168] ^= 0xFF
        self.put(bytes(record))

    def put(self, record):
        with open(self.path, "r+b") as file:
            os.pwrite(file.fileno(), record, (HOST_ID - 1) * self.block_size)

    def record(self):
        return read_sector(self.area, (HOST_ID - 1) * self.block_size)

    def mender(self):
        return RecordMender(TIMING, lambda: self.now_s)

    def look(self, mender, *, own=1, late_s=0.0, data=None):
        """Read the record as a host does, and show it to its mender *late_s* after that."""
        read_s = self.now_s
        self.now_s += late_s
        found = Damaged("space", HOST_ID, self.area, self.block_size, MIB, data or self.record(), read_s, 2)
        return mender.look(found, own)

    def look_for(self, mender, seconds, **words):
        """Look again and again; returns how often it was mended."""
        end_s = self.now_s + seconds
        mended = 0
        while self.now_s < end_s and not parse_leader(self.record()).valid:
            mended += self.look(mender, **words)
            self.now_s += 0.5
        return mended


@pytest.fixture(params=[512, 4096])
def table(request, tmp_path):
    return Table(tmp_path / "ids", request.param)


def test_a_record_that_stands_still_for_a_death_is_claimed_then_mended(table):
    before = table.path.read_bytes()
    mender = table.mender()
    assert table.look_for(mender, TIMING.death_s) == 0
    assert table.path.read_bytes() == before
    assert table.look_for(mender, 2 * TIMING.renewal_s) == 1
    leader = parse_leader(table.record())
    assert leader.valid and leader.timestamp == 0
    assert (leader.owner_id, leader.owner_generation) == (HOST_ID, 4)
    # Nothing but the sector of this host was written.
    after = table.path.read_bytes()
    start = (HOST_ID - 1) * table.block_size
    assert after[:start] == before[:start] and after[start + table.block_size :] == before[start + table.block_size :]


def test_a_claim_alone_stays_damaged(table):
    mender = table.mender()
    table.look(mender)
    table.now_s += TIMING.death_s
    before = table.record()
    assert not table.look(mender)
    assert table.record() != before and not parse_leader(table.record()).valid


def test_a_record_that_changes_is_of_a_live_host_and_left(table):
    mender = table.mender()
    for number in range(10):
        damaged = bytearray(table.record())
        damaged[152] = number
        table.put(bytes(damaged))
        assert table.look_for(mender, TIMING.death_s - 1) == 0
        assert table.record() == bytes(damaged)


def test_who_was_paused_between_look_and_write_writes_nothing(table):
    mender = table.mender()
    table.look(mender)
    table.now_s += TIMING.death_s
    before = table.record()
    assert not table.look(mender, late_s=TIMING.gap_s + 0.1)
    assert table.record() == before


def test_of_two_hosts_that_claim_at_once_the_last_one_mends(table):
    one, two = table.mender(), table.mender()
    seen = table.record()
    table.look(one)
    table.look(two, own=2)
    table.now_s += TIMING.death_s
    table.look(one, data=seen)
    table.look(two, own=2, data=seen)
    table.now_s += TIMING.renewal_s
    assert not table.look(one)
    assert table.look(two, own=2)


def test_the_death_of_a_host_with_longer_periods_is_waited_for(tmp_path):
    table = Table(tmp_path / "ids", 512, io_timeout_s=10)
    mender = table.mender()
    assert table.look_for(mender, LeaseTiming(10.0).death_s) == 0
    assert table.look_for(mender, 2 * TIMING.renewal_s) == 1


@pytest.mark.parametrize("data", [bytes(RECORD_SIZE), b"\xff" * RECORD_SIZE], ids=["zeros", "ones"])
def test_a_record_of_which_nothing_is_left_gets_the_generation_that_a_lease_names(table, data):
    table.put(data)
    mender = table.mender()
    table.look(mender)
    # The longest death that is believed.
    table.now_s += LeaseTiming(600.0).death_s
    table.look(mender)
    table.now_s += TIMING.renewal_s
    assert table.look(mender)
    leader = parse_leader(table.record())
    assert leader.valid and leader.owner_generation == 2


@pytest.mark.real("sanlock")
@pytest.mark.bare
def test_s6_real_daemons_take_the_lease_and_join_again_once_a_record_is_mended(tmp_path, run_dirs):
    space = make_id()
    path = lease_file(tmp_path / "leases", space, ["SDM"])
    area, lease = LeaseArea(str(path), 0), Lease(space, "SDM", LeaseArea(str(path), MIB))

    with contextlib.ExitStack() as stack:

        def host(number, folder):
            folder.mkdir()
            run_dir = run_dirs()
            daemon = stack.enter_context(sanlock_daemon(run_dir, f"host{number}"))
            leases = SanlockLeases(library_client(folder), TIMING, str(run_dir), boot_clock)
            return daemon, leases

        daemon, one = host(1, tmp_path / "one")
        one.join(space, 1, area)
        before = one.acquire(lease)
        _, two = host(2, tmp_path / "two")
        two.join(space, 2, area)
        daemon.kill()
        daemon.wait()
        with open(path, "r+b", buffering=0) as file:
            os.pwrite(file.fileno(), bytes([read_sector(area, 0)[168] ^ 0xFF]), 168)
        with pytest.raises(LeaseError, match="host id 1 is damaged, it is mended when its host must be dead"):
            two.owner(lease)
        with pytest.raises(LeaseError, match="-229"):
            two.acquire(lease)
        _, again = host(1, tmp_path / "again")
        with pytest.raises(LeaseError, match="-229"):
            again.join(space, 1, area)
        # The host is dead, for its daemon is; only nobody has waited for that yet.
        now_s = 0.0
        mender = RecordMender(TIMING, lambda: now_s)
        for now_s in (0.0, TIMING.death_s, 2 * TIMING.death_s):
            mender.look(Damaged(space, 1, area, 512, MIB, read_sector(area, 0), now_s, before.generation), 2)
        assert two.owner(lease) is None
        assert two.settle_s(lease) == TIMING.landing_s
        assert two.acquire(lease).host_id == 2
        again.join(space, 1, area)
        assert again.prove(lease).generation == before.generation + 1
        assert again.owner(lease).host_id == 2


@pytest.mark.real("sanlock")
@pytest.mark.bare
def test_s2_a_lease_that_became_free_while_it_was_waited_for_is_settled(tmp_path, run_dirs):
    """The holder's daemon dies and is started anew while another host waits for its death."""
    space = make_id()
    path = lease_file(tmp_path / "leases", space, ["SDM"])
    area, lease = LeaseArea(str(path), 0), Lease(space, "SDM", LeaseArea(str(path), MIB))
    with contextlib.ExitStack() as stack:
        made = {}
        for name, number in (("one", 1), ("two", 2), ("again", 1)):
            (tmp_path / name).mkdir()
            run_dir = run_dirs()
            daemon = stack.enter_context(sanlock_daemon(run_dir, f"host{number}"))
            made[name] = daemon, SanlockLeases(library_client(tmp_path / name), TIMING, str(run_dir), boot_clock)
        (daemon, one), (_, two), (_, again) = made.values()
        one.join(space, 1, area)
        two.join(space, 2, area)
        one.acquire(lease)
        assert two.settle_s(lease) == 0
        daemon.kill()
        daemon.wait()
        anew = threading.Thread(target=again.join, args=(space, 1, area))
        anew.start()
        while True:
            # It is refused as held at first, or waits inside the daemon.
            with contextlib.suppress(LeaseHeld):
                two.acquire(lease)
                break
        anew.join()
        assert two.settle_s(lease) == TIMING.landing_s


@pytest.mark.real("sanlock")
@pytest.mark.bare
def test_s1_a_host_id_that_is_renewed_with_another_timeout_is_refused(tmp_path, run_dirs):
    """The host may be in the lockspace already, for another program of it."""
    space = make_id()
    path = lease_file(tmp_path / "leases", space, ["SDM"])
    run_dir, area = run_dirs(), LeaseArea(str(path), 0)
    with sanlock_daemon(run_dir, "host1"):
        client = library_client(tmp_path)
        SanlockLeases(client, TIMING, str(run_dir)).join(space, 1, area)
        SanlockLeases(client, TIMING, str(run_dir)).join(space, 1, area)
        with pytest.raises(LeaseError, match="an I/O timeout of 1 s already"):
            SanlockLeases(client, LeaseTiming(10.0), str(run_dir)).join(space, 1, area)


def boot_clock():
    return time.clock_gettime(time.CLOCK_BOOTTIME)
