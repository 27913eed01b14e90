# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The real qemu programs as tests use them: one command, or one long-lived qemu-io."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import qcowlib

__all__ = ["MapEntry", "QemuIo", "our_map", "qemu_img", "qemu_map", "run"]

_PROMPT = b"qemu-io> "
#: What qemu-io says when a command did not do what was asked.
_FAILURES = ("failed", "error", "rror:", "invalid", "Invalid")


def run(*words: str | Path, ok: bool = True, cwd: Path | None = None) -> str:
    """Run a program; returns what it wrote, error output too.  With *ok* it must succeed.

    Where qemu-img could not measure the time of a key derivation it is run again.
    """
    for _ in range(20):
        done = subprocess.run(
            [str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=cwd, check=False
        )
        text = done.stdout.decode(errors="replace")
        if "accurate CPU usage" not in text:
            break
    assert not ok or done.returncode == 0, f"{words}: exit {done.returncode}: {text}"
    return text


def qemu_img(*words: str | Path, ok: bool = True, cwd: Path | None = None) -> str:
    """Run qemu-img."""
    return run("qemu-img", *words, ok=ok, cwd=cwd)


class QemuIo:
    """One qemu-io with one image open; every command is answered before the next."""

    def __init__(self, path: Path, *words: str) -> None:
        self._process = subprocess.Popen(
            ["qemu-io", *words, "-f", "qcow2", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._answer()

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def _answer(self) -> str:
        assert self._process.stdout is not None
        data = b""
        while not data.endswith(_PROMPT):
            more = self._process.stdout.read1(65536)  # type: ignore[attr-defined]
            if not more:
                self._process.wait()
                raise AssertionError(f"qemu-io ended: {data.decode(errors='replace')}")
            data += more
        return data.removesuffix(_PROMPT).decode(errors="replace")

    def ask(self, command: str) -> str:
        """Return the answer to *command*, whatever it is."""
        assert self._process.stdin is not None
        self._process.stdin.write(command.encode() + b"\n")
        self._process.stdin.flush()
        return self._answer()

    def do(self, command: str) -> None:
        """Run *command*, which must succeed."""
        answer = self.ask(command)
        assert not any(word in answer for word in _FAILURES), f"{command}: {answer}"

    def close(self) -> None:
        """End it; the image is closed cleanly."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.stdout is not None
        rest = self._process.stdout.read()
        code = self._process.wait()
        self._process.stdout.close()
        # 1 when any command was refused, which ask() lets pass.
        assert code in (0, 1), f"qemu-io ended with {code}: {rest!r}"

    def kill(self) -> None:
        """End it at once, after a failed test."""
        self._process.kill()
        self._process.communicate()


class MapEntry(NamedTuple):
    """A line of ``qemu-img map --output=json``."""

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    offset: int | None


def _merged(entries: Iterator[MapEntry]) -> list[MapEntry]:
    out: list[MapEntry] = []
    for entry in entries:
        last = out[-1] if out else None
        if last is not None and last[2:6] == entry[2:6]:
            follows = last.offset + last.length if last.offset is not None else None
            if entry.offset == follows:
                out[-1] = last._replace(length=last.length + entry.length)
                continue
        out.append(entry)
    return out


def qemu_map(path: Path) -> list[MapEntry]:
    """What qemu-img says lies where."""
    entries: list[dict[str, Any]] = json.loads(qemu_img("map", "-U", "--output=json", path))
    return _merged(
        MapEntry(e["start"], e["length"], e["depth"], e["present"], e["zero"], e["data"], e.get("offset"))
        for e in entries
    )


def our_map(image: qcowlib.Image) -> list[MapEntry]:
    """The same from :meth:`qcowlib.Image.extents`."""
    return _merged(
        MapEntry(
            start,
            length,
            depth,
            present,
            kind in ("zero", "hole", "sparse"),
            kind in ("data", "compressed", "sparse"),
            offset,
        )
        for kind, start, length, offset, depth, present in image.extents()
    )
