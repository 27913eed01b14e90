# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""System calls that the standard library lacks, through libc.

Invariant: imported only at first use, because loading ctypes costs more than
opening an image; each function raises :class:`OSError` with the errno of the
call and nothing else.  The GIL is released during the call.

Source: fallocate(2), statx(2), sync_file_range(2), fsopen(2), fsconfig(2), fsmount(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys

__all__ = ["KEEP_SIZE", "PUNCH_HOLE", "ZERO_RANGE", "direct_alignment", "fallocate", "open_mount", "start_writeback"]

KEEP_SIZE = 0x01
PUNCH_HOLE = 0x02
ZERO_RANGE = 0x10

_SYNC_FILE_RANGE_WRITE = 0x02
_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_STATX_SIZE = 256
_STATX_DIO_MEMORY = 0x98
_STATX_DIO_OFFSET = 0x9C
# The same numbers on all machines that the kernel runs on but alpha; C libraries name these calls only lately.
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_CLOEXEC = 1
_SET_FLAG, _SET_STRING, _CREATE = 0, 1, 6
_NOSUID_NODEV_NOEXEC = 0x2 | 0x4 | 0x8

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = getattr(_libc, "fallocate64", None) or _libc.fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_fallocate.restype = ctypes.c_int


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Call fallocate(2), again after a signal."""
    while _fallocate(fd, mode, offset, length) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def start_writeback(fd: int) -> None:
    """Have the kernel begin to write the dirty pages of a file; nothing is promised, and errors wait for the flush."""
    call = getattr(_libc, "sync_file_range", None)
    if call is not None:
        call(fd, ctypes.c_int64(0), ctypes.c_int64(0), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))


def direct_alignment(fd: int) -> tuple[int, int] | None:
    """Return (offset, memory) alignment of direct I/O on a file, ``None`` where the kernel does not tell.

    A read would not do as a probe: holes are read without a check.
    """
    statx = getattr(_libc, "statx", None)
    if statx is None:
        return None
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    if statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buffer) != 0:
        return None
    raw = buffer.raw
    if not int.from_bytes(raw[:4], sys.byteorder) & _STATX_DIOALIGN:
        return None
    memory = int.from_bytes(raw[_STATX_DIO_MEMORY : _STATX_DIO_MEMORY + 4], sys.byteorder)
    offset = int.from_bytes(raw[_STATX_DIO_OFFSET : _STATX_DIO_OFFSET + 4], sys.byteorder)
    return (offset, memory) if offset and memory else None


def _system_call(number: int, *arguments: object) -> int:
    result: int = _libc.syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def open_mount(device: str, kind: str) -> int:
    """Mount a file system of *kind* nowhere, and return a descriptor of its top directory.

    It is unmounted when the descriptor is closed, at the latest when the
    process ends, however that happens.  Each change is on the device when
    its call returns.
    """
    context = _system_call(_FSOPEN, kind.encode(), _CLOEXEC)
    try:
        _system_call(_FSCONFIG, context, _SET_STRING, b"source", os.fsencode(device), 0)
        for flag in (b"sync", b"dirsync"):
            _system_call(_FSCONFIG, context, _SET_FLAG, flag, None, 0)
        _system_call(_FSCONFIG, context, _CREATE, None, None, 0)
        return _system_call(_FSMOUNT, context, _CLOEXEC, _NOSUID_NODEV_NOEXEC)
    finally:
        os.close(context)
