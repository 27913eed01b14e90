# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The system calls of a program that change files, as strace saw them.

Invariant: calls come in the order in which they returned, each with the position at which it
began; those that failed are left out, and what cannot be read fails.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from qcowlib.testing.recorder import Op

__all__ = ["BARRIERS", "Call", "apply", "changed_file", "content_of", "data_op", "path_of", "trace"]

_DATA = ("write", "pwrite64", "pwritev", "pwritev2", "ftruncate", "fallocate", "copy_file_range", "sendfile")
_NAMES = ("openat", "mkdir", "mkdirat", "rmdir", "rename", "renameat", "renameat2", "unlink", "unlinkat", "linkat")
_SYMBOLIC = ("link", "symlink", "symlinkat", "open", "creat")
BARRIERS = ("fsync", "fdatasync")
_UNFINISHED = "<unfinished ...>"
_CALL = re.compile(r"(?P<name>\w+)\((?P<arguments>.*)\) += (?P<result>-?\d+)(?P<made><\S*>)?")
_SIGNS = re.compile(r'"[^"]*"|[\[{\]},]')
_BYTES = re.compile(r'"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?')


class Call(NamedTuple):
    """``began`` is the number of calls that had returned when it was made; ``made`` the path that open returned."""

    name: str
    arguments: tuple[str, ...]
    result: int
    made: str
    began: int


def trace(command: Sequence[str | Path], where: Path) -> Iterator[Call]:
    """Run *command* in *where*, which must succeed, and give its calls."""
    log = where / ".trace"
    names = ",".join((*_DATA, *_NAMES, *_SYMBOLIC, *BARRIERS))
    options = ["-f", "-y", "-qq", "-s", str(1 << 27), "--strings-in-hex=all", "-e", f"trace={names}", "-o", str(log)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        ["strace", *options, *command], cwd=where, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    text = log.read_text()
    log.unlink()
    returned = 0
    begun: dict[str, tuple[str, int]] = {}
    for line in text.splitlines():
        process, _, call = line.partition(" ")
        call, began = call.lstrip(), returned
        if call.endswith(_UNFINISHED):
            begun[process] = (call.removesuffix(_UNFINISHED), began)
            continue
        if call.startswith("<... "):
            head, began = begun.pop(process)
            call = head + call.partition(" resumed>")[2]
        match = _CALL.match(call)
        if match is not None and int(match["result"]) >= 0:
            returned += 1
            made = path_of("0" + match["made"]) if match["made"] else ""
            yield Call(match["name"], _split(match["arguments"]), int(match["result"]), made, began)


def _split(text: str) -> tuple[str, ...]:
    """Split arguments at the commas outside of brackets; strings are hexadecimal and hold none."""
    parts, depth, start = [], 0, 0
    for found in _SIGNS.finditer(text):
        sign = found[0]
        if sign in "[{":
            depth += 1
        elif sign in "]}":
            depth -= 1
        elif sign == "," and not depth:
            parts.append(text[start : found.start()].strip())
            start = found.end()
    return (*parts, text[start:].strip())


def _decoded(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


def path_of(argument: str, base: str = "") -> str:
    """Return the path that a descriptor stands for, or that a string names below that of *base*."""
    if argument.startswith('"'):
        name = content_of(argument).decode()
        return name if name.startswith("/") else os.path.normpath(os.path.join(path_of(base) if base else "", name))
    return _decoded(argument[argument.index("<") + 1 : argument.rindex(">")]).decode()


def content_of(argument: str) -> bytes:
    """Return the bytes of a string, or of all strings of a vector."""
    found = _BYTES.findall(argument)
    assert not any(more for _, more in found), "the trace is cut short"
    return b"".join(_decoded(piece) for piece, _ in found)


def data_op(call: Call, number: int, content: Callable[[str], bytes | bytearray], position: int = 0) -> Op | None:
    """Return what *call* does to the bytes of its file, which is *number* to the caller; ``None`` for other calls.

    *content* gives what a file holds, *position* is where a plain write goes.
    """
    name, words = call.name, call.arguments
    if name in ("write", "pwrite64", "pwritev", "pwritev2"):
        data = content_of(words[1])[: call.result]
        assert len(data) == call.result, "the trace is cut short"
        return Op("write", number, position if name == "write" else int(words[3]), call.result, data)
    if name == "copy_file_range":
        start, offset = int(words[1].strip("[]")), int(words[3].strip("[]"))
        return Op("write", number, offset, call.result, bytes(content(path_of(words[0]))[start : start + call.result]))
    if name == "ftruncate":
        return Op("resize", number, 0, int(words[1]))
    if name == "fallocate":
        size, offset, end = len(content(path_of(words[0]))), int(words[2]), int(words[2]) + int(words[3])
        if "PUNCH" in words[1]:
            return Op("discard", number, offset, end - offset)
        if "ZERO" in words[1]:
            end = min(end, size) if "KEEP" in words[1] else end
            return Op("zero", number, offset, max(0, end - offset))
        return Op("resize", number, 0, max(size, end))
    assert name != "sendfile", "sendfile is not understood"
    return None


def changed_file(call: Call) -> str | None:
    """Return the path of the file whose bytes *call* changes or makes durable."""
    if call.name not in _DATA and call.name not in BARRIERS:
        return None
    return path_of(call.arguments[2 if call.name == "copy_file_range" else 0])


def apply(content: bytearray, op: Op) -> None:
    """Carry out *op* on *content*."""
    end = op.offset + op.length
    if op.kind == "resize":
        content[op.length :] = bytes(max(0, op.length - len(content)))
        return
    if op.kind == "discard":
        end = min(end, len(content))
    elif len(content) < end:
        content.extend(bytes(end - len(content)))
    if op.offset < end:
        content[op.offset : end] = op.data if op.kind == "write" else bytes(end - op.offset)
