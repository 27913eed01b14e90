# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The files of a master domain, ``tasks`` and ``vms``: a directory, on volume groups the file system of "master".

That file system is mounted nowhere: only who holds the descriptor sees it, and
it is unmounted when that is closed or the process dies, so that no mount is
left behind which would write after the manager's time.

Invariant: only the manager mounts, and checks the file system before; a
change is on storage when its call returns.

Source: VDSM's master volume (ext3, ``fsck -p`` before each mount).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Final

from qcowlib.errors import Error, StorageError

from .block_domain import BlockDomain
from .errors import LvmError
from .lv_storage import volume_device
from .rooted import Rooted

if TYPE_CHECKING:
    from .file_domain import FileDomain
    from .token import SpmToken

__all__ = ["master_files"]

_VOLUME: Final = "master"
#: Exit statuses of e2fsck up to here: nothing was wrong, or it was mended.
_MENDED: Final = 1


@contextmanager
def master_files(token: SpmToken, domain: FileDomain | BlockDomain, folder: str) -> Iterator[Rooted | None]:
    """Give *folder* (``tasks``, ``vms``) of a master domain, to read and to change; ``None`` where it has none.

    Raises: LvmError for a file system that cannot be mended, StorageError for
    one that cannot be mounted.
    """
    if not isinstance(domain, BlockDomain):
        with _opened(f"{domain.name}/{_VOLUME}/{folder}") as root:
            yield root
        return
    with _mounted(token, domain) as fd, _opened(f"/proc/self/fd/{fd}/{folder}") as root:
        if root is not None:
            # The name that people know.
            root.path = f"{domain.name}/{_VOLUME}/{folder}"
        yield root


@contextmanager
def _opened(path: str) -> Iterator[Rooted | None]:
    if not os.path.isdir(path):  # noqa: PTH112
        yield None
        return
    with closing(Rooted(path)) as root:
        yield root


@contextmanager
def _mounted(token: SpmToken, domain: BlockDomain) -> Iterator[int]:
    from qcowlib.storage.syscalls import open_mount

    runner = domain.lvm.runner
    token.check()
    with volume_device(domain.lvm, runner, domain.state, _VOLUME) as device:
        done = runner.run(["e2fsck", "-p", device], timeout_s=300.0)
        if done.returncode > _MENDED:
            raise LvmError(
                f"the file system of the volume {_VOLUME} cannot be mended without questions",
                path=domain.name,
                returncode=done.returncode,
                hint="Run e2fsck on it by hand.",
            )
        token.check()
        try:
            fd = open_mount(device, "ext3")
        except OSError as error:
            raise StorageError.from_os(error, path=device, operation="mount") from error
    try:
        yield fd
    finally:
        os.close(fd)
        if domain.lvm.activation:
            # One that stays active does no harm.
            with suppress(Error):
                domain.lvm.activate(domain.uuid, [_VOLUME], active=False)
