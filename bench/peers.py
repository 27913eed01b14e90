# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Who else can do the job on this machine: qemu-img, libnbd on qemu-nbd, libqcow, dissect.hypervisor.

Invariant: a peer that is not installed is not in :func:`installed`, and then
its benchmarks do not exist.  Each reader is ``(length, offset) -> bytes``.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

Reader = Callable[[int, int], object]

SYSTEM_MODULES = "/usr/lib/python3/dist-packages"


def _system_module(name: str) -> ModuleType | None:
    """Import *name*, also from Debian's packages where their Python is of our version."""
    if importlib.util.find_spec(name) is not None:
        return importlib.import_module(name)
    sys.path.append(SYSTEM_MODULES)
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
    finally:
        sys.path.remove(SYSTEM_MODULES)


def installed(*names: str) -> list[str]:
    """Return those of *names* that are here; ``qcowlib...`` always is."""
    return [name for name in names if name.startswith("qcow") or _present(name)]


def _present(name: str) -> bool:
    if name.startswith("qemu-img"):
        return shutil.which("qemu-img") is not None
    if name == "libnbd":
        return shutil.which("qemu-nbd") is not None and _system_module("nbd") is not None
    module = {"libqcow": "pyqcow", "dissect": "dissect.hypervisor"}[name]
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def qemu_img(*arguments: str | Path) -> None:
    """Run qemu-img; its output is thrown away."""
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def qemu_img_output(*arguments: str | Path) -> bytes:
    """Run qemu-img and return what it prints."""
    return subprocess.run(["qemu-img", *map(str, arguments)], check=True, stdout=subprocess.PIPE).stdout


def qcow(*arguments: str | Path) -> bytes:
    """Run our command line as a process and return what it prints."""
    command = [sys.executable, "-m", "qcowlib", *map(str, arguments)]
    # An installed command has its byte code beside it: measure that, not the compiler.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout


def must_equal(one: Path, two: Path) -> None:
    """Raise unless both images show the same bytes; qemu-img is the judge where it is installed."""
    if _present("qemu-img"):
        qemu_img("compare", "-q", one, two)
    else:
        import qcowlib

        if not qcowlib.compare(one, two):
            raise AssertionError(f"{one} and {two} differ")


def must_be_clean(path: Path) -> None:
    """Raise unless the check of the image finds nothing."""
    if _present("qemu-img"):
        qemu_img("check", "-q", path)
    else:
        qcow("check", "-q", path)


@contextlib.contextmanager
def nbd_export(path: Path) -> Iterator[Any]:
    """A libnbd handle on a qemu-nbd that serves the qcow2 image *path*."""
    nbd = _system_module("nbd")
    assert nbd is not None
    handle = nbd.NBD()
    handle.connect_systemd_socket_activation(["qemu-nbd", "-f", "qcow2", "--cache=writeback", str(path)])
    try:
        yield handle
    finally:
        handle.shutdown()


@contextlib.contextmanager
def reader(who: str, path: Path) -> Iterator[Reader]:
    """Open *path* with *who* for positioned reads."""
    if who == "qcowlib":
        import qcowlib

        with qcowlib.open(path) as image:
            yield image.pread
    elif who == "libnbd":
        with nbd_export(path) as handle:
            yield handle.pread
    elif who == "libqcow":
        import pyqcow

        file = pyqcow.file()
        file.open(str(path))
        yield file.read_buffer_at_offset
        file.close()
    else:
        from dissect.hypervisor.disk.qcow2 import QCow2

        stream = QCow2(path).open()

        def read(length: int, offset: int) -> object:
            stream.seek(offset)
            return stream.read(length)

        yield read
