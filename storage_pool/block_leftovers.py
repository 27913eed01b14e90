# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What interrupted operations leave on a volume group, and whose a metadata slot is.

Invariant: pure; looks at what LVM reported.  A slot is a volume's own only
while no other logical volume has it, whatever the rest of that one's tags.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from . import layout
from .domain import Leftover, VolumeEntry
from .errors import MetadataError
from .ids import is_id

__all__ = ["check_own_slot", "find_leftovers"]


def find_leftovers(
    entries: Mapping[str, VolumeEntry], names: Iterable[str], notes: Collection[str], pending: Collection[str]
) -> list[Leftover]:
    """Look through the logical volumes *names*; those of *pending* are being made by this process."""
    found = []
    for volume, entry in sorted(entries.items()):
        if entry.initializing and volume not in pending:
            found.append(Leftover("unfinished volume", volume, "a creation that did not end"))
        elif entry.zeroing:
            found.append(Leftover("volume to wipe", volume, "a removal that did not end before it was wiped"))
        elif entry.removed:
            found.append(Leftover("removed volume", volume, "a removal that did not end"))
    for name in sorted(set(names) - set(entries)):
        if is_id(name):
            found.append(Leftover("unknown volume", name, "a logical volume without the tags of a volume; kept"))
        elif (twin := layout.twin_of(name)) is not None:
            # While a note tells of its merge it is that one's to end.
            if not any(twin in note for note in notes):
                found.append(Leftover("unfinished merge", name, "a merged volume without a note of its merge"))
        elif name not in layout.SPECIAL_VOLUMES:
            found.append(Leftover("unknown volume", name, "a logical volume that is no part of a domain; kept"))
    return found


def check_own_slot(volume: str, slot: int, slots: Mapping[str, set[int]], path: str) -> None:
    """Refuse to write what *volume* has by its *slot* when another of *slots*, by volume, has it too.

    Raises: MetadataError.
    """
    others = sorted(name for name, theirs in slots.items() if slot in theirs and name != volume and is_id(name))
    if others:
        raise MetadataError(
            f"the volumes {volume} and {others[0]} have one metadata slot, {slot}",
            path=path,
            hint="Find out whose the record is, and give the other one another slot tag.",
        )
