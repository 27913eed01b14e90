# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What a power cut can leave of a directory tree, from the system calls of whoever changed it.

The model, that of a file system with an ordered journal: names change in order, and those made
up to the last fsync of one of their directories are there; of each file's bytes those up to its
last fsync are there, and of later ones nothing, a part from the front, or all.

Invariant: the trace played to its end gives the tree that is there, or :func:`record` fails.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from qcowlib.testing.recorder import Op
from tests.strace import BARRIERS, Call, apply, changed_file, data_op, path_of, trace

__all__ = ["TreeLog", "record", "states"]

#: Files are written in pieces of so much, those of zeros left out.
_PIECE = 1 << 16

#: Paths below the root to the number of a file, ``None`` for a directory.
Names = dict[str, int | None]
#: The same to the content of a file.
Shown = dict[str, bytes | None]


class Renamed(NamedTuple):
    """A change of names: *edit* makes it, *folders* are the directories in which it is seen."""

    edit: Callable[[Names], None]
    folders: tuple[str, ...]


class Synced(NamedTuple):
    """A barrier of a file (its number) or of a directory (its path)."""

    what: int | str


class TreeLog(NamedTuple):
    """The tree at the start and what happened; the number of an Op is that of its file."""

    names: Names
    contents: list[bytes]
    steps: list[Op | Renamed | Synced]


def _scan(root: Path) -> tuple[Names, list[bytes]]:
    names: Names = {}
    contents: list[bytes] = []
    inodes: dict[int, int] = {}
    for folder, below, files in os.walk(root):
        for name in below:
            names[os.path.relpath(os.path.join(folder, name), root)] = None
        for name in files:
            path = Path(folder, name)
            number = inodes.setdefault(path.stat().st_ino, len(contents))
            if number == len(contents):
                contents.append(path.read_bytes())
            names[os.path.relpath(path, root)] = number
    return names, contents


def record(command: Sequence[str | Path], root: Path) -> TreeLog:
    """Run *command* beside *root*, which must succeed, and return what it did to the tree."""
    return _Player(root).play(trace(command, root.parent))


class _Player:
    """The tree as it is between two calls, and the log so far."""

    def __init__(self, root: Path) -> None:
        self._root = root
        names, contents = _scan(root)
        self._log = TreeLog(dict(names), contents, [])
        self._names = names
        self._files = [bytearray(content) for content in contents]
        self._positions: dict[str, int] = {}

    def play(self, calls: Iterator[Call]) -> TreeLog:
        for call in calls:
            path = changed_file(call)
            if path is None:
                self._rename(call)
            elif (below := self._below(path)) is not None:
                self._change(call, below)
        names, contents = _scan(self._root)
        assert names.keys() == self._names.keys(), "names were changed in a way that the trace does not show"
        for path, number in names.items():
            ours = self._names[path]
            assert (number is None) == (ours is None), path
            assert number is None or ours is None or contents[number] == self._files[ours], path
        return self._log

    def _below(self, path: str) -> str | None:
        below = os.path.relpath(path, self._root)
        return None if below.startswith("../") or path.endswith(" (deleted)") else below

    def _change(self, call: Call, below: str) -> None:
        number = self._names.get(below) if below != "." else None
        if call.name in BARRIERS:
            self._log.steps.append(Synced(below if number is None else number))
            return
        assert number is not None, f"{call.name} on {below}"
        at = self._positions.get(below, 0)
        op = data_op(call, number, lambda path: self._files[self._names[self._below(path) or ""] or 0], at)
        if op is not None:
            if call.name == "write":
                self._positions[below] = at + op.length
            self._log.steps.append(op)
            apply(self._files[number], op)

    def _rename(self, call: Call) -> None:
        words = call.arguments
        name = call.name
        if name == "openat":
            self._opened(call)
        elif name.startswith(("mkdir", "rmdir", "unlink")):
            below = self._below(path_of(words[1], words[0]) if name.endswith("at") else path_of(words[0]))
            if below is not None:
                self._do(_Make(below, None) if name.startswith("mkdir") else _Drop(below), below)
        elif name.startswith("rename") or name == "linkat":
            new = path_of(words[3], words[2]) if name != "rename" else path_of(words[1])
            old = path_of(words[1], words[0]) if name != "rename" else path_of(words[0])
            before, after = self._below(old), self._below(new)
            assert (before is None) == (after is None), call
            if before is not None and after is not None:
                self._do(_Move(before, after, keep=name == "linkat"), before, after)
        else:
            raise AssertionError(f"{name} is not understood")

    def _opened(self, call: Call) -> None:
        below = self._below(call.made)
        if below is None or not set(call.arguments[2].split("|")) & {"O_CREAT", "O_TRUNC"}:
            return
        self._positions[below] = 0
        number = self._names.get(below)
        if number is None:
            self._files.append(bytearray())
            self._log.contents.append(b"")
            self._do(_Make(below, len(self._files) - 1), below)
        elif "O_TRUNC" in call.arguments[2]:
            self._log.steps.append(op := Op("resize", number, 0, 0))
            apply(self._files[number], op)

    def _do(self, edit: Callable[[Names], None], *paths: str) -> None:
        self._log.steps.append(Renamed(edit, tuple(os.path.dirname(path) or "." for path in paths)))
        edit(self._names)


class _Make(NamedTuple):
    path: str
    number: int | None

    def __call__(self, names: Names) -> None:
        names[self.path] = self.number


class _Drop(NamedTuple):
    path: str

    def __call__(self, names: Names) -> None:
        del names[self.path]


class _Move(NamedTuple):
    old: str
    new: str
    keep: bool

    def __call__(self, names: Names) -> None:
        moved = {path: number for path, number in names.items() if f"{path}/".startswith(f"{self.old}/")}
        for path, number in moved.items():
            if not self.keep:
                del names[path]
            names[self.new + path[len(self.old) :]] = number


def states(log: TreeLog, place: Path, *, most: int, seed: int = 1) -> Iterator[str]:
    """Write at most *most* of the states, drawn evenly, as the tree *place*, emptied before, and say which it is."""
    random = Random(seed)
    found = list(_states(log, random))
    for what, shown in found if len(found) <= most else random.sample(found, most):
        _write(place, shown)
        yield what


def _states(log: TreeLog, random: Random) -> Iterator[tuple[str, Shown]]:
    durable = list(log.contents)
    pending: list[list[Op]] = [[] for _ in durable]
    kept = 0  # how many steps' names are durable
    seen: set[int] = set()
    for position in range(len(log.steps) + 1):
        step = log.steps[position] if position < len(log.steps) else None
        if not isinstance(step, Op):
            for until in {kept, position}:
                names = dict(log.names)
                for earlier in log.steps[:until]:
                    if isinstance(earlier, Renamed):
                        earlier.edit(names)
                for share in ("none", "part", "all"):
                    contents = [_part(*one, share, random) for one in zip(durable, pending, strict=True)]
                    shown = {path: None if number is None else contents[number] for path, number in names.items()}
                    key = hash(frozenset(shown.items()))
                    if key not in seen:
                        seen.add(key)
                        yield f"before step {position}: names of {until}, {share} of what is not durable", shown
        if isinstance(step, Op):
            pending[step.storage].append(step)
        elif isinstance(step, Synced) and isinstance(step.what, int):
            durable[step.what] = _part(durable[step.what], pending[step.what], "all", random)
            pending[step.what].clear()
        elif isinstance(step, Synced):
            for index in range(kept, position):
                earlier = log.steps[index]
                if isinstance(earlier, Renamed) and step.what in earlier.folders:
                    kept = index + 1


def _part(durable: bytes, pending: list[Op], share: str, random: Random) -> bytes:
    count = {"none": 0, "all": len(pending), "part": random.randint(0, len(pending))}[share]
    if not count:
        return durable
    content = bytearray(durable)
    for op in pending[:count]:
        apply(content, op)
    return bytes(content)


def _write(place: Path, shown: Shown) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for path in sorted(shown):
        data = shown[path]
        if data is None:
            (place / path).mkdir()
        else:
            with (place / path).open("wb") as file:
                for at in range(0, len(data), _PIECE):
                    if (piece := data[at : at + _PIECE]).count(0) < len(piece):
                        file.seek(at)
                        file.write(piece)
                file.truncate(len(data))
