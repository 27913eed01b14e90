# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The command line's host: the real runner, LVM as configured, the clock."""

from __future__ import annotations

import argparse
import os
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from storage_pool.block_domain import BlockDomain
from storage_pool.embedded import FileToken
from storage_pool.errors import NotFound
from storage_pool.file_domain import FileDomain
from storage_pool.ids import is_id
from storage_pool.lvm import Lvm, LvmHost
from storage_pool.process import SystemRunner
from storage_pool.token import SpmToken

__all__ = ["make_lvm", "now", "open_domain", "take_token"]


def make_lvm(arguments: argparse.Namespace) -> Lvm:
    """Return LVM of this host, limited to the devices of the command line."""
    devices = arguments.device
    activation = not arguments.no_activation and Path("/dev/mapper/control").exists()
    host = LvmHost(
        None if devices is None else lambda: tuple(devices),
        activation=activation,
        system_dir=os.environ.get("LVM_SYSTEM_DIR"),
        locking_dir=os.environ.get("QPOOL_LVM_LOCKING_DIR"),
    )
    return Lvm(arguments.runner or SystemRunner(), host)


def open_domain(arguments: argparse.Namespace, name: str) -> FileDomain | BlockDomain:
    """Open a domain: a directory, or the volume group of that name."""
    if is_id(name) and not Path(name).exists():
        return BlockDomain.open(make_lvm(arguments), name)
    if not Path(name).is_dir():
        raise NotFound("neither a directory nor the UUID of a volume group", path=name)
    return FileDomain.open(name)


def take_token(arguments: argparse.Namespace) -> AbstractContextManager[SpmToken]:
    """Take the right to change pools on this host, unless the command was given one."""
    held: SpmToken | None = arguments.held
    return FileToken(arguments.lock) if held is None else nullcontext(held)


def now() -> int:
    """Return the time in seconds since 1970."""
    return int(time.time())
