# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Logical volumes that this host has active, and need not.

Invariant: a volume that somebody on this host has open stays active; one
command deactivates all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qcowlib.errors import Busy

from .block_domain import BlockDomain
from .errors import LvmError
from .ids import check_id, is_id

if TYPE_CHECKING:
    from .lvm import VgState

__all__ = ["deactivate", "deactivate_unused"]


def _fresh(domain: BlockDomain) -> VgState:
    domain.changed()
    return domain.state


def deactivate(domain: BlockDomain, volumes: Sequence[str]) -> None:
    """Deactivate volumes; those that are not active are left alone.

    Raises: Busy when one is open, before any is deactivated; NotFound.
    """
    state = _fresh(domain)
    lvs = [state.lv(check_id(volume, "volume UUID")) for volume in volumes]
    if used := sorted(lv.name for lv in lvs if lv.opened):
        raise Busy(f"the volume {used[0]} is in use on this host", path=domain.name)
    active = [lv.name for lv in lvs if lv.active]
    try:
        domain.lvm.activate(domain.uuid, active, active=False)
    except LvmError as error:
        if "in use" in error.stderr:
            # Opened since the report.
            raise Busy("a volume is in use on this host", path=domain.name) from error
        raise
    finally:
        domain.changed()


def deactivate_unused(domain: BlockDomain) -> list[str]:
    """Deactivate all volumes of disks that nobody on this host has open; returns those that stay, by name."""
    lvs = [lv for lv in _fresh(domain).lvs.values() if is_id(lv.name) and lv.active]
    deactivate(domain, [lv.name for lv in lvs if not lv.opened])
    return sorted(lv.name for lv in lvs if lv.opened)
