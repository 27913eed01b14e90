# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The manager's role: taken step by step, undone in reverse, ended with its helper programs when the lease is lost."""

import subprocess
import sys
import threading
import time

import pytest

from qcowlib.errors import UsageError
from spm.children import GuardedRunner, HelperPrograms
from spm.errors import LeaseHeld, LeaseLost
from spm.lease_watch import LeaseToken, LeaseWatch
from spm.proof import LeaseProof
from spm.service import FENCE_CONFIRMATION, PoolRecord, SpmHost, SpmService, SpmStatus, Step
from spm.testing.leases import SimHost, SimLeases, SimSpace
from spm.timing import LeaseTiming
from storage_pool.errors import Illegal, ProcessError
from storage_pool.leases import Lease, LeaseArea, LeaseOwner
from storage_pool.process import SystemRunner

TIMING = LeaseTiming(io_timeout_s=1.0)
SDM = Lease("space", "SDM", LeaseArea("leases", 1 << 20))


class Panic(BaseException):
    """The process ends here."""


def panic(reason):
    raise Panic(reason)


class Storage:
    """One pool's record, and a clock."""

    def __init__(self):
        self.now_s = 1000.0
        self.record = PoolRecord(-1, -1, -1)
        self.space = SimSpace(lambda: self.now_s, TIMING)

    def read(self):
        return self.record

    def write(self, token, record):
        token.check()
        self.record = record

    def master_version(self):
        return 5

    def sleep(self, seconds):
        self.now_s += seconds


class Host:
    """A host that joined, its service with two steps that note what happens."""

    def __init__(self, storage, host_id):
        self.storage = storage
        self.daemon = SimHost(storage.space, f"host{host_id}")
        self.leases = SimLeases(self.daemon)
        self.leases.join("space", host_id, LeaseArea("ids", 0))
        self.log = []
        self.fail = None
        host = SpmHost(host_id, self.leases, TIMING, lambda: storage.now_s, storage.sleep, panic)
        steps = [Step(name, lambda token, name=name: self.do(name), lambda name=name: self.undo(name)) for name in "ab"]
        self.service = SpmService(host, SDM, storage, steps)
        self.service.killers.append(lambda: not self.log.append("kill"))

    def do(self, name):
        if self.fail == name:
            raise Illegal(f"step {name} fails")
        self.log.append(f"+{name}")

    def undo(self, name):
        if self.fail == f"-{name}":
            raise Illegal(f"undo of {name} fails")
        self.log.append(f"-{name}")


@pytest.fixture
def storage():
    return Storage()


@pytest.fixture
def one(storage):
    return Host(storage, 1)


@pytest.fixture
def two(storage):
    return Host(storage, 2)


def test_op17_start_and_stop_go_through_the_steps_and_back(storage, one):
    token = one.service.start()
    assert one.service.role == "SPM" and one.service.start() is token
    assert storage.record == PoolRecord(1, 1, 1)
    assert one.service.status() == SpmStatus("SPM", 1, 1)
    one.service.stop()
    assert one.log == ["+a", "+b", "-b", "-a", "kill"]
    assert storage.record == PoolRecord(1, -1, 1)
    assert one.service.status() == SpmStatus("Free", -1, -1)
    with pytest.raises(LeaseLost):
        token.check()


def test_s1_second_host_is_refused_and_takes_over_after_the_stop(storage, one, two):
    one.service.start()
    with pytest.raises(LeaseHeld):
        two.service.start()
    assert two.service.role == "Free" and two.log == []
    assert two.service.status() == SpmStatus("SPM", 1, 1)
    one.service.stop()
    assert two.service.start().epoch == 2


@pytest.mark.parametrize(("fail", "log"), [("a", ["-a", "kill"]), ("b", ["+a", "-b", "-a", "kill"])])
def test_op17_failing_step_undoes_itself_and_the_earlier_ones(storage, one, two, fail, log):
    one.fail = fail
    with pytest.raises(Illegal, match=f"step {fail} fails"):
        one.service.start()
    assert one.log == log
    assert one.service.role == "Free" and storage.record.host_id == -1
    two.service.start()


def test_undo_that_fails_ends_the_process_and_keeps_the_lease(one, two):
    one.service.start()
    one.fail = "-b"
    with pytest.raises(Panic, match="'b' cannot be undone"):
        one.service.stop()
    with pytest.raises(LeaseHeld):
        two.service.start()


def test_s2_lost_lease_kills_helpers_first_and_undoes_everything(storage, one, two):
    token = one.service.start()
    one.daemon.sicken()
    storage.now_s += TIMING.death_s + 3
    assert two.service.start().epoch == 2
    one.log.clear()
    with pytest.raises(LeaseLost):
        token.check()
    assert one.log == ["kill"]
    assert not one.service.watch()
    assert one.log == ["kill", "-b", "-a", "kill"]
    assert one.service.role == "Free"
    assert storage.record == PoolRecord(2, 2, 2)


def test_healthy_manager_stays_while_it_is_watched(storage, one):
    one.service.start()
    for _ in range(100):
        storage.now_s += 1
        assert one.service.watch()


def test_s2_epoch_is_above_stored_and_own_although_the_version_of_the_lease_goes_back(storage, one):
    one.service.start()
    one.service.stop()
    storage.record = storage.record._replace(epoch=40)
    storage.space.regress(SDM, 5)
    assert one.service.start().epoch == 41


def test_s2_lease_of_a_daemon_that_was_started_anew_is_used_after_its_writes_landed(storage, one, two):
    one.service.start()
    one.leases.join("space", 1, LeaseArea("ids", 0))
    began = storage.now_s
    two.service.start()
    assert storage.now_s == began + TIMING.landing_s


def test_s2_duty_to_wait_passes_to_the_next_when_a_term_is_cut(storage, one, two):
    one.service.start()
    one.leases.join("space", 1, LeaseArea("ids", 0))
    two.leases.acquire(SDM)
    two.leases.release(SDM)
    began = storage.now_s
    two.service.start()
    assert storage.now_s == began + TIMING.landing_s


def test_op17_master_newer_than_wanted_is_refused_before_anything(one):
    with pytest.raises(Illegal, match="version 5"):
        one.service.start(wanted_version=4)
    assert one.service.role == "Free" and one.log == []


def test_fencing_needs_the_words_and_a_host_that_is_not_live(storage, one, two):
    one.service.start()
    with pytest.raises(UsageError, match=FENCE_CONFIRMATION):
        two.service.fence(1, "yes")
    with pytest.raises(Illegal, match="not off"):
        two.service.fence(1, FENCE_CONFIRMATION)
    one.daemon.sicken()
    storage.now_s += TIMING.death_s + 3
    two.service.fence(1, FENCE_CONFIRMATION)
    assert storage.record.host_id == -1 and two.service.role == "Free"


class Clock:
    """A token on a lease that storage always proves, and its clock."""

    def __init__(self):
        self.now_s = 100.0
        own = LeaseOwner(1, 1, 1)
        watch = LeaseWatch(TIMING, own, 1, LeaseProof(100.0, 1, own), 100.0)
        self.token = LeaseToken(watch, lambda: self.now_s, lambda: (LeaseProof(self.now_s, 1, own), 1), print, bool)
        self.token._connected = lambda: True


@pytest.fixture
def clock():
    return Clock()


def test_s2_helper_program_is_not_started_without_a_valid_token(clock):
    clock.token.give_up()
    with pytest.raises(LeaseLost):
        GuardedRunner(clock.token, lambda: clock.now_s, tuple).run(["true"])


def test_helper_program_runs_and_says_how_it_ended(clock):
    done = GuardedRunner(clock.token, lambda: clock.now_s, tuple).run(["sh", "-c", "echo said; exit 3"])
    assert (done.returncode, done.stdout, done.argv[0]) == (3, b"said\n", "sh")


def test_s2_helper_program_ends_at_the_deadline_by_itself(clock):
    clock.now_s = clock.token.watch.deadline_s - 0.2
    clock.token.watch._progress_s = clock.token.watch._proved_s = clock.now_s
    with pytest.raises(ProcessError, match="was ended"):
        GuardedRunner(clock.token, lambda: clock.now_s, tuple).run(["sleep", "100"])


def test_s1_no_helper_program_starts_after_all_were_ended(clock):
    """Its starter may have been past the check of the token by then."""
    runner = GuardedRunner(clock.token, lambda: clock.now_s, tuple)
    assert runner.kill()
    with pytest.raises(ProcessError, match="was not started"):
        runner.run(["true"])


def test_s1_all_helper_programs_of_a_term_have_ended_when_the_lease_is_given_back(tmp_path):
    storage = Storage()
    storage.sleep = time.sleep
    member = Host(storage, 1)
    token = member.service.start()
    made = HelperPrograms(lambda token: GuardedRunner(token, lambda: storage.now_s, tuple), member.service.killers)
    ended, started = [], []

    def run(number):
        with pytest.raises(ProcessError, match="was ended"):
            made.of(token).run(["sh", "-c", f"echo >{tmp_path}/{number}; sleep 100; :"])
        ended.append(number)

    for number in range(3):
        started.append(threading.Thread(target=run, args=(number,)))
        started[-1].start()
    while len(list(tmp_path.iterdir())) < 3:
        assert all(thread.is_alive() for thread in started)
    runner = made.of(token)
    member.service.stop()
    assert runner.kill()
    for thread in started:
        thread.join()
    assert sorted(ended) == [0, 1, 2]
    with pytest.raises(LeaseLost):
        made.of(token).run(["true"])


def test_s1_a_helper_program_that_is_stuck_keeps_the_lease_until_its_write_landed():
    storage = Storage()
    member = Host(storage, 1)
    member.service.start()
    left = iter([False, False, False])

    def kill():
        member.log.append("kill")
        return next(left, True)

    member.service.killers[:] = [kill]
    member.service.stop()
    assert member.log[-4:] == ["kill"] * 4
    member.service.start()
    member.service.killers[:] = [lambda: False]
    before_s = storage.now_s
    member.service.stop()
    assert TIMING.landing_s <= storage.now_s - before_s <= TIMING.landing_s + 1
    assert member.service.role == "Free"


def test_s2_helper_program_does_not_run_when_its_starter_was_stopped_past_the_deadline(clock, tmp_path):
    """As a process is that is stopped after its last check, before the program runs."""

    class Late(SystemRunner):
        def run(self, argv, **words):
            end_s = time.monotonic() + 0.3
            while time.monotonic() < end_s:
                pass
            return super().run(argv, **words)

    clock.now_s = clock.token.watch.deadline_s - 0.1
    clock.token.watch._progress_s = clock.token.watch._proved_s = clock.now_s
    with pytest.raises(ProcessError, match="was ended"):
        GuardedRunner(clock.token, lambda: clock.now_s, tuple, Late).run(["touch", str(tmp_path / "late")])
    assert not (tmp_path / "late").exists()


def test_s2_helper_program_ends_with_the_process_that_started_it(tmp_path, project_root):
    """A manager is killed while its helper runs: the helper and what that started are gone."""
    program = f"""
import os, signal, threading, time
from tests.spm.test_service import Clock
from spm.children import GuardedRunner, HelperPrograms
clock = Clock()
clock.token.watch.timing = clock.token.watch.timing._replace(io_timeout_s=10.0)
runner = GuardedRunner(clock.token, lambda: clock.now_s, tuple)
def end():
    while not os.path.exists({str(tmp_path / "pid")!r}):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=end, daemon=True).start()
runner.run(["sh", "-c", "echo $$ >{tmp_path}/pid.new; mv {tmp_path}/pid.new {tmp_path}/pid; exec sleep 100"])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=project_root, check=False)
    assert done.returncode == -9
    pid = int((tmp_path / "pid").read_text())
    gone = subprocess.run(
        [
            "timeout",
            "10",
            "sh",
            "-c",
            f"while kill -0 {pid} 2>/dev/null && ! grep -q 'State:.Z' /proc/{pid}/status; do :; done",
        ],
        check=False,
    )
    assert gone.returncode == 0
