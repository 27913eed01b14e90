# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Mounting the storage of file domains, by the system's ``mount``; one code path, the kinds are parameters.

======== =========== ============================================== ==============
type     file system options                                        below the root
======== =========== ============================================== ==============
NFS      nfs         soft, nosharecache, timeo 100, retrans 3,      mnt/
                     nolock, and what is asked for
POSIXFS  as asked    as asked                                       mnt/
GLUSTER  glusterfs   as asked                                       mnt/glusterSD/
LOCALFS  none        a link to the directory                        mnt/
======== =========== ============================================== ==============

Invariant: where something is mounted follows from what is mounted, by the
names that other hosts use; nothing that is asked for can become another
option or another program.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from .errors import InvalidName, ProcessError, UnsupportedVersion, printable
from .layout import mount_directory

if TYPE_CHECKING:
    from .process import ProcessRunner

__all__ = ["mount", "mount_point", "unmount"]

NFS_OPTIONS: Final = ("soft", "nosharecache", "timeo=100", "retrans=3", "nolock")
_OPTION: Final = re.compile(r"[A-Za-z0-9_.=:/@\-]{1,200}")
_FILE_SYSTEM: Final = re.compile(r"[a-z0-9][a-z0-9.\-]{0,30}")
_FOLDERS: Final = {"NFS": "mnt", "POSIXFS": "mnt", "LOCALFS": "mnt", "GLUSTERFS": "mnt/glusterSD"}


def mount_point(root: str, storage_type: str, remote: str) -> str:
    """Return where *remote* is mounted below the repository *root*.

    Raises: InvalidName, UnsupportedVersion for a type that is not mounted.
    """
    if storage_type not in _FOLDERS:
        raise UnsupportedVersion(f"{printable(storage_type[:40])} storage is not mounted")
    return f"{root}/{_FOLDERS[storage_type]}/{mount_directory(remote)}"


def _options(storage_type: str, options: Sequence[str]) -> list[str]:
    for option in options:
        if not _OPTION.fullmatch(option) or option.startswith("-"):
            raise InvalidName(f"not a mount option: '{printable(option[:80])}'")
    return [*(NFS_OPTIONS if storage_type == "NFS" else ()), *options]


def mount(
    runner: ProcessRunner,
    root: str,
    storage_type: str,
    remote: str,
    *,
    file_system: str | None = None,
    options: Sequence[str] = (),
) -> str:
    """Mount *remote* where hosts look for it and return the directory; one that is mounted stays.

    *file_system* is needed for POSIXFS and refused for the others.

    Raises: InvalidName, UnsupportedVersion, ProcessError with mount's words.
    """
    target = mount_point(root, storage_type, remote)
    wanted = {"NFS": "nfs", "GLUSTERFS": "glusterfs"}.get(storage_type, file_system)
    if (file_system is not None) != (storage_type == "POSIXFS"):
        raise InvalidName("POSIXFS needs the name of a file system, other types know it")
    checked = _options(storage_type, options)
    if storage_type == "LOCALFS":
        os.makedirs(os.path.dirname(target), exist_ok=True)  # noqa: PTH103
        if not os.path.islink(target):  # noqa: PTH114
            os.symlink(remote, target)  # noqa: PTH211
        return target
    if wanted is None or not _FILE_SYSTEM.fullmatch(wanted):
        raise InvalidName(f"not the name of a file system: '{printable(str(wanted)[:40])}'")
    os.makedirs(target, exist_ok=True)  # noqa: PTH103
    if os.path.ismount(target):
        return target
    argv = ["mount", "-t", wanted, *(["-o", ",".join(checked)] if checked else []), remote, target]
    done = runner.run(argv, timeout_s=300.0)
    if done.returncode:
        os.rmdir(target)  # noqa: PTH106
        raise ProcessError(f"mount: {done.message()}", path=remote, returncode=done.returncode)
    return target


def unmount(runner: ProcessRunner, root: str, storage_type: str, remote: str) -> None:
    """Undo :func:`mount`; what is not mounted is fine.  Raises: ProcessError, as when it is in use."""
    target = mount_point(root, storage_type, remote)
    if os.path.islink(target):  # noqa: PTH114
        os.unlink(target)  # noqa: PTH108
        return
    if os.path.ismount(target):
        done = runner.run(["umount", target], timeout_s=300.0)
        if done.returncode:
            raise ProcessError(f"umount: {done.message()}", path=remote, returncode=done.returncode)
    if os.path.isdir(target):  # noqa: PTH112
        os.rmdir(target)  # noqa: PTH106
