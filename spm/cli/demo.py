# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Three hosts on one pool: the manager is killed in the middle of a merge, another takes over and ends it.

With a lease daemon for each host where sanlock is installed, else in the
simulator; the steps say which.

Invariant: everything happens in one temporary directory, and every process
that was started is ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from qcowlib.errors import Error
from spm.cli.endpoint import ask
from storage_pool.check import check_domain
from storage_pool.cli.demo import Problem, Result
from storage_pool.embedded import FileToken
from storage_pool.file_domain import FileDomain
from storage_pool.ids import make_id
from storage_pool.lease_records import lockspace_area
from storage_pool.pool import StoragePool

__all__ = ["hosts_demo"]

_HOSTS = 3
_SMALL_IO_TIMEOUT_S = 1
_LIMIT_S = 60.0


def hosts_demo(tell: Callable[[Result], None], directory: str | None = None) -> list[Result]:
    """Run the steps; *tell* hears of each at once."""
    results: list[Result] = []

    def step(kind: str, name: str, work: Callable[[], str]) -> bool:
        began = time.monotonic()
        try:
            text, problem = work(), None
        except (Problem, Error, OSError, subprocess.SubprocessError) as error:
            text, problem = "", str(error)
        results.append(Result(kind, name, time.monotonic() - began, text, problem))
        tell(results[-1])
        return problem is None

    if shutil.which("sanlock") is None:
        step("hosts in the simulator", "three hosts, faults for an hour", _simulated)
        return results
    with tempfile.TemporaryDirectory(prefix="qpd", dir=directory) as folder, contextlib.ExitStack() as stack:
        demo = _Hosts(Path(folder), stack)
        for name, work in (
            ("three hosts join", demo.join),
            ("a disk and its snapshot, made by the manager", demo.make),
            ("the manager is killed in the middle of a merge", demo.kill),
            ("another takes over and ends it", demo.take_over),
        ):
            if not step("hosts with sanlock", name, work):
                break
    return results


def _simulated() -> str:
    from spm.testing.cluster import simulate

    outcome = simulate(1, hosts=_HOSTS, hours=1.0)
    if outcome.findings:
        raise Problem(f"an invariant was broken: {outcome.findings[0]}")
    return f"{outcome.faults} faults, {outcome.terms} terms, no invariant was broken (sanlock is not installed)"


class _Hosts:
    """A pool, three daemons, three hosts."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._manager = 0
        self._image = self._leaf = ""
        self._master = self._make_pool()

    def _make_pool(self) -> Path:
        uuid = make_id()
        with FileToken(str(self._folder / "lock")) as token:
            domain = FileDomain.create(
                token, str(self._folder), uuid, version=5, storage_type="NFS", remote_path="demo:/pool", ctime=1
            )
            StoragePool.create(token, make_id(), "demo", domain)
            domain.close()
        # A lockspace whose hosts are judged in seconds, not minutes.
        (self._folder / uuid / "dom_md/ids").write_bytes(lockspace_area(uuid, io_timeout_s=_SMALL_IO_TIMEOUT_S))
        return self._folder / uuid

    def _start(self, command: list[str], output: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        with open(output, "wb") as out:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env={**os.environ, **environment}
            )
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return process

    def _socket(self, number: int) -> str:
        return str(self._folder / f"{number}.sock")

    def _wait(self, what: Callable[[], Any]) -> Any:
        end = time.monotonic() + _LIMIT_S
        while not (found := what()):
            if time.monotonic() > end:
                said = [f"host {number}: {self._status(number).get('reason')}" for number in self._processes]
                raise Problem(f"nothing happened for {_LIMIT_S:.0f} s; {', '.join(said)}")
            time.sleep(0.05)
        return found

    def _status(self, number: int) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = json.loads(ask(self._socket(number), "/status")[1])
        except Error:
            return {}
        return answer

    def _managing(self) -> int:
        alive = [number for number, process in self._processes.items() if process.poll() is None]
        if not alive:
            raise Problem("no host is running")
        return next((number for number in alive if self._status(number).get("role") == "SPM"), 0)

    def join(self) -> str:
        for number in range(1, _HOSTS + 1):
            run_dir = self._folder / f"s{number}"
            run_dir.mkdir()
            command = ["sanlock", "daemon", "-w", "0", "-D", "-h", "0", "-l", "0", "-e", f"host{number}"]
            if os.getuid() == 0:
                command += ["-U", "root", "-G", "root"]
            environment = {"SANLOCK_PRIVILEGED": "0", "SANLOCK_RUN_DIR": str(run_dir)}
            daemon = self._start(command, run_dir / "output", environment)
            self._wait(partial(_listens, run_dir / "sanlock.sock", daemon))
            words = ["--contend", "--sanlock-run-dir", str(run_dir), "--io-timeout", str(_SMALL_IO_TIMEOUT_S)]
            host = [sys.executable, "-m", "spm.cli.main", "host", "run", str(self._master), "--host-id", str(number)]
            host += ["--socket", self._socket(number), *words]
            # So that the child finds the same code whatever its working directory.
            paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
            self._processes[number] = self._start(host, self._folder / f"host{number}", paths)
        self._manager = self._wait(self._managing)
        numbers = range(1, _HOSTS + 1)
        self._wait(lambda: all(self._status(number).get("spm_id") == self._manager for number in numbers))
        return f"host {self._manager} is the manager, as all see"

    def _do(self, *argv: str) -> dict[str, Any]:
        code, text = ask(self._socket(self._manager), "/run", {"argv": [*argv, "--output=json"]})
        answer = json.loads(text)
        if code != 200 or answer["status"] != 0:
            raise Problem(str(answer.get("error") or answer.get("stderr")))
        made: dict[str, Any] = json.loads(answer["stdout"] or "{}")
        return made

    def make(self) -> str:
        master = str(self._master)
        self._image = self._do("volume", "create", master, "256M", "--format", "COW")["image"]
        self._leaf = self._do("snapshot", "create", master, self._image)["leaf"]
        return "by qpool host do"

    def kill(self) -> str:
        body = json.dumps({"argv": ["snapshot", "delete", str(self._master), self._image, self._leaf]}).encode()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(self._socket(self._manager))
            head = f"POST /run HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            client.sendall(head + body)
            time.sleep(0.02)
            self._processes[self._manager].kill()
            self._processes[self._manager].wait()
        return f"host {self._manager} is gone, with its lease"

    def take_over(self) -> str:
        old, self._manager = self._manager, self._wait(self._managing)
        term = self._status(self._manager)["lver"]
        domain = FileDomain.open(str(self._master))
        try:
            report = check_domain(domain)
            if not report.clean:
                raise Problem(f"the domain is not whole: {report}")
        finally:
            domain.close()
        self._do("snapshot", "create", str(self._master), self._image)
        return f"host {self._manager} follows host {old} in term {term}; the domain is whole and goes on"


def _listens(path: Path, daemon: subprocess.Popen[bytes]) -> bool:
    if daemon.poll() is not None:
        raise Problem("the lease daemon does not start")
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0
