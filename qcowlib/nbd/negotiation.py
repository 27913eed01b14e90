# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The negotiation of one connection, as a state machine: bytes in, bytes out.

Invariant: pure; it keeps no more than one option of :data:`MAX_OPTION` bytes
and what arrived with it, answers no more at once than :data:`MAX_ANSWER` bytes
and one option, and whatever arrives it answers, skips or ends, and never raises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from qcowlib.nbd import protocol as p
from qcowlib.nbd.protocol import ExportInfo, option_reply

__all__ = ["Agreed", "Negotiation"]


class Agreed(NamedTuple):
    """What both sides have agreed on; *contexts* are the chosen names by their number on the wire."""

    export: ExportInfo
    structured: bool
    contexts: tuple[tuple[int, str], ...]


class _Malformed(Exception):
    """The data of an option does not have its form."""


class _Reader:
    """The fields of an option, in order; each is there or :class:`_Malformed` is raised."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, length: int) -> bytes:
        data = self._data[self._at : self._at + length]
        if len(data) != length:
            raise _Malformed
        self._at += length
        return data

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def u16(self) -> int:
        return int.from_bytes(self.take(2), "big")

    def text(self) -> str:
        length = self.u32()
        if length > p.MAX_NAME:
            raise _Malformed
        return _decode(self.take(length))

    def end(self) -> None:
        if self._at != len(self._data):
            raise _Malformed


def _decode(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise _Malformed from None


class Negotiation:
    """Feed it what the client sends and send what :meth:`feed` returns, until *agreed* or *closed*.

    *exports* are the exports by name, the first is the default. Bytes behind the
    last option stay in :attr:`rest`.
    """

    def __init__(self, exports: Mapping[str, ExportInfo]) -> None:
        self.agreed: Agreed | None = None
        self.closed = False
        self.rest = bytearray()
        self._exports = exports
        self._flags: int | None = None
        self._skip = 0
        self._options = 0
        self._structured = False
        self._chosen: tuple[str, tuple[tuple[int, str], ...]] | None = None
        self._handlers: dict[int, Callable[[int, bytes], bytes]] = {
            p.OPT_ABORT: self._abort,
            p.OPT_LIST: self._list,
            p.OPT_INFO: self._info,
            p.OPT_GO: self._info,
            p.OPT_STRUCTURED_REPLY: self._structure,
            p.OPT_LIST_META_CONTEXT: self._contexts,
            p.OPT_SET_META_CONTEXT: self._contexts,
        }

    @staticmethod
    def greeting() -> bytes:
        """Return what the server says first."""
        return p.GREETING.pack(p.NBD_MAGIC, p.OPTION_MAGIC, p.FIXED_NEWSTYLE | p.NO_ZEROES)

    def feed(self, data: bytes | memoryview) -> bytes:
        """Take what arrived; returns what to answer.  After a long answer there may be more: feed it nothing then."""
        self.rest += data
        answers = bytearray()
        while not self.closed and self.agreed is None and len(answers) < p.MAX_ANSWER:
            answer = self._step()
            if answer is None:
                break
            answers += answer
        if self.closed:
            self.rest.clear()
        return bytes(answers)

    def _step(self) -> bytes | None:
        """Do the next thing; ``None`` when more has to arrive first."""
        rest = self.rest
        if self._skip:
            count = min(self._skip, len(rest))
            del rest[:count]
            self._skip -= count
            return b"" if count and not self._skip else None
        if self._flags is None:
            if len(rest) < 4:
                return None
            self._flags = p.U32.unpack_from(rest)[0]
            del rest[:4]
            # Flags that were not offered: the client speaks of something else.
            self.closed = bool(self._flags & ~(p.FIXED_NEWSTYLE | p.NO_ZEROES))
            return b""
        if len(rest) < p.OPTION.size:
            return None
        magic, option, length = p.OPTION.unpack_from(rest)
        if magic != p.OPTION_MAGIC or length > p.MAX_SKIP:
            self.closed = True
            return b""
        if length > p.MAX_OPTION:
            del rest[: p.OPTION.size]
            self._skip = length
            return self._begin(option) or option_reply(option, p.REP_ERR_TOO_BIG)
        if len(rest) < p.OPTION.size + length:
            return None
        body = bytes(rest[p.OPTION.size : p.OPTION.size + length])
        del rest[: p.OPTION.size + length]
        return self._begin(option) or self._answer(option, body)

    def _begin(self, option: int) -> bytes:
        """Count the option, and end where options are not to be answered."""
        self._options += 1
        fixed = bool((self._flags or 0) & p.FIXED_NEWSTYLE)
        if self._options > p.MAX_OPTIONS or (not fixed and option != p.OPT_EXPORT_NAME):
            self.closed = True
        return b""

    def _answer(self, option: int, data: bytes) -> bytes:
        if self.closed:
            return b""
        if option == p.OPT_EXPORT_NAME:
            return self._export_name(data)
        handler = self._handlers.get(option)
        if handler is None:
            return option_reply(option, p.REP_ERR_UNSUP, _REFUSED.get(option, b""))
        try:
            return handler(option, data)
        except _Malformed:
            return option_reply(option, p.REP_ERR_INVALID)

    def _find(self, name: str) -> ExportInfo | None:
        info = self._exports.get(name)
        if info is None and name == "":
            info = next(iter(self._exports.values()), None)
        return info

    # -- options -------------------------------------------------------------------

    def _export_name(self, data: bytes) -> bytes:
        try:
            info = self._find(_decode(data))
        except _Malformed:
            info = None
        if info is None:
            # Source: this option has no answer for a name that is not there.
            self.closed = True
            return b""
        self._agree(info)
        zeros = b"" if (self._flags or 0) & p.NO_ZEROES else bytes(124)
        return p.export_info(info, self._export_flags(info))[2:] + zeros

    def _agree(self, info: ExportInfo) -> None:
        # Contexts that were chosen for another export do not count.
        chosen = self._chosen[1] if self._chosen is not None and self._chosen[0] == info.name else ()
        self.agreed = Agreed(info, self._structured, chosen)

    def _export_flags(self, info: ExportInfo) -> int:
        return info.flags | (p.SEND_DF if self._structured else 0)

    def _abort(self, option: int, data: bytes) -> bytes:
        self.closed = True
        return option_reply(option, p.REP_ACK)

    def _list(self, option: int, data: bytes) -> bytes:
        _Reader(data).end()
        replies = []
        for name, info in self._exports.items():
            key = name.encode()
            payload = p.U32.pack(len(key)) + key + info.description.encode()
            replies.append(option_reply(option, p.REP_SERVER, payload))
        return b"".join(replies) + option_reply(option, p.REP_ACK)

    def _info(self, option: int, data: bytes) -> bytes:
        reader = _Reader(data)
        name = reader.text()
        wanted = {reader.u16() for _ in range(reader.u16())}
        reader.end()
        info = self._find(name)
        if info is None:
            return option_reply(option, p.REP_ERR_UNKNOWN, b"no such export")
        payloads = [p.export_info(info, self._export_flags(info))]
        if p.INFO_NAME in wanted:
            payloads.append(p.U16.pack(p.INFO_NAME) + info.name.encode())
        if p.INFO_DESCRIPTION in wanted and info.description:
            payloads.append(p.U16.pack(p.INFO_DESCRIPTION) + info.description.encode())
        # Any byte can be addressed: also a client that does not ask may know.
        payloads.append(p.block_size_info(info))
        if option == p.OPT_GO:
            self._agree(info)
        replies = [option_reply(option, p.REP_INFO, payload) for payload in payloads]
        return b"".join(replies) + option_reply(option, p.REP_ACK)

    def _structure(self, option: int, data: bytes) -> bytes:
        _Reader(data).end()
        self._structured = True
        return option_reply(option, p.REP_ACK)

    def _contexts(self, option: int, data: bytes) -> bytes:
        choose = option == p.OPT_SET_META_CONTEXT
        if choose:
            self._chosen = None
        reader = _Reader(data)
        name = reader.text()
        count = reader.u32()
        if count > p.MAX_CONTEXTS:
            return option_reply(option, p.REP_ERR_TOO_BIG)
        queries = [reader.text() for _ in range(count)]
        reader.end()
        if choose and not self._structured:
            raise _Malformed
        info = self._find(name)
        if info is None:
            return option_reply(option, p.REP_ERR_UNKNOWN, b"no such export")
        found = [(number, text) for number, text in enumerate(info.contexts) if _matches(text, queries, choose)]
        if choose:
            self._chosen = info.name, tuple(found)
        replies = [
            option_reply(option, p.REP_META_CONTEXT, p.U32.pack(number) + text.encode()) for number, text in found
        ]
        return b"".join(replies) + option_reply(option, p.REP_ACK)


_REFUSED: Final = {p.OPT_STARTTLS: b"this server has no TLS"}


def _matches(context: str, queries: list[str], choose: bool) -> bool:
    """Whether a query names the context; a list also takes a name that ends where a part of it does."""
    if choose:
        return context in queries
    prefixes = [query for query in queries if query.endswith(":")]
    return not queries or context in queries or any(context.startswith(prefix) for prefix in prefixes)
