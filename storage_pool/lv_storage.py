# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The bytes of a logical volume: its device node where there is a device mapper, else its extents.

Invariant: S4.  A node that somebody on this host has open keeps its size
until :func:`catch_up` is called for it; one that nobody uses follows when it
is opened.  Either way an offset is the same byte of the same device.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qcowlib.storage.file import FileStorage
from qcowlib.storage.linear import LinearStorage, Segment

from .errors import LvmError
from .lvm import Lvm, VgState

if TYPE_CHECKING:
    from qcowlib.storage.base import Storage

    from .process import ProcessRunner

__all__ = ["catch_up", "open_logical_volume", "volume_device"]


def open_logical_volume(lvm: Lvm, state: VgState, name: str, *, writable: bool = False) -> Storage:
    """Open the bytes of a logical volume: its device where it can be active, else its extents.

    Raises: NotFound, LvmError, StorageError.
    """
    if lvm.activation:
        return _open_node(lvm, state, name, writable)
    devices: dict[str, FileStorage] = {}
    try:
        return LinearStorage(_segments(state, name, 0, devices, writable), name=f"{state.vg.name}/{name}", owned=True)
    except BaseException:
        for device in devices.values():
            device.close()
        raise


def _open_node(lvm: Lvm, state: VgState, name: str, writable: bool) -> FileStorage:
    lv, path = state.lv(name), f"/dev/{state.vg.name}/{name}"
    # The report may be older than what another process did to the node.
    if not lv.active or not os.path.exists(path):  # noqa: PTH110
        lvm.activate(state.vg.name, [name])
    storage = FileStorage.open(path, writable=writable, cache="none")
    try:
        if storage.size < lv.size and not lv.opened:
            # Extended by another host, or by this one while it was active.
            lvm.refresh(state.vg.name, name)
    except BaseException:
        storage.close()
        raise
    return storage


def _segments(
    state: VgState, name: str, start: int, devices: dict[str, FileStorage], writable: bool
) -> Iterator[Segment]:
    """Yield the segments of a volume from byte *start* on; what is opened for them goes to *devices*."""
    for place in state.placements(name):
        skipped = max(start - place.start, 0)
        if skipped >= place.size:
            continue
        if place.device not in devices:
            devices[place.device] = FileStorage.open(place.device, writable=writable, cache="none")
        yield Segment(devices[place.device], place.offset + skipped, place.size - skipped)


def catch_up(lvm: Lvm, state: VgState, name: str, storage: Storage) -> None:
    """Let *storage*, opened before the volume grew, have the size it has in *state*; others may write meanwhile.

    The caller answers for whoever else on this host has the volume open: they
    see the new size too.

    Raises: NotFound, LvmError, StorageError.
    """
    if storage.size >= state.lv(name).size:
        return
    if not isinstance(storage, LinearStorage):
        lvm.refresh(state.vg.name, name)
        return
    devices: dict[str, FileStorage] = {}
    try:
        storage.append(list(_segments(state, name, storage.size, devices, storage.writable)))
    except BaseException:
        for device in devices.values():
            device.close()
        raise


@contextlib.contextmanager
def volume_device(lvm: Lvm, runner: ProcessRunner, state: VgState, name: str) -> Iterator[str]:
    """Give the path of a block device that is the volume *name*, for programs.

    Without a device mapper it is a loop device, which goes at the end, or as
    soon as nobody has it open then.  Raises: LvmError.
    """
    vg = state.vg.name
    if lvm.activation:
        lvm.activate(vg, [name])
        yield f"/dev/{vg}/{name}"
        return
    place, *others = state.placements(name)
    if others:
        raise LvmError(f"the volume {name} has several segments, which need the device mapper", path=vg)
    window = ["--offset", str(place.offset), "--sizelimit", str(place.size)]
    done = runner.run(["losetup", "--find", "--show", *window, place.device])
    if done.returncode:
        raise LvmError(f"losetup: {done.message()}", path=vg, returncode=done.returncode)
    loop = done.stdout.decode().strip()
    try:
        yield loop
    finally:
        runner.run(["losetup", "--detach", loop])
