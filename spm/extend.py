# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Growing volumes of other hosts: the manager's server and a host's client on the mailbox volumes.

Both are driven by calls of ``step(now)`` and never wait; the volumes must be
opened for direct I/O, because other hosts write them.

Invariant: S3.  The server makes a volume at least as large as asked and
answers after that is so; whatever fails is answered with size 0, except the
loss of the lease, which ends the server and leaves the request to the next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from qcowlib.errors import Error, StorageError
from storage_pool.ids import make_id

from .errors import NotSpm
from .mailbox import BOX_SIZE, ExtendRequest, HsmMailbox, Reply, SpmMailbox, pack_event
from .timing import MailboxTiming

if TYPE_CHECKING:
    from qcowlib.storage.base import Storage

__all__ = ["ExtensionClient", "ExtensionServer"]


class ExtensionServer:
    """The manager's side; *extend* makes a volume at least so large and raises when it cannot."""

    def __init__(
        self,
        inbox: Storage,
        outbox: Storage,
        extend: Callable[[ExtendRequest], None],
        *,
        hosts: int = 250,
        timing: MailboxTiming | None = None,
    ) -> None:
        self._inbox, self._outbox = inbox, outbox
        self._extend = extend
        self._timing = timing or MailboxTiming()
        self._next_s = float("-inf")
        self.mailbox = SpmMailbox(hosts)

    def start(self) -> None:
        """Empty the outbox.  Raises: StorageError."""
        self._write()

    def step(self, now_s: float) -> int:
        """Look, carry out, answer; returns how many requests were answered.

        Raises: NotSpm, StorageError; what was not answered is tried by the next call.
        """
        block = bytearray(BOX_SIZE)
        self._inbox.read_into(0, [block])
        if self.mailbox.has_event(bytes(block)) or now_s >= self._next_s:
            self._next_s = now_s + self._timing.poll_s
            area = bytearray(self.mailbox.area_size)
            self._inbox.read_into(0, [area])
            self.mailbox.scan(bytes(area))
        done = 0
        for incoming in self.mailbox.pending():
            size = incoming.request.size_mib
            try:
                self._extend(incoming.request)
            except NotSpm:
                raise
            except (Error, OSError):
                size = 0
            done += self.mailbox.reply(incoming, size)
        self._write()
        return done

    def _write(self) -> None:
        if not self.mailbox.dirty:
            return
        for offset, data in self.mailbox.begin_write():
            self._outbox.write(offset, [data])
        self._outbox.flush()
        self.mailbox.written()


class ExtensionClient:
    """A host's side; *answered* hears of each answer, size 0 for failure."""

    def __init__(
        self,
        host_id: int,
        inbox: Storage,
        outbox: Storage,
        answered: Callable[[Reply], None],
        *,
        timing: MailboxTiming | None = None,
    ) -> None:
        self._inbox, self._outbox = inbox, outbox
        self._answered = answered
        self._timing = timing or MailboxTiming()
        self._failures = 0
        self._wait_until_s = float("-inf")
        self._written_s = float("-inf")
        self.mailbox = HsmMailbox(host_id)

    def start(self) -> None:
        """Begin a new life of the box.  Raises: StorageError."""
        self.mailbox.start(self._read())
        self._write()

    def post(self, request: ExtendRequest) -> bool:
        """Ask for room; returns whether the request is new.  It is sent by the next :meth:`step`."""
        return self.mailbox.post(request)

    def step(self, now_s: float) -> bool:
        """Send and receive; returns whether storage answered.  Too many failures in a row make a rest."""
        if now_s < self._wait_until_s:
            return False
        try:
            self._exchange(now_s)
        except StorageError:
            self._failures += 1
            if self._failures >= self._timing.failures:
                self._wait_until_s = now_s + self._timing.rest_s
            return False
        self._failures = 0
        return True

    def _exchange(self, now_s: float) -> None:
        if self.mailbox.waiting and now_s - self._written_s >= self._timing.resend_s:
            self.mailbox.resend()
        if self.mailbox.dirty:
            self._write()
            self._written_s = now_s
        if self.mailbox.waiting:
            for reply in self.mailbox.receive(self._read()):
                self._answered(reply)
            if self.mailbox.dirty:
                self._write()
                self._written_s = now_s

    def stop(self) -> None:
        """Leave an empty box.  Raises: StorageError."""
        self.mailbox.stop()
        self._write()

    def close(self) -> None:
        """Close both volumes; nothing is written."""
        self._inbox.close()
        self._outbox.close()

    def _read(self) -> bytes:
        page = bytearray(BOX_SIZE)
        self._outbox.read_into(self.mailbox.offset, [page])
        return bytes(page)

    def _write(self) -> None:
        self._inbox.write(self.mailbox.offset, [self.mailbox.begin_write()])
        self._inbox.flush()
        self.mailbox.written()
        # The event comes after the box: who hears of it must find the news.
        self._inbox.write(0, [pack_event(make_id())])
        self._inbox.flush()
