# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The mailbox: requests of hosts to extend volumes, and the manager's answers.

Host h owns the 4096 bytes at h x 4096 of ``inbox`` (where it writes) and of
``outbox`` (where it reads); block 0 of ``inbox`` tells of events.  A mailbox
is 63 slots of 64 bytes and a last slot whose last 4 bytes are the checksum:

========  =======  ==========================================================
offset    bytes    message
========  =======  ==========================================================
0         1        ``1``; 0 for an empty slot
1         4        ``xtnd``
5         16       UUID of the domain, a little-endian number
21        16       UUID of the volume, the same
37        16       size in MiB, lower-case hexadecimal
53        11       ``0``
========  =======  ==========================================================

One slot goes: host writes a request; manager answers in the same slot of
``outbox``; host writes *clean* (64 times 0x01); manager writes *clean*; host
writes zeros, and the slot is free.

Invariant: S3.  A request names an absolute size, so one that is carried out
twice equals one.  The two machines here do no I/O: pages of bytes go in,
pages to be written come out, and a page stays to be written until the caller
says that it is, so a lost write or a new manager only costs time.

Source: pages written by VDSM; what is stricter here is that every field of a
message is checked (the checksum is a sum, which swapped bytes pass), and that
an old answer is cleaned away before its slot is used again.
"""

from __future__ import annotations

from collections import deque
from typing import Final, Literal, NamedTuple

from storage_pool.errors import InvalidName
from storage_pool.ids import check_id

from .errors import MailboxError

__all__ = [
    "BOX_SIZE",
    "ExtendRequest",
    "HsmMailbox",
    "Incoming",
    "Reply",
    "SpmMailbox",
    "checksum",
    "is_intact",
    "pack_event",
    "pack_uuid",
    "parse_event",
    "seal",
    "unpack_uuid",
]

BOX_SIZE: Final = 4096
MESSAGE_SIZE: Final = 64
SLOTS: Final = 63
MAX_HOST_ID: Final = 250
#: Bytes of all boxes, that of the highest host id too.
AREA_SIZE: Final = (MAX_HOST_ID + 1) * BOX_SIZE
MAX_SIZE_MIB: Final = 0xFFFFFFFF
#: Requests of one host that may wait for a slot.
QUEUE_LIMIT: Final = 4096

EMPTY: Final = bytes(MESSAGE_SIZE)
CLEAN: Final = b"\1" * MESSAGE_SIZE
EMPTY_BOX: Final = bytes(BOX_SIZE)
_HEAD: Final = b"1xtnd"
_SIZE_AT: Final = 37
_PADDING: Final = b"0" * 11
_EVENT: Final = b"\0evt"
_CHECKED: Final = BOX_SIZE - 4
#: Boxes compared at once.
_GROUP: Final = 16


def pack_uuid(text: str) -> bytes:
    """Return a UUID as 16 bytes, last byte of the text first.  Raises: InvalidName."""
    return bytes.fromhex(check_id(text, blank=True).replace("-", ""))[::-1]


def unpack_uuid(data: bytes) -> str:
    """Return the text of 16 bytes made by :func:`pack_uuid`."""
    text = data[::-1].hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


class ExtendRequest(NamedTuple):
    """Make *volume* of *domain* at least *size_mib* MiB; as an answer, 0 tells of failure."""

    domain: str
    volume: str
    size_mib: int

    def pack(self) -> bytes:
        """Return the 64 bytes.  Raises: MailboxError."""
        if not 0 <= self.size_mib <= MAX_SIZE_MIB:
            raise MailboxError(f"no request for a size of {self.size_mib} MiB")
        try:
            names = pack_uuid(self.domain) + pack_uuid(self.volume)
        except InvalidName as error:
            raise MailboxError(f"no request without domain and volume: {error}") from error
        return _HEAD + names + b"%016x" % self.size_mib + _PADDING

    @classmethod
    def parse(cls, data: bytes) -> ExtendRequest | None:
        """Return the request in 64 bytes, ``None`` unless every field is as it must be."""
        digits = data[_SIZE_AT : _SIZE_AT + 16]
        if data[:5] != _HEAD or data[53:MESSAGE_SIZE] != _PADDING or set(digits) - set(b"0123456789abcdef"):
            return None
        size = int(digits, 16)
        return cls(unpack_uuid(data[5:21]), unpack_uuid(data[21:37]), size) if size <= MAX_SIZE_MIB else None


def checksum(data: bytes) -> int:
    """Return the sum of the bytes of a box without its last four."""
    return sum(data[:_CHECKED])


def seal(slots: bytes) -> bytes:
    """Return a whole box of the bytes of its slots, with checksum."""
    body = slots.ljust(_CHECKED, b"\0")[:_CHECKED]
    return body + sum(body).to_bytes(4, "little")


def is_intact(box: bytes) -> bool:
    """Whether a box has its right checksum; one of zeros has."""
    return len(box) == BOX_SIZE and checksum(box) == int.from_bytes(box[_CHECKED:], "little")


def pack_event(uuid: str) -> bytes:
    """Return the event block that tells of news under a fresh random UUID."""
    return (_EVENT + bytes.fromhex(check_id(uuid).replace("-", ""))).ljust(BOX_SIZE, b"\0")


def parse_event(block: bytes) -> str | None:
    """Return the UUID of the last event, ``None`` if there was none."""
    return unpack_uuid(block[4:20][::-1]) if block[:4] == _EVENT else None


class Reply(NamedTuple):
    """The answer to *request*: the size in MiB, 0 for failure."""

    request: ExtendRequest
    size_mib: int


_SlotState = Literal["free", "asked", "cleaning"]


class HsmMailbox:
    """A host's side.

    Call :meth:`start` with the host's outbox page, then :meth:`post` and,
    for each page read, :meth:`receive`; write :attr:`page` (then an event)
    whenever :attr:`dirty` and tell :meth:`written`.
    """

    __slots__ = ("_queue", "_requests", "_states", "_writing", "dirty", "host_id", "page")

    def __init__(self, host_id: int) -> None:
        """Raises: MailboxError for a host without a box."""
        if not 1 <= host_id <= MAX_HOST_ID:
            raise MailboxError(f"there is no mailbox for host id {host_id}")
        self.host_id = host_id
        self._states: list[_SlotState] = ["free"] * SLOTS
        self._requests: list[ExtendRequest | None] = [None] * SLOTS
        self._queue: deque[ExtendRequest] = deque()
        #: What the host's box in ``inbox`` must be,
        self.page = EMPTY_BOX
        #: and whether it must be written for that.
        self.dirty = True
        self._writing = self.page

    @property
    def offset(self) -> int:
        """Where the box is in both volumes."""
        return self.host_id * BOX_SIZE

    @property
    def waiting(self) -> bool:
        """Whether a request has no answer yet, or a slot is being cleaned."""
        return bool(self._queue) or any(state != "free" for state in self._states)

    def start(self, outbox: bytes) -> None:
        """Begin with what an earlier life of this host left in its outbox.

        An old answer could be taken for one to a new request of the same
        volume, so such slots are cleaned before they are used.
        """
        for slot in range(SLOTS):
            if _slot(outbox, slot) not in (EMPTY, CLEAN):
                self._states[slot] = "cleaning"
        self._render()

    def post(self, request: ExtendRequest) -> bool:
        """Queue a request; returns whether it was new.

        Raises: MailboxError for an impossible one, or when too many wait.
        """
        request.pack()
        if request in self._queue or request in self._requests:
            return False
        if len(self._queue) >= QUEUE_LIMIT:
            raise MailboxError(f"{QUEUE_LIMIT} requests wait for the pool manager")
        self._queue.append(request)
        self._fill()
        return True

    def receive(self, outbox: bytes) -> list[Reply]:
        """Take the host's outbox page; returns the answers that came.

        The page has no checksum.  What is no answer to the request of its
        slot is ignored.
        """
        replies = []
        changed = False
        for slot, state in enumerate(self._states):
            if state == "free":
                continue
            answer = _slot(outbox, slot)
            request = self._requests[slot]
            if request is not None:
                size = _answered(request, answer)
                if size is not None:
                    replies.append(Reply(request, size))
                    self._requests[slot] = None
                    self._states[slot] = "cleaning"
                    changed = True
            elif state == "cleaning" and answer == CLEAN:
                self._states[slot] = "free"
                changed = True
        if changed:
            self._render()
            self._fill()
        return replies

    def resend(self) -> None:
        """Have the page written again: nobody answered, the write may be lost."""
        self.dirty = True

    def stop(self) -> None:
        """Forget all requests; the page to be written is empty."""
        self._states = ["free"] * SLOTS
        self._requests = [None] * SLOTS
        self._queue.clear()
        self.page = EMPTY_BOX
        self.dirty = True

    def begin_write(self) -> bytes:
        """Return the page that the caller is about to write."""
        self._writing = self.page
        return self.page

    def written(self) -> None:
        """The page of :meth:`begin_write` is on storage."""
        self.dirty = self._writing != self.page

    def _fill(self) -> None:
        if not self._queue or "free" not in self._states:
            return
        for slot in range(SLOTS):
            # The manager saw the slot clean, so even the same request is news to it.
            if self._queue and self._states[slot] == "free":
                self._requests[slot] = self._queue.popleft()
                self._states[slot] = "asked"
        self._render()

    def _render(self) -> None:
        parts = []
        for slot in range(SLOTS):
            request = self._requests[slot]
            parts.append(request.pack() if request else CLEAN if self._states[slot] == "cleaning" else EMPTY)
        body = b"".join(parts)
        page = seal(body) if any(body) else EMPTY_BOX
        if page != self.page:
            self.page = page
            self.dirty = True


def _slot(page: bytes, slot: int) -> bytes:
    return page[slot * MESSAGE_SIZE : (slot + 1) * MESSAGE_SIZE]


def _answered(request: ExtendRequest, data: bytes) -> int | None:
    """Return the size that *data* answers to *request*, ``None`` if it is another message."""
    if data[:5] != _HEAD or data[:_SIZE_AT] != request.pack()[:_SIZE_AT]:
        return None
    answer = ExtendRequest.parse(data)
    return None if answer is None else answer.size_mib


class Incoming(NamedTuple):
    """A request as the manager sees it; *message_id* is host id x 64 + slot."""

    message_id: int
    request: ExtendRequest


class SpmMailbox:
    """The manager's side, for all hosts.

    The pages of the first :meth:`begin_write` empty the outbox.  Then, for
    each read of the whole ``inbox``, call :meth:`scan`, carry out what is
    :meth:`pending` (a request whose carrying out was interrupted stays
    there), tell :meth:`reply`, and write again.
    """

    __slots__ = ("_active", "_dirty", "_event", "_inbox", "_outbox", "_writing", "damaged", "hosts")

    def __init__(self, hosts: int = MAX_HOST_ID) -> None:
        """Serve host ids 1 to *hosts*."""
        if not 1 <= hosts <= MAX_HOST_ID:
            raise MailboxError(f"there are no mailboxes for {hosts} hosts")
        self.hosts = hosts
        self._inbox = bytes(self.area_size)
        self._outbox = bytearray(self.area_size)
        self._dirty = set(range(1, hosts + 1))
        self._writing: set[int] = set()
        self._active: dict[int, ExtendRequest] = {}
        self._event: str | None = None
        #: Boxes with a wrong checksum at the last scan, by host id.
        self.damaged: frozenset[int] = frozenset()

    @property
    def area_size(self) -> int:
        """Bytes to read from ``inbox``, from its start."""
        return (self.hosts + 1) * BOX_SIZE

    def has_event(self, block: bytes) -> bool:
        """Whether block 0 of ``inbox`` tells of news since the last call."""
        event = parse_event(block)
        if event is None or event == self._event:
            return False
        self._event = event
        return True

    def scan(self, inbox: bytes) -> list[Incoming]:
        """Take the whole area; returns requests that are new, in order of their ids."""
        if inbox == self._inbox:
            return []
        new: list[Incoming] = []
        damaged = []
        kept = inbox.ljust(self.area_size, b"\0")
        for host in self._changed(inbox):
            span = slice(host * BOX_SIZE, (host + 1) * BOX_SIZE)
            if is_intact(inbox[span]):
                new += self._changes(host, self._inbox[span], inbox[span])
            else:
                # A torn write: as if it had not been read, it will be whole at another scan.
                damaged.append(host)
                kept = kept[: span.start] + self._inbox[span] + kept[span.stop :]
        self._inbox = kept
        self.damaged = frozenset(damaged)
        return new

    def _changed(self, inbox: bytes) -> list[int]:
        """Return the hosts whose boxes differ from the last scan; most scans find one or two among hundreds."""
        found = []
        for first in range(1, self.hosts + 1, _GROUP):
            end = min(first + _GROUP, self.hosts + 1)
            span = slice(first * BOX_SIZE, end * BOX_SIZE)
            if inbox[span] != self._inbox[span]:
                spans = ((host, slice(host * BOX_SIZE, (host + 1) * BOX_SIZE)) for host in range(first, end))
                found += [host for host, span in spans if inbox[span] != self._inbox[span]]
        return found

    def _changes(self, host: int, old: bytes, page: bytes) -> list[Incoming]:
        new = []
        for slot in range(SLOTS):
            message = _slot(page, slot)
            if message == _slot(old, slot):
                continue
            number = host * 64 + slot
            self._active.pop(number, None)
            if message == CLEAN:
                self._put(number, CLEAN)
                continue
            request = ExtendRequest.parse(message)
            if request is not None:
                self._active[number] = request
                new.append(Incoming(number, request))
        return new

    def pending(self) -> list[Incoming]:
        """Return the requests that have no answer yet, in order of their ids."""
        return [Incoming(number, self._active[number]) for number in sorted(self._active)]

    def reply(self, incoming: Incoming, size_mib: int) -> bool:
        """Answer a request, 0 for failure; returns whether its slot still holds it."""
        if self._active.get(incoming.message_id) != incoming.request:
            return False
        del self._active[incoming.message_id]
        self._put(incoming.message_id, incoming.request._replace(size_mib=size_mib).pack())
        return True

    def _put(self, number: int, message: bytes) -> None:
        host, slot = divmod(number, 64)
        start = host * BOX_SIZE + slot * MESSAGE_SIZE
        self._outbox[start : start + MESSAGE_SIZE] = message
        self._dirty.add(host)

    @property
    def dirty(self) -> bool:
        """Whether anything must be written."""
        return bool(self._dirty or self._writing)

    def begin_write(self) -> list[tuple[int, bytes]]:
        """Return what must be written to ``outbox``: (offset, bytes), adjacent pages together."""
        self._writing |= self._dirty
        self._dirty = set()
        runs: list[tuple[int, int]] = []
        for host in sorted(self._writing):
            if runs and runs[-1][1] == host:
                runs[-1] = (runs[-1][0], host + 1)
            else:
                runs.append((host, host + 1))
        return [(first * BOX_SIZE, bytes(self._outbox[first * BOX_SIZE : end * BOX_SIZE])) for first, end in runs]

    def written(self) -> None:
        """What :meth:`begin_write` returned last is on storage."""
        self._writing = set()
