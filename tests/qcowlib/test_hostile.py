# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Opening, reading and checking each hostile image: the promised outcome, in bounded time and memory.

Each case runs in a child of its own with 10 s of CPU and 512 MiB more than
the interpreter has; what it opens is seen by an audit hook.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback
from pathlib import Path
from typing import TypedDict

import pytest

import qcowlib
from qcowlib.errors import Error
from qcowlib.qcow2.check import check
from qcowlib.storage.file import FileStorage
from qcowlib.testing.hostile import HostileCase, hostile_cases, materialize

CPU_S = 10
MEMORY = 512 << 20
PIECE = 1 << 20

#: Events that nothing in a reader may raise.
FORBIDDEN = ("socket.connect", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")


class Result(TypedDict):
    """What a child tells."""

    outcome: str
    messages: list[str]
    corrupt: bool | None
    opened: list[str]


def _open_and_read(case: HostileCase, path: str, messages: list[str]) -> str:
    try:
        image = qcowlib.open(path, format="qcow2", references=qcowlib.same_directory())
    except Error as error:
        messages.append(str(error))
        return "refuse"
    try:
        with image:
            content = bytearray()
            while case.whole and (part := image.pread(PIECE, len(content))):
                content += part
            if not case.whole:
                image.pread(PIECE, 0)
                for number, _ in enumerate(image.extents(0, min(image.size, 1 << 40))):
                    if number > 100:
                        break
    except Error as error:
        messages.append(str(error))
        return "unreadable"
    return "open" if case.guest is None or content == case.guest else "wrong bytes"


def _check(path: str, messages: list[str]) -> bool | None:
    storage = FileStorage.open(path)
    try:
        report = check(storage)
    except Error as error:
        messages.append(str(error))
        return None
    finally:
        storage.close()
    # Whoever prints them all still prints bounded text; a few are looked at here.
    messages += [str(finding) for finding in report.findings[:50]]
    return report.corruptions > 0


def _child(case: HostileCase, folder: str) -> Result:
    path = materialize(case, folder)
    result: Result = {"outcome": "", "messages": [], "corrupt": None, "opened": []}
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event == "open":
            result["opened"].append(os.fsdecode(args[0]) if isinstance(args[0], (str, bytes)) else str(args[0]))
        elif event in FORBIDDEN:
            result["opened"].append(event)

    sys.addaudithook(hook)
    try:
        result["outcome"] = _open_and_read(case, path, result["messages"])
        result["corrupt"] = _check(path, result["messages"])
    except BaseException:
        result["outcome"] = traceback.format_exc()
    return result


def _run(case: HostileCase, folder: Path) -> Result:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.chdir(folder)
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(json.dumps(_child(case, str(folder))).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"ended by {os.waitstatus_to_exitcode(status)}"
    result: Result = json.loads(data)
    return result


@pytest.mark.parametrize("case", hostile_cases(), ids=lambda case: case.name)
def test_hostile_image_has_its_promised_outcome(tmp_path: Path, case: HostileCase) -> None:
    result = _run(case, tmp_path)
    allowed = {"gate": ("refuse",), "either": ("refuse", "open", "unreadable")}.get(case.expect, (case.expect,))
    assert result["outcome"] in allowed, result
    if case.corrupt is not None:
        assert result["corrupt"] == case.corrupt, result["messages"]
    for message in result["messages"]:
        assert message.isprintable(), message
    plain = {name for name, content in case.files if isinstance(content, bytes)}
    for name in result["opened"]:
        # N2: the image, its folder, plain files in it, names in it that are missing; and modules that are loaded late.
        inside = name in (str(tmp_path), str(tmp_path / "image.qcow2"), "image.qcow2") or name in plain
        inside = inside or (name[0] != "/" and ".." not in name and not os.path.lexists(tmp_path / name))
        assert inside or name.endswith((".py", ".pyc", ".so")), name
