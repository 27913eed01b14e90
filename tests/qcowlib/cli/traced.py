# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What a command does to files, seen where the kernel sees it: its system calls under strace as an operation log.

Invariant: the log played from the content at the start gives the content at the end, or
:func:`record` fails; so no way of changing a file goes unnoticed.  A barrier stands where the
call began, since what completes while it runs may not be covered.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from qcowlib.testing.recorder import Op, OpLog

__all__ = ["record"]

_CALLS = (
    "write,pwrite64,pwritev,pwritev2,fsync,fdatasync,ftruncate,fallocate,copy_file_range,sendfile,"
    "rename,renameat,renameat2,unlink,unlinkat"
)
_LINE = re.compile(r"(\d+) +(?:<\.\.\. \w+ resumed>(?P<rest>.*)|(?P<call>.*?)(?P<open> *<unfinished \.\.\.>)?)")
_CALL = re.compile(r"(?P<name>\w+)\((?P<arguments>.*)\) += (?P<result>-?\d+)")
_FILE = re.compile(r"\d+<(?P<path>(?:\\x[0-9a-f]{2})*)>")
_BYTES = re.compile(r'"((?:\\x[0-9a-f]{2})*)"(?!\.)')


def record(command: Sequence[str | Path], files: Sequence[str], where: Path) -> OpLog:
    """Run *command* in *where*, which must succeed, and return what it did to *files*, numbered in order."""
    trace = where / "trace"
    player = _Player([where / name for name in files])
    options = ["-f", "-y", "-qq", "-s", str(1 << 27), "--strings-in-hex=all", "-e", f"trace={_CALLS}", "-o", str(trace)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        ["strace", *options, *command], cwd=where, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    player.play(trace.read_text())
    trace.unlink()
    for path, content in zip(player.paths, player.contents, strict=True):
        assert path.read_bytes() == content, f"{path.name} was changed in a way that the trace does not show"
    return player.log


class _Player:
    """Carries out traced calls on copies of the files and logs them."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = [path.resolve() for path in paths]
        self.contents = [bytearray(path.read_bytes() if path.exists() else b"") for path in paths]
        self.log = OpLog()
        self.log.bases = [bytes(content) for content in self.contents]

    def play(self, text: str) -> None:
        """Take the calls in the order in which they returned."""
        begun: dict[str, tuple[str, int]] = {}
        for line in text.splitlines():
            found = _LINE.fullmatch(line)
            if found is None:
                continue
            position = len(self.log)
            call = found["call"]
            if found["open"]:
                begun[found[1]] = (call, position)
                continue
            if call is None:
                call, position = begun.pop(found[1])
                call += found["rest"]
            match = _CALL.match(call)
            if match is not None and int(match["result"]) >= 0:
                self._call(match["name"], match["arguments"], int(match["result"]), position)

    def _call(self, name: str, arguments: str, result: int, position: int) -> None:
        files = [self._number(found["path"]) for found in _FILE.finditer(arguments)]
        number = files[-1] if files else None
        if name.startswith(("rename", "unlink")):
            gone = {Path(bytes.fromhex(path.replace("\\x", "")).decode()).name for path in _BYTES.findall(arguments)}
            assert not gone & {path.name for path in self.paths}, f"{name} of {gone}"
        if number is None:
            return
        numbers = [int(word) for word in re.findall(r"(?<![\w\\<])\d+(?![\w<])", _BYTES.sub("", arguments))]
        if name in ("fsync", "fdatasync"):
            self.log.ops.insert(position, Op("flush", number, 0, 0))
        elif name in ("pwrite64", "pwritev", "pwritev2"):
            data = b"".join(bytes.fromhex(piece.replace("\\x", "")) for piece in _BYTES.findall(arguments))[:result]
            assert len(data) == result, "the trace is cut short"
            offset = numbers[-1] if name != "pwritev2" else numbers[-2]
            self._add(Op("write", number, offset, result, data))
        elif name == "copy_file_range":
            start, offset = (int(word) for word in re.findall(r"\[(\d+)\]", arguments))
            source = next(_FILE.finditer(arguments))["path"]
            self._add(Op("write", number, offset, result, self._content(source)[start : start + result]))
        elif name == "ftruncate":
            self._add(Op("resize", number, 0, numbers[-1]))
        elif name == "fallocate":
            offset, length = numbers[-2:]
            kind = "discard" if "PUNCH" in arguments else "zero" if "ZERO" in arguments else "resize"
            if kind == "resize":
                self._add(Op("resize", number, 0, max(len(self.contents[number]), offset + length)))
            elif kind == "zero":
                end = min(offset + length, len(self.contents[number])) if "KEEP" in arguments else offset + length
                self._add(Op("zero", number, offset, max(0, end - offset)))
            else:
                self._add(Op("discard", number, offset, length))
        else:
            raise AssertionError(f"{name} on {self.paths[number].name} is not understood")

    def _number(self, path: str) -> int | None:
        name = Path(bytes.fromhex(path.replace("\\x", "")).decode())
        return self.paths.index(name) if name in self.paths else None

    def _content(self, path: str) -> bytes:
        number = self._number(path)
        if number is not None:
            return bytes(self.contents[number])
        return Path(bytes.fromhex(path.replace("\\x", "")).decode()).read_bytes()

    def _add(self, op: Op) -> None:
        self.log.ops.append(op)
        content = self.contents[op.storage]
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
