# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Real LVM on loop devices of sparse files, without device mapper.

Needs root.  Each host has folders of its own and sees its own loop devices
only, so that tests at the same time do not meet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from storage_pool.lvm import Lvm, LvmHost
from storage_pool.process import ProcessRunner, SystemRunner

__all__ = ["attached", "local_lvm", "loop_devices"]


@contextlib.contextmanager
def attached(paths: Sequence[Path], runner: ProcessRunner | None = None) -> Iterator[list[str]]:
    """Give loop devices on the files *paths*, detached afterwards."""
    runner = runner or SystemRunner()
    made: list[str] = []
    try:
        for path in paths:
            done = runner.run(["losetup", "--find", "--show", str(path)])
            if done.returncode:
                raise RuntimeError(done.message())
            made.append(done.stdout.decode().strip())
        yield made
    finally:
        for device in made:
            runner.run(["losetup", "--detach", device])


@contextlib.contextmanager
def loop_devices(folder: Path, *sizes: int) -> Iterator[list[str]]:
    """Give loop devices on new sparse files ``lunN`` of *sizes* bytes in *folder*."""
    paths = [folder / f"lun{number}" for number in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        with path.open("xb") as file:
            file.truncate(size)
    with attached(paths) as made:
        yield made


def local_lvm(folder: Path, devices: list[str], runner: ProcessRunner | None = None) -> Lvm:
    """Return LVM of a host called after *folder* that sees *devices*, a list that may be changed later."""
    locks = folder / "lock"
    locks.mkdir(parents=True, exist_ok=True)
    system = folder / "lvm"
    system.mkdir(exist_ok=True)
    (system / "lvm.conf").touch()
    host = LvmHost(lambda: tuple(devices), activation=False, system_dir=str(system), locking_dir=str(locks))
    return Lvm(runner or SystemRunner(), host)
