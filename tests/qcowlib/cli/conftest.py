# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Runs the real qemu-img and our command side by side on equal scratch directories.

Invariant: both see the same relative names, the same working directory layout
and the same environment; only the program differs.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from qcowlib.cli.main import main


class Outcome(NamedTuple):
    """What one command line did."""

    status: int
    out: str
    err: str


def _run(command: list[str], where: Path) -> subprocess.CompletedProcess[bytes]:
    """Run a real program; making LUKS keys fails now and then on a busy machine."""
    for _ in range(20):
        done = subprocess.run(
            command, cwd=where, capture_output=True, stdin=subprocess.DEVNULL, check=False, timeout=120
        )
        if b"accurate CPU usage" not in done.stderr:
            break
    return done


def run_real(argv: Sequence[str], where: Path) -> Outcome:
    """Run the real qemu-img."""
    done = _run(["qemu-img", *argv], where)
    return Outcome(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


def run_ours(argv: Sequence[str], where: Path, prog: str = "qemu-img") -> Outcome:
    """Run our command in this process, with its file descriptors captured."""
    before = os.getcwd()  # noqa: PTH109
    saved = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        os.chdir(where)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            status = main(list(argv), prog)
        finally:
            for fd, kept in zip((1, 2), saved, strict=True):
                os.dup2(kept, fd)
                os.close(kept)
            os.chdir(before)
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
    return Outcome(status, texts[0], texts[1])


def split(line: str) -> list[str]:
    """Split a command line as the shell does."""
    return shlex.split(line)


def visible(outcome: Outcome) -> Outcome:
    """Hide what depends on the run: dates, uuids, the allocation of the host file system."""
    out = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "DATE", outcome.out)
    out = re.sub(r'"date-n?sec": \d+', '"date"', out)
    out = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID", out)
    out = re.sub(r"#block\d+", "#block", out)
    out = re.sub(r"in \d+\.\d{3} seconds", "in TIME seconds", out)
    out = re.sub(r"iters\"?: \d+", "iters", out)
    err = re.sub(r"#block\d+", "#block", outcome.err)
    return Outcome(outcome.status, out, err)


def _real_words(line: str) -> list[str]:
    words = split(line)
    if words[0] != "io":
        return ["qemu-img", *words]
    form = words[1:3] if words[1] == "-f" else []
    name, *commands = words[1 + len(form) :]
    return ["qemu-io", *form, *(word for command in commands for word in ("-c", command)), name]


class Pair:
    """Two scratch directories that start out equal."""

    def __init__(self, root: Path) -> None:
        self.real = root / "real"
        self.ours = root / "ours"
        self.real.mkdir()
        self.ours.mkdir()

    def setup(self, *lines: str) -> None:
        """Run real commands in both directories (``io [-f FORMAT] NAME COMMAND...`` is qemu-io).

        ``file NAME LINE...`` writes a text file.
        """
        for where in (self.real, self.ours):
            for line in lines:
                if line.startswith("file "):
                    name, *texts = split(line)[1:]
                    (where / name).write_text("".join(f"{text}\n" for text in texts))
                    continue
                _run(_real_words(line), where).check_returncode()

    def attempt(self, line: str) -> None:
        """Run a real command in both directories; it may fail, in both alike."""
        real, ours = (_run(_real_words(line), where) for where in (self.real, self.ours))
        assert ours.returncode == real.returncode, (line, ours.stdout, ours.stderr)

    def compare(self, line: str | Sequence[str], *, sizes: bool = True) -> Outcome:
        """Run *line* with both programs; the visible outcome must be the same, and is returned.

        Without *sizes* what the files occupy on the host may differ.
        """
        argv = split(line) if isinstance(line, str) else list(line)
        real = visible(run_real(argv, self.real))
        ours = visible(run_ours(argv, self.ours))
        if not sizes:
            real, ours = (
                each._replace(out=re.sub(r'(disk size|"actual-size"): [\d.]+( \w+)?', "disk size", each.out))
                for each in (real, ours)
            )
        assert ours == real, f"{shlex.join(argv)}"
        return ours


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """Two equal scratch directories, one for each program."""
    return Pair(tmp_path)


@pytest.fixture
def qcow(tmp_path: Path) -> Callable[..., Outcome]:
    """Give a function that runs our command in a scratch directory, under its own name."""

    def run(*argv: str, prog: str = "qcow") -> Outcome:
        return run_ours(argv, tmp_path, prog)

    return run
