# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The threads of a host: its box in the mailbox is written only while the host id is its own."""

import contextlib
import threading
import time

import pytest

from qcowlib.errors import UsageError
from qcowlib.storage.memory import MemoryStorage
from spm.cli.running import HostLoop, Mailbox, Monitors
from spm.extend import ExtensionClient, ExtensionServer
from spm.host import HostReport
from spm.mailbox import ExtendRequest
from storage_pool.ids import make_id

MIB = 1 << 20
HOST_ID = 7


class Volume(MemoryStorage):
    """Counts what is written, and whether it is open; may hang."""

    def __init__(self):
        super().__init__(16 * MIB)
        self.written = 0
        self.closed = False
        self.flows = threading.Event()
        self.flows.set()

    def write(self, offset, buffers):
        self.flows.wait()
        self.written += 1
        super().write(offset, buffers)

    def close(self):
        self.closed = True


class Box:
    """A host's mailbox on volumes in memory, each life of it on new ones."""

    def __init__(self, fresh_s=3600.0):
        self.lives = []
        self.mailbox = Mailbox(self.open, fresh_s)
        self.request = ExtendRequest(make_id(), make_id(), 128)
        self.asked = []

    def open(self, answered):
        self.lives.append((Volume(), Volume()))
        return ExtensionClient(HOST_ID, *self.lives[-1], answered)

    def ask(self):
        """Ask in a thread; :attr:`asked` gets the answer or the error."""

        def run():
            try:
                self.asked.append(self.mailbox.extend(self.request, 60.0))
            except UsageError as error:
                self.asked.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        return thread


@pytest.fixture
def box():
    box = Box()
    yield box
    for inbox, _ in box.lives:
        inbox.flows.set()
    box.mailbox.stop(60.0)


def until(what):
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_outside_the_lockspace_nothing_is_asked_and_nothing_written(box):
    with pytest.raises(UsageError, match="not in the lockspace"):
        box.mailbox.extend(box.request, 60.0)
    assert box.lives == []


def test_losing_the_lockspace_ends_the_box_without_another_write(box):
    box.mailbox.seen(joined=True)
    thread = box.ask()
    until(lambda: box.lives and box.lives[0][0].written > 2)
    box.mailbox.seen(joined=False)
    thread.join()
    (inbox, outbox) = box.lives[0]
    assert "lost the lockspace" in str(box.asked[0])
    assert inbox.closed and outbox.closed
    written = inbox.written
    box.mailbox.stop(60.0)
    # Not even the empty box of who leaves: the host id may be another host's by now.
    assert inbox.written == written


def test_joining_again_begins_a_new_life_of_the_box_that_is_answered(box):
    box.mailbox.seen(joined=True)
    thread = box.ask()
    until(lambda: box.lives and box.lives[0][0].written > 2)
    box.mailbox.seen(joined=False)
    thread.join()
    box.mailbox.seen(joined=True)
    thread = box.ask()
    until(lambda: len(box.lives) == 2 and box.lives[1][0].written > 2)
    server = ExtensionServer(*box.lives[1], lambda request: None, hosts=8)
    server.start()
    until(lambda: server.step(time.monotonic()) or not thread.is_alive())
    thread.join()
    assert box.asked[1] == 128


def test_a_life_that_ended_while_storage_hung_does_not_go_on_in_the_next(box):
    box.mailbox.seen(joined=True)
    box.mailbox.extend(box.request, 0.0)
    (inbox, _) = box.lives[0]
    inbox.flows.clear()
    thread = box.ask()
    box.mailbox.seen(joined=False)
    box.mailbox.seen(joined=True)
    inbox.flows.set()
    thread.join()
    until(lambda: inbox.closed)
    assert isinstance(box.asked[0], UsageError)


def test_what_nobody_saw_to_be_ours_for_long_is_not_written():
    box = Box(fresh_s=0.0)
    box.mailbox.seen(joined=True)
    with pytest.raises(UsageError, match="not in the lockspace"):
        box.mailbox.extend(box.request, 60.0)
    assert box.lives == []


class Host:
    """Stands for a host whose lockspace is as the test says."""

    def __init__(self, box):
        self.box = box
        self.steps = 0
        self.report = HostReport(HOST_ID, "Free", -1, "out")

    def step(self):
        self.steps += 1
        return 0.001

    def leave(self):
        self.report = self.report._replace(lockspace="out")

    def now(self, state):
        """Change the state, and wait until the loop saw it."""
        self.report = self.report._replace(lockspace=state)
        steps = self.steps
        until(lambda: self.steps > steps + 1)


def test_the_loop_of_a_host_tells_its_box_of_the_lockspace(box):
    host = Host(box)
    loop = HostLoop(host, Monitors(lambda uuid: None, list, 1.0), lambda argv: 0, box.mailbox)
    loop.start()
    body = {"domain": box.request.domain, "volume": box.request.volume, "size_mib": 128}
    for state in ("out", "joining", "lost"):
        host.now(state)
        assert loop.tell("/extend", body) == (409, {"error": "this host is not in the lockspace"})
    host.now("joined")
    thread = box.ask()
    until(lambda: box.lives and box.lives[0][0].written > 2)
    host.now("lost")
    thread.join()
    assert "lost the lockspace" in str(box.asked[0])
    with contextlib.suppress(UsageError):
        box.mailbox.extend(box.request, 0.0)
    assert len(box.lives) == 1
    assert loop.leave()
