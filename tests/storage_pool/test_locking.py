# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Locks between threads: in the order of asking, in the order of names, and never a deadlock."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

import storage_pool
from qcowlib.errors import Busy
from storage_pool.errors import Illegal
from storage_pool.locking import FairLock, Locks, Wanted

LIMIT_S = 30.0


class Other:
    """A thread that takes a lock, tells so, and keeps it until it is let go."""

    def __init__(self, lock, log, name, shared=False):
        self.lock, self.log, self.name, self.shared = lock, log, name, shared
        self.has, self.go = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        waiting = len(lock._queue) + len(lock._held)
        self.thread.start()
        while len(lock._queue) + len(lock._held) == waiting:
            pass

    def run(self):
        self.lock.acquire(shared=self.shared, timeout_s=LIMIT_S)
        self.log.append(self.name)
        self.has.set()
        self.go.wait(LIMIT_S)
        self.lock.release()

    def end(self):
        self.go.set()
        self.thread.join(LIMIT_S)


def test_op20_readers_are_in_together_and_a_writer_alone():
    lock, log = FairLock(), []
    readers = [Other(lock, log, name, shared=True) for name in "ab"]
    assert all(reader.has.wait(LIMIT_S) for reader in readers)
    writer = Other(lock, log, "w")
    assert not writer.has.is_set()
    for reader in readers:
        reader.end()
    assert writer.has.wait(LIMIT_S)
    writer.end()
    assert sorted(log[:2]) == ["a", "b"] and log[2:] == ["w"]


def test_op20_first_come_first_served_also_for_readers_behind_a_writer():
    lock, log = FairLock(), []
    first = Other(lock, log, "r1", shared=True)
    assert first.has.wait(LIMIT_S)
    others = [Other(lock, log, "w1"), Other(lock, log, "r2", shared=True), Other(lock, log, "w2")]
    for other in others:
        other.go.set()
    first.end()
    for other in others:
        other.thread.join(LIMIT_S)
    assert log == ["r1", "w1", "r2", "w2"]


def test_op20_shared_lock_is_not_upgraded_and_any_is_taken_again():
    lock = FairLock()
    lock.acquire(shared=True)
    lock.acquire(shared=True)
    with pytest.raises(Illegal, match="does not become"):
        lock.acquire()
    lock.release()
    lock.release()
    lock.acquire()
    lock.acquire(shared=True)
    lock.release()
    lock.release()
    with pytest.raises(Illegal, match="does not have"):
        lock.release()


def test_op15_waiting_ends_after_its_time_and_leaves_no_trace():
    lock, log = FairLock(), []
    holder = Other(lock, log, "h")
    assert holder.has.wait(LIMIT_S)
    with pytest.raises(Busy):
        lock.acquire(shared=True, timeout_s=0.01)
    holder.end()
    lock.acquire(timeout_s=LIMIT_S)
    lock.release()


def test_op15_reader_behind_a_writer_that_gave_up_goes_on():
    lock, log = FairLock(), []
    holder = Other(lock, log, "h", shared=True)
    assert holder.has.wait(LIMIT_S)
    failed = []

    def impatient():
        try:
            lock.acquire(timeout_s=0.05)
        except Busy as error:
            failed.append(error)

    writer = threading.Thread(target=impatient)
    writer.start()
    while not lock._queue and not failed:
        pass
    reader = Other(lock, log, "r", shared=True)
    writer.join(LIMIT_S)
    assert failed and reader.has.wait(LIMIT_S)
    reader.end()
    holder.end()


class Noted(FairLock):
    """Says in which order it is taken and given back."""

    __slots__ = ("log", "name")

    def __init__(self, name, log):
        super().__init__()
        self.name, self.log = name, log

    def acquire(self, *, shared=False, timeout_s=None):
        super().acquire(shared=shared, timeout_s=timeout_s)
        self.log.append(f"+{self.name}")

    def release(self):
        self.log.append(f"-{self.name}")
        super().release()


def noted(names):
    locks, log = Locks(), []
    locks._locks.update({name: Noted(name, log) for name in names})
    return locks, log


def test_op14_locks_are_taken_in_order_and_given_back_in_reverse():
    locks, log = noted("abc")
    with locks.guard([Wanted("c"), Wanted("a", shared=True), Wanted("b"), Wanted("c")]):
        assert log == ["+a", "+b", "+c"]
    assert log == ["+a", "+b", "+c", "-c", "-b", "-a"]


def test_op14_lock_wanted_both_ways_is_a_deadlock_and_nothing_is_taken():
    locks, log = noted("ab")
    with pytest.raises(Illegal, match="deadlock"), locks.guard([Wanted("a"), Wanted("b"), Wanted("a", shared=True)]):
        pass
    assert log == []


def test_op14_first_error_is_kept_and_all_are_given_back():
    locks, log = noted("ab")
    with pytest.raises(ZeroDivisionError), locks.guard([Wanted("b"), Wanted("a")]):
        raise ZeroDivisionError
    assert log == ["+a", "+b", "-b", "-a"]
    holder = Other(locks._lock("b"), [], "h")
    assert holder.has.wait(LIMIT_S)
    with pytest.raises(Busy), locks.guard([Wanted("a"), Wanted("b")], timeout_s=0.01):
        pass
    holder.end()
    with locks.guard([Wanted("a"), Wanted("b")], timeout_s=LIMIT_S):
        pass


@given(st.lists(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=4), min_size=2, max_size=4))
def test_op15_threads_that_want_any_locks_all_end(plans):
    locks = Locks()
    wanted = [[Wanted(name, shared) for name, shared in dict(plan).items()] for plan in plans]
    inside = {name: [0, 0] for name in "abcd"}
    wrong = []
    counting = threading.Lock()

    def work(plan):
        for _ in range(5):
            with locks.guard(plan, timeout_s=LIMIT_S):
                with counting:
                    for name, shared in plan:
                        inside[name][shared] += 1
                        if inside[name][False] > 1 or (inside[name][False] and inside[name][True]):
                            wrong.append(name)
                with counting:
                    for name, shared in plan:
                        inside[name][shared] -= 1

    threads = [threading.Thread(target=work, args=(plan,)) for plan in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert not any(thread.is_alive() for thread in threads) and wrong == []


def test_op15_threads_of_one_engine_change_a_domain_one_after_the_other(tmp_path):
    with storage_pool.connect(tmp_path) as engine:
        data = engine.create_domain("data")
        failed = []

        def work(number):
            try:
                for _ in range(3):
                    disk = data.create_disk(1 << 20, description=f"disk {number}")
                    disk.snapshot()
            except Exception as error:
                failed.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert failed == []
        assert len(data.disks()) == 12 and data.check().clean
