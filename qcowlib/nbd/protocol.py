# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The NBD protocol on the wire: numbers, limits, encoding.

Invariant: pure; every length that a client names is compared with a limit of
this module before anything of that length is kept.
Source: the protocol document of the NBD project (fixed newstyle, simple and
structured replies).
"""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

from qcowlib.units import KiB, MiB

__all__ = [
    "MAX_PAYLOAD",
    "ExportInfo",
    "block_size_info",
    "export_info",
    "option_reply",
    "simple_reply",
    "structured_chunk",
    "structured_error",
]

# -- limits ----------------------------------------------------------------------

MAX_PAYLOAD: Final = 32 * MiB
"""Bytes that one read or write may move."""
MAX_OPTION: Final = 64 * KiB
"""Bytes of an option that are looked at; a longer one is refused and skipped."""
MAX_SKIP: Final = 1 * MiB
"""Bytes of a refused option that are skipped; with more the client is disconnected."""
MAX_OPTIONS: Final = 1024
"""Options in one negotiation."""
MAX_ANSWER: Final = 64 * KiB
"""Bytes of answers to options, above which these are sent before the next option is looked at."""
MAX_NAME: Final = 4096
"""Bytes of a string of the protocol."""
MAX_CONTEXTS: Final = 64
"""Queries for metadata contexts in one option."""

# -- negotiation -------------------------------------------------------------------

NBD_MAGIC: Final = 0x4E42444D41474943
OPTION_MAGIC: Final = 0x49484156454F5054
OPTION_REPLY_MAGIC: Final = 0x3E889045565A9

FIXED_NEWSTYLE: Final = 1
NO_ZEROES: Final = 2

OPT_EXPORT_NAME: Final = 1
OPT_ABORT: Final = 2
OPT_LIST: Final = 3
OPT_STARTTLS: Final = 5
OPT_INFO: Final = 6
OPT_GO: Final = 7
OPT_STRUCTURED_REPLY: Final = 8
OPT_LIST_META_CONTEXT: Final = 9
OPT_SET_META_CONTEXT: Final = 10

REP_ACK: Final = 1
REP_SERVER: Final = 2
REP_INFO: Final = 3
REP_META_CONTEXT: Final = 4
REP_ERR_UNSUP: Final = 1 << 31 | 1
REP_ERR_INVALID: Final = 1 << 31 | 3
REP_ERR_UNKNOWN: Final = 1 << 31 | 6
REP_ERR_TOO_BIG: Final = 1 << 31 | 9

INFO_EXPORT: Final = 0
INFO_NAME: Final = 1
INFO_DESCRIPTION: Final = 2
INFO_BLOCK_SIZE: Final = 3

# -- flags of an export ------------------------------------------------------------

HAS_FLAGS: Final = 1 << 0
READ_ONLY: Final = 1 << 1
SEND_FLUSH: Final = 1 << 2
SEND_FUA: Final = 1 << 3
SEND_TRIM: Final = 1 << 5
SEND_WRITE_ZEROES: Final = 1 << 6
SEND_DF: Final = 1 << 7
CAN_MULTI_CONN: Final = 1 << 8
SEND_CACHE: Final = 1 << 10
SEND_FAST_ZERO: Final = 1 << 11

# -- transmission ------------------------------------------------------------------

REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF

CMD_READ: Final = 0
CMD_WRITE: Final = 1
CMD_DISC: Final = 2
CMD_FLUSH: Final = 3
CMD_TRIM: Final = 4
CMD_CACHE: Final = 5
CMD_WRITE_ZEROES: Final = 6
CMD_BLOCK_STATUS: Final = 7

FLAG_FUA: Final = 1 << 0
FLAG_NO_HOLE: Final = 1 << 1
FLAG_DF: Final = 1 << 2
FLAG_REQ_ONE: Final = 1 << 3
FLAG_FAST_ZERO: Final = 1 << 4

REPLY_DONE: Final = 1
REPLY_NONE: Final = 0
REPLY_OFFSET_DATA: Final = 1
REPLY_BLOCK_STATUS: Final = 5
REPLY_ERROR: Final = 1 << 15 | 1

STATE_HOLE: Final = 1
STATE_ZERO: Final = 2
STATE_DIRTY: Final = 1

EPERM: Final = 1
EIO: Final = 5
ENOMEM: Final = 12
EINVAL: Final = 22
ENOSPC: Final = 28
EOVERFLOW: Final = 75
ENOTSUP: Final = 95

GREETING: Final = Struct(">QQH")
OPTION: Final = Struct(">QII")
OPTION_REPLY: Final = Struct(">QIII")
REQUEST: Final = Struct(">IHHQQI")
SIMPLE_REPLY: Final = Struct(">IIQ")
CHUNK: Final = Struct(">IHHQI")
DATA_CHUNK: Final = Struct(">IHHQIQ")
U16: Final = Struct(">H")
U32: Final = Struct(">I")
EXTENT: Final = Struct(">II")
_EXPORT: Final = Struct(">HQH")
_BLOCK_SIZE: Final = Struct(">HIII")
_ERROR: Final = Struct(">IH")


class ExportInfo(NamedTuple):
    """What negotiation tells of an export; *contexts* are its metadata contexts by name."""

    name: str
    description: str
    size: int
    flags: int
    preferred: int
    contexts: tuple[str, ...]


def option_reply(option: int, kind: int, data: bytes = b"") -> bytes:
    """Return the reply to an option."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data


def export_info(info: ExportInfo, flags: int) -> bytes:
    """Return the payload of INFO_EXPORT."""
    return _EXPORT.pack(INFO_EXPORT, info.size, flags)


def block_size_info(info: ExportInfo) -> bytes:
    """Return the payload of INFO_BLOCK_SIZE: any byte can be addressed."""
    return _BLOCK_SIZE.pack(INFO_BLOCK_SIZE, 1, info.preferred, MAX_PAYLOAD)


def simple_reply(error: int, cookie: int) -> bytes:
    """Return the head of a simple reply."""
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)


def structured_chunk(flags: int, kind: int, cookie: int, payload: bytes = b"") -> bytes:
    """Return a chunk of a structured reply."""
    return CHUNK.pack(STRUCTURED_REPLY_MAGIC, flags, kind, cookie, len(payload)) + payload


def structured_error(error: int, cookie: int, text: str) -> bytes:
    """Return the chunk that ends a structured reply with an error; *text* is cut to a string of the protocol."""
    message = text.encode("utf-8", "backslashreplace")[:MAX_NAME].decode("utf-8", "ignore").encode()
    return structured_chunk(REPLY_DONE, REPLY_ERROR, cookie, _ERROR.pack(error, len(message)) + message)
