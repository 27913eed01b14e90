# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Hostile images on the command line: a documented status, one clear line, nothing opened outside the folder.

Each command runs in a child of its own with 10 s of CPU and 512 MiB more than
the interpreter has; what it opens is seen by an audit hook.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from qcowlib.cli.main import main
from qcowlib.testing.hostile import HostileCase, hostile_cases, materialize

CPU_S = 10
MEMORY = 512 << 20
STATUSES = {"info": {0, 1}, "check": {0, 1, 2, 3}, "map": {0, 1}, "convert": {0, 1}}
#: Events that none of these commands may raise.
FORBIDDEN = ("socket.connect", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")
CASES = hostile_cases()
LONG = int(os.environ.get("QCOWLIB_LONG", "1")) > 1


class Outcome(NamedTuple):
    """What one command did."""

    status: int
    out: str
    err: str
    opened: list[str]


def _limit() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))


def _child(argv: Sequence[str], folder: Path, report: int) -> None:
    """Run the command; never returns."""
    opened: list[str] = []

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event == "open":
            opened.append(os.fsdecode(args[0]) if isinstance(args[0], (str, bytes)) else str(args[0]))
        elif event in FORBIDDEN:
            opened.append(event)

    os.chdir(folder)
    os.environ["QCOW_REFERENCES"] = "folder"
    for fd, name in ((1, "stdout"), (2, "stderr")):
        target = os.open(folder.parent / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, fd)
    _limit()
    sys.addaudithook(hook)
    status = main(argv, "qcow")
    with os.fdopen(report, "w") as pipe:
        json.dump([status, opened], pipe)


def _run(argv: Sequence[str], folder: Path) -> Outcome:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _child(argv, folder, writer)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        data = pipe.read()
    _, ended = os.waitpid(pid, 0)
    assert ended == 0, f"{argv}: ended by {os.waitstatus_to_exitcode(ended)}"
    assert data, f"{argv}: an exception left the command"
    status, opened = json.loads(data)
    out, err = ((folder.parent / name).read_text(errors="replace") for name in ("stdout", "stderr"))
    return Outcome(status, out, err, opened)


def _commands(case: HostileCase) -> list[list[str]]:
    look = [["info", "-f", "qcow2"], ["info", "--output=json"], ["info", "--backing-chain"], ["check", "-f", "qcow2"]]
    # Some are so large that reading from end to end would take for ever.
    whole = [["map", "-f", "qcow2", "--output=json"], ["convert", "-f", "qcow2", "-O", "raw"]]
    look += whole if case.whole else [["map", "-f", "qcow2", "-l", "1M"]]
    return look


def _judge(case: HostileCase, argv: list[str], outcome: Outcome, folder: Path) -> None:
    told = (argv, outcome)
    assert outcome.status in STATUSES[argv[0]], told
    assert "Traceback" not in outcome.err, told
    assert "internal error" not in outcome.err, told
    for line in (outcome.out + outcome.err).split("\n"):
        assert line.isprintable(), told
    if outcome.status == 1 and argv[0] != "check":
        assert sum(line.startswith("qcow: ") for line in outcome.err.splitlines()) == 1, told
    if case.expect in ("refuse", "gate") and argv[0] in ("map", "convert"):
        assert outcome.status == 1, told
    plain = {name for name, content in case.files if isinstance(content, bytes)} | {"image.qcow2", "result"}
    for name in outcome.opened:
        inside = name in (str(folder), ".") or os.path.relpath(os.path.join(folder, name), folder) in plain
        inside = inside or (name[0] != "/" and ".." not in name and not os.path.lexists(folder / name))
        # Modules that are loaded late, and the clock's zone for the dates of snapshots.
        assert inside or name.endswith((".py", ".pyc", ".so")) or "zoneinfo" in name or name == "/etc/localtime", told


@pytest.mark.fuzz
@pytest.mark.parametrize("case", CASES if LONG else CASES[::9], ids=lambda case: case.name)
def test_hostile_image_gives_one_clear_line(tmp_path: Path, case: HostileCase) -> None:
    folder = tmp_path / "stage"
    folder.mkdir()
    materialize(case, str(folder))
    for words in _commands(case):
        argv = [*words, "image.qcow2", *(["result"] if words[0] == "convert" else [])]
        _judge(case, argv, _run(argv, folder), folder)
