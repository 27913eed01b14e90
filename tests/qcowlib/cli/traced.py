# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What a command does to images, seen where the kernel sees it, as an operation log.

Invariant: the log played from the content at the start gives the content at the end, or
:func:`record` fails; so no way of changing a file goes unnoticed.  A barrier stands where the
call began, since what completes while it runs may not be covered.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qcowlib.testing.recorder import Op, OpLog
from tests.strace import BARRIERS, apply, changed_file, content_of, data_op, trace

__all__ = ["record"]


def record(command: Sequence[str | Path], files: Sequence[str], where: Path) -> OpLog:
    """Run *command* in *where*, which must succeed, and return what it did to *files*, numbered in order."""
    paths = [str((where / name).resolve()) for name in files]
    contents = [bytearray(Path(path).read_bytes() if Path(path).exists() else b"") for path in paths]
    log = OpLog()
    log.bases = [bytes(content) for content in contents]
    began: list[int] = []  # of each call that returned, where the log stood then

    def content(path: str) -> bytes | bytearray:
        return contents[paths.index(path)] if path in paths else Path(path).read_bytes()

    for call in trace(command, where):
        began.append(len(log))
        if call.name.startswith(("rename", "unlink")):
            names = {Path(content_of(word).decode()).name for word in call.arguments if word.startswith('"')}
            assert not names & set(files), f"{call.name} of {names}"
        path = changed_file(call)
        if path not in paths:
            continue
        number = paths.index(path)
        if call.name in BARRIERS:
            position = began[call.began] if call.began < len(began) else len(log)
            log.ops.insert(position, Op("flush", number, 0, 0))
        elif op := data_op(call, number, content):
            log.ops.append(op)
            apply(contents[number], op)
    for path, after in zip(paths, contents, strict=True):
        assert Path(path).read_bytes() == after, f"{path} was changed in a way that the trace does not show"
    return log
