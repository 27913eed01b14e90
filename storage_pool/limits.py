# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""How much a volume group and an old domain can hold: warnings with the figure, and refusals.

Invariant: pure.  A warning is told where the reference advises against going
on; a refusal only where the next step would break, and before it is made.

=============== ======== =========================================
what            advised  where it breaks
=============== ======== =========================================
volumes         350      1947, the slots that have a lease
devices         300      10 in version 0
metadata areas  20% free LVM keeps the old text beside the new one
version 0 text  80%      2048 bytes
=============== ======== =========================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from qcowlib.units import MiB

from .errors import NoSpace
from .metadata_domain import V1_TEXT_SIZE, v1_bytes_needed

if TYPE_CHECKING:
    from .lvm import Vg

__all__ = ["check_metadata_room", "group_warnings", "text_warnings"]

#: Below these a group's metadata areas are a reason to warn.
MDA_SIZE_MIN: Final = 64 * MiB
MDA_FREE_PERCENT: Final = 20
#: Logical volumes of a domain above which commands get slow, and devices.
LV_WARNING: Final = 350
PV_WARNING: Final = 300
#: The used share of version 0's text above which people are told.
V1_TEXT_PERCENT: Final = 80
#: Text that LVM keeps of a volume with three tags and one segment, and of each further segment.
LV_TEXT: Final = 420
SEGMENT_TEXT: Final = 110


def group_warnings(vg: Vg) -> list[str]:
    """Return what is worth telling people about a group, each with its figure."""
    found = []
    if vg.partial:
        found.append(f"{vg.missing_pv_count} physical volumes are missing")
    if vg.mda_size < MDA_SIZE_MIN:
        found.append(f"metadata areas of {vg.mda_size >> 20} MiB are smaller than {MDA_SIZE_MIN >> 20} MiB")
    # LVM keeps old and new text, so it reports half of an empty area as free.
    if vg.mda_free * 100 < vg.mda_size // 2 * MDA_FREE_PERCENT:
        found.append(f"only {vg.mda_free >> 10} KiB of the metadata areas are free")
    if vg.lv_count > LV_WARNING:
        found.append(f"{vg.lv_count} logical volumes, more than the {LV_WARNING} that are advised")
    if vg.pv_count > PV_WARNING:
        found.append(f"{vg.pv_count} devices, more than the {PV_WARNING} that are advised")
    return found


def text_warnings(values: Mapping[str, str]) -> list[str]:
    """Return a warning when the text of a version 0 block domain is nearly full."""
    used = v1_bytes_needed(values)
    if used * 100 < V1_TEXT_SIZE * V1_TEXT_PERCENT:
        return []
    return [f"{used} of the {V1_TEXT_SIZE} bytes of its metadata are used; a member of its pool takes 48, a device 142"]


def check_metadata_room(vg: Vg, volumes: int = 1) -> None:
    """Refuse *volumes* more where the group's metadata areas are full.

    A volume may take its extents in pieces, for which room of eight is kept.

    Raises: NoSpace with the figures.
    """
    needed = volumes * (LV_TEXT + 8 * SEGMENT_TEXT)
    if vg.mda_free < needed:
        raise NoSpace(
            f"the metadata areas of the volume group have {vg.mda_free} bytes left, {needed} are needed",
            path=vg.name,
            hint="Remove volumes, or make a domain whose areas are larger.",
        )
