# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Runs the examples of a text: its fenced blocks in order, in one directory, with one set of Python names.

Invariant: what a ``python`` block prints is exactly what its ``# ->`` comments
say, in order (``...`` stands for anything); an ``sh`` block succeeds, and
prints what its comments say if it has any.  A block of any other kind, but
``text``, is an error, so that no example goes unexecuted.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

__all__ = ["Block", "blocks", "compare_output", "run_blocks", "with_qcow"]

ROOT = Path(__file__).resolve().parents[2]

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_EXPECTED = re.compile(r"# -> ?(.*?)\s*$", re.MULTILINE)


class Block(NamedTuple):
    """One fenced block; *line* is that of its first line in the file."""

    kind: str
    code: str
    line: int

    @property
    def expected(self) -> list[str]:
        """The lines that it has to print."""
        return _EXPECTED.findall(self.code)


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of *text*, in order."""
    return [
        Block(match.group(1), match.group(2), text.count("\n", 0, match.start()) + 2) for match in _FENCE.finditer(text)
    ]


def compare_output(printed: str, expected: list[str], where: str) -> None:
    """Fail unless the lines of *printed* are *expected*."""
    lines = [line.rstrip() for line in printed.splitlines()]
    same = len(lines) == len(expected) and all(
        re.fullmatch(re.escape(pattern).replace(r"\.\.\.", ".*"), line)
        for pattern, line in zip(expected, lines, strict=True)
    )
    assert same, f"{where}\n  printed:  {lines}\n  promised: {expected}"


def with_qcow(folder: Path) -> dict[str, str]:
    """Make ``qcow`` in *folder* and return an environment that finds it."""
    folder.mkdir(exist_ok=True)
    program = folder / "qcow"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m qcowlib "$@"\n')
    program.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "LC_ALL": "C.UTF-8",
    }


def run_blocks(path: Path, tools: Path, *, leave_out: str | None = None) -> int:
    """Run the blocks of *path* in the current directory, but those that match *leave_out*; returns how many ran."""
    names: dict[str, object] = {"__name__": "example"}
    environment = with_qcow(tools)
    count = 0
    for block in blocks(path.read_text()):
        where = f"{path.name}:{block.line}"
        if block.kind == "text" or (leave_out is not None and re.search(leave_out, block.code, re.MULTILINE)):
            continue
        if block.kind == "python":
            output = io.StringIO()
            code = compile("\n" * (block.line - 1) + block.code, str(path), "exec")
            with contextlib.redirect_stdout(output):
                exec(code, names)
            compare_output(output.getvalue(), block.expected, where)
        else:
            assert block.kind == "sh", f"{where}: a block of kind '{block.kind}' is not executed"
            result = subprocess.run(
                ["sh", "-eu", "-c", block.code], env=environment, capture_output=True, text=True, timeout=120
            )
            assert result.returncode == 0, f"{where}: status {result.returncode}: {result.stderr}"
            if block.expected:
                compare_output(result.stdout, block.expected, where)
        count += 1
    return count
