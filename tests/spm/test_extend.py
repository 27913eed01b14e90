# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Requests for room through the mailbox volumes, from a host's step to the manager's and back."""

import threading

import pytest

from qcowlib.errors import StorageError, UsageError
from qcowlib.storage.memory import MemoryStorage
from spm.cli.running import Mailbox
from spm.errors import LeaseLost
from spm.extend import ExtensionClient, ExtensionServer
from spm.mailbox import BOX_SIZE, EMPTY_BOX, ExtendRequest
from spm.timing import MailboxTiming
from storage_pool.errors import NoSpace
from storage_pool.ids import make_id

TIMING = MailboxTiming()


class Volumes(dict):
    """Sizes in MiB by UUID; ``error`` is raised instead of growing."""

    error = None

    def extend(self, request):
        if self.error is not None:
            raise self.error
        self[request.volume] = max(self[request.volume], request.size_mib)


class BrokenStorage(MemoryStorage):
    """Fails while ``broken``."""

    broken = False
    tries = 0

    def write(self, offset, buffers):
        self.tries += 1
        if self.broken:
            raise StorageError(5, operation="write")
        super().write(offset, buffers)


class World:
    """Both sides on volumes in memory."""

    def __init__(self):
        self.inbox, self.outbox = BrokenStorage(251 * BOX_SIZE), BrokenStorage(251 * BOX_SIZE)
        self.volumes = Volumes({make_id(): 1024})
        self.replies = []
        self.client = ExtensionClient(7, self.inbox, self.outbox, self.replies.append)
        self.client.start()
        self.serve()

    def serve(self):
        self.server = ExtensionServer(self.inbox, self.outbox, self.volumes.extend)
        self.server.start()

    def request(self, size=2048):
        (volume,) = self.volumes
        made = ExtendRequest(make_id(), volume, size)
        assert self.client.post(made)
        return made

    def run(self, rounds=6, start=0.0):
        for number in range(rounds):
            self.client.step(start + number * TIMING.reply_s)
            self.server.step(start + number * TIMING.event_s)


@pytest.fixture
def world():
    return World()


def test_mb07_request_is_carried_out_and_answered_in_two_steps_by_events(world):
    request = world.request()
    world.server.step(0.0)
    world.client.step(0.1)
    assert world.server.step(0.2) == 1
    world.client.step(0.6)
    assert [(reply.request, reply.size_mib) for reply in world.replies] == [(request, 2048)]
    assert list(world.volumes.values()) == [2048]


def test_mb07_without_events_the_regular_look_finds_the_request(world):
    world.request()
    world.server.step(0.0)
    world.client.step(0.1)
    world.inbox.write(0, [EMPTY_BOX])
    assert world.server.step(0.2) == 0
    assert world.server.step(TIMING.poll_s) == 1


def test_s3_request_carried_out_twice_equals_once(world):
    world.request()
    world.client.step(0.0)
    world.outbox.broken = True
    with pytest.raises(StorageError):
        world.server.step(0.0)
    world.outbox.broken = False
    world.serve()
    world.run()
    assert list(world.volumes.values()) == [2048]
    assert len(world.replies) == 1


def test_mb06_failure_is_answered_with_size_zero_and_can_be_asked_again(world):
    world.volumes.error = NoSpace("the group is full")
    request = world.request()
    world.run()
    assert [reply.size_mib for reply in world.replies] == [0]
    world.volumes.error = None
    world.client.post(request)
    world.run(start=100.0)
    assert [reply.size_mib for reply in world.replies] == [0, 2048]


def test_lost_lease_ends_the_server_and_the_next_one_answers(world):
    world.volumes.error = LeaseLost("lost")
    world.request()
    world.client.step(0.0)
    with pytest.raises(LeaseLost):
        world.server.step(0.0)
    world.volumes.error = None
    world.serve()
    world.run()
    assert [reply.size_mib for reply in world.replies] == [2048]


def test_request_without_answer_is_written_again(world):
    world.request()
    world.client.step(0.0)
    before = world.inbox.tries
    world.client.step(1.0)
    assert world.inbox.tries == before
    world.client.step(TIMING.resend_s)
    assert world.inbox.tries > before


def test_many_failures_in_a_row_make_a_rest(world):
    world.request()
    world.inbox.broken = True
    assert not any(world.client.step(float(number)) for number in range(TIMING.failures))
    tries = world.inbox.tries
    assert not world.client.step(TIMING.failures + 1.0)
    assert world.inbox.tries == tries
    world.inbox.broken = False
    assert world.client.step(TIMING.failures + TIMING.rest_s)


def test_stopped_host_leaves_an_empty_box(world):
    world.request()
    world.client.step(0.0)
    world.client.stop()
    page = bytearray(BOX_SIZE)
    world.inbox.read_into(7 * BOX_SIZE, [page])
    assert bytes(page) == EMPTY_BOX


def test_mb09_thread_ends_when_stopped_and_who_waits_is_told(world, monkeypatch):
    sent, step = threading.Event(), world.client.step
    monkeypatch.setattr(world.client, "step", lambda now_s: step(now_s) and sent.set())
    before = set(threading.enumerate())
    mailbox = Mailbox(lambda answered: world.client, 3600.0)
    mailbox.seen(joined=True)
    (volume,) = world.volumes
    request = ExtendRequest(make_id(), volume, 2048)
    answers = []
    # Nobody serves: without the stop this waits for its limit.
    waiting = threading.Thread(target=lambda: answers.append(mailbox.extend(request, 3600.0)))
    waiting.start()
    assert sent.wait(60.0)
    page = bytearray(BOX_SIZE)
    world.inbox.read_into(7 * BOX_SIZE, [page])
    assert bytes(page) != EMPTY_BOX
    assert mailbox.stop(60.0)
    waiting.join(60.0)
    assert answers == [0] and set(threading.enumerate()) == before
    world.inbox.read_into(7 * BOX_SIZE, [page])
    assert bytes(page) == EMPTY_BOX
    with pytest.raises(UsageError, match="leaves the pool"):
        mailbox.extend(request, 1.0)


def test_mb09_box_that_was_never_used_has_nothing_to_stop():
    assert Mailbox(lambda answered: None, 3600.0).stop(1.0)
