# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Real lease daemons, each of which is a host, and a clock for the others."""

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from spm.sanlock import LibraryClient, ModuleClient
from storage_pool.lease_records import lockspace_area, resource_area

MIB = 1 << 20
IO_TIMEOUT_S = 1


def module_client():
    """Return the client on Debian's module, which an interpreter of an environment does not find by itself."""
    with contextlib.suppress(ImportError):
        import sanlock

        return ModuleClient(sanlock)
    (path,) = Path("/usr/lib/python3/dist-packages").glob("sanlock.*.so")
    spec = importlib.util.spec_from_file_location("sanlock", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return ModuleClient(module)


def library_client(folder):
    """Return a client on a copy of the library: it keeps the first daemon's address as long as it is loaded."""
    (path,) = Path("/usr/lib").glob("*/libsanlock_client.so.1")
    return LibraryClient(str(shutil.copy(path, folder / "libsanlock_client.so")))


def make_client(name, folder):
    """Return a client of one binding."""
    return module_client() if name == "module" else library_client(folder)


def listens(path):
    """Whether somebody accepts connections on a socket; its file is there a little earlier."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@contextlib.contextmanager
def sanlock_daemon(run_dir, name):
    """Run a daemon without privileges and without a watchdog."""
    environment = {**os.environ, "SANLOCK_PRIVILEGED": "0", "SANLOCK_RUN_DIR": str(run_dir)}
    command = ["sanlock", "daemon", "-w", "0", "-D", "-h", "0", "-l", "0", "-U", "root", "-G", "root", "-e", name]
    with open(run_dir / "output", "wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        while not listens(run_dir / "sanlock.sock"):
            if process.poll() is not None:
                raise RuntimeError((run_dir / "output").read_text())
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def run_dirs():
    """Give short paths, as sockets need."""
    with tempfile.TemporaryDirectory(prefix="sl", dir="/tmp") as folder:
        made = []

        def make():
            path = Path(folder) / str(len(made))
            path.mkdir()
            made.append(path)
            return path

        yield make


def lease_file(path, lockspace, names, *, block_size=512, alignment=MIB):
    """Write a lockspace and, one alignment each after it, free resources."""
    options = {"block_size": block_size, "alignment": alignment}
    areas = [lockspace_area(lockspace, io_timeout_s=IO_TIMEOUT_S, **options)]
    areas += [resource_area(lockspace, name, **options) for name in names]
    path.write_bytes(b"".join(areas))
    return path
