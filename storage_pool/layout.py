# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Where things are in a domain: names, tags, slots, areas and sizes per version.

Invariant: pure; a name that comes out of here was made from checked UUIDs
only, a slot or area lies inside its volume.

======== ============= ========= ==============================================
volume   file          LV (MiB)  use
======== ============= ========= ==============================================
metadata sealed text   128       version 0: text; all block versions: slots
ids      lockspace     128       sanlock's lockspace
leases   2 alignments  2048      safelease 0, SDM 1, volume n at 100 + n
inbox    16 MiB        128       requests to the pool manager
outbox   16 MiB        128       its answers
xleases  grows         1024      external leases, from version 4
master   directory     1024      tasks of a master domain
======== ============= ========= ==============================================
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

from qcowlib.units import MiB

from .errors import InvalidName, MetadataError, NoSpace, printable
from .ids import check_id, is_id

__all__ = [
    "SPECIAL_VOLUMES",
    "TAG_DOMAIN",
    "TAG_INITIALIZING",
    "TAG_UNREADY",
    "LooseTags",
    "VolumeTags",
    "check_note",
    "choose_slot",
    "lease_offset",
    "loose_volume_tags",
    "mount_directory",
    "note_of",
    "parse_volume_tags",
    "removed_image",
    "slot_offset",
    "slot_runs",
    "slots_of",
    "special_volumes",
    "twin_of",
    "volume_tags",
]

#: Files and directories of a file domain.
METADATA_DIR: Final = "dom_md"
IMAGES_DIR: Final = "images"
MASTER_DIR: Final = "master"
META_SUFFIX: Final = ".meta"
LEASE_SUFFIX: Final = ".lease"
NEW_SUFFIX: Final = ".new"
REMOVED_PREFIX: Final = "_remove_me_"
#: Of a merged volume before it takes the place of the one it is called after.
TWIN_SUFFIX: Final = "_MERGE"
#: Bytes of a mailbox volume: 4096 for each of 250 hosts, in whole MiB.
MAILBOX_SIZE: Final = 16 * MiB
MAILBOX_ZEROED: Final = 250 * 4096

TAG_DOMAIN: Final = "RHAT_storage_domain"
TAG_UNREADY: Final = "RHAT_storage_domain_UNREADY"
TAG_INITIALIZING: Final = "OVIRT_VOL_INITIALIZING"
TAG_SLOT: Final = "MD_"
TAG_PARENT: Final = "PU_"
TAG_IMAGE: Final = "IU_"
TAG_ZERO: Final = "_remove_me_ZERO_"

SPECIAL_VOLUMES: Final = ("metadata", "ids", "inbox", "outbox", "leases", "xleases", "master")

#: Metadata slots that are never given to a volume: 0 to 3 held V1's text.
FIRST_SLOT_OLD: Final = 4
FIRST_SLOT_V5: Final = 1
SLOTS_BASE_V5: Final = MiB
SLOT_SIZE_V5: Final = 8192
SLOT_SIZE_OLD: Final = 512
#: The first part of ``metadata`` that a new domain zeroes.
METADATA_ZEROED: Final = 17 * MiB
#: No slot is beyond; hosts of 2011 counted them in bytes.
MAX_SLOT: Final = 10**6
#: Records further apart than this are not read at once.
RUN_LIMIT: Final = 4 * MiB
LEASE_SLOTS: Final = 2048
RESERVED_LEASES: Final = 100
#: The last slot that has a lease: 2048 areas, the first 101 are not for volumes.
LAST_SLOT: Final = LEASE_SLOTS - RESERVED_LEASES - 1

#: Our own: what is being done to a volume, so that it can be ended after a cut.
TAG_NOTE: Final = "NOTE_"
NOTE_SUFFIX: Final = ".note"

_SLOT: Final = re.compile(r"[0-9]{1,6}")
_NOTE: Final = re.compile(r"[A-Za-z0-9_.:\-]{1,200}")


def special_volumes(version: int, alignment: int = MiB) -> dict[str, int]:
    """Return the special logical volumes of a block domain, in order of creation, with MiB to ask for."""
    sizes = {
        "metadata": 128,
        "ids": 8,
        "inbox": 16,
        "outbox": 16,
        "leases": LEASE_SLOTS * (alignment // MiB),
    }
    if version >= 4:
        sizes["xleases"] = 1024 * (alignment // MiB)
    sizes["master"] = 1024
    return sizes


def has_xleases(version: int, storage_type: str) -> bool:
    """Whether a domain has external leases."""
    return version >= 4 and storage_type != "LOCALFS"


def has_volume_leases(version: int, storage_type: str) -> bool:
    """Whether each volume of a domain has a lease."""
    return version >= 3 and storage_type != "LOCALFS"


def first_slot(version: int) -> int:
    """Return the lowest slot that a volume may get."""
    return FIRST_SLOT_V5 if version >= 5 else FIRST_SLOT_OLD


def slot_offset(slot: int, version: int) -> int:
    """Return where *slot* is in the volume ``metadata``.  Raises: InvalidName for an impossible one."""
    if not 0 <= slot <= MAX_SLOT:
        raise InvalidName(f"there is no metadata slot {slot}")
    if version >= 5:
        return SLOTS_BASE_V5 + slot * SLOT_SIZE_V5
    return slot * SLOT_SIZE_OLD


def lease_offset(slot: int, alignment: int = MiB) -> int:
    """Return where the lease of the volume in *slot* is in ``leases``."""
    return (RESERVED_LEASES + slot) * alignment


def choose_slot(used: Iterable[int], version: int) -> int:
    """Return the lowest slot not in *used*.

    Raises: NoSpace when the last one with a lease is taken.
    """
    taken = set(used)
    for slot in range(first_slot(version), LAST_SLOT + 1):
        if slot not in taken:
            return slot
    raise NoSpace(f"all {LAST_SLOT} metadata slots of the domain are in use")


class VolumeTags(NamedTuple):
    """What the tags of a volume's LV say; *image* without any mark of removal."""

    slot: int
    parent: str
    image: str
    removed: bool = False
    zeroing: bool = False

    @property
    def image_name(self) -> str:
        """The image as the tag names it, with the mark of removal."""
        if self.zeroing:
            return TAG_ZERO + self.image
        return (REMOVED_PREFIX if self.removed else "") + self.image


def volume_tags(slot: int | None, parent: str, image: str) -> list[str]:
    """Return the tags that make an LV a volume; without *slot* the two of V1, whose slot is its place.

    Raises: InvalidName.
    """
    check_id(parent, "parent UUID", blank=True)
    check_id(image, "image UUID")
    tags = [f"{TAG_PARENT}{parent}", f"{TAG_IMAGE}{image}"]
    if slot is None:
        return tags
    slot_offset(slot, 5)
    return [f"{TAG_SLOT}{slot}", *tags]


def parse_volume_tags(tags: Iterable[str]) -> VolumeTags:
    """Read the three tags among *tags*.

    Raises: MetadataError naming the one that is missing or bad, or there twice.
    """
    found: dict[str, str] = {}
    for tag in tags:
        for prefix in (TAG_SLOT, TAG_PARENT, TAG_IMAGE):
            if tag.startswith(prefix):
                value = tag[len(prefix) :]
                if found.setdefault(prefix, value) != value:
                    raise MetadataError(f"the volume has two tags {prefix}")
    for prefix in (TAG_SLOT, TAG_PARENT, TAG_IMAGE):
        if prefix not in found:
            raise MetadataError(f"the volume has no tag {prefix}")
    slot, parent, image = (found[prefix] for prefix in (TAG_SLOT, TAG_PARENT, TAG_IMAGE))
    if not _SLOT.fullmatch(slot):
        raise MetadataError(f"the volume has a bad slot tag: '{printable(slot[:40])}'")
    zeroing = image.startswith(TAG_ZERO)
    removed = zeroing or image.startswith(REMOVED_PREFIX)
    bare = image.removeprefix(TAG_ZERO) if zeroing else image.removeprefix(REMOVED_PREFIX)
    if not is_id(bare) or not is_id(parent):
        raise MetadataError(f"the volume has bad tags: '{printable(image[:64])}', '{printable(parent[:64])}'")
    return VolumeTags(int(slot), parent, bare, removed, zeroing)


class LooseTags(NamedTuple):
    """What of a volume's tags there is; each may be missing, *image* and *parent* may be any text."""

    slot: int | None
    parent: str | None
    image: str | None
    removed: bool


def loose_volume_tags(tags: Iterable[str]) -> LooseTags:
    """Read what there is of the three tags; *image* comes without any mark of removal."""
    ordered = sorted(tags)
    parent = next((tag[len(TAG_PARENT) :] for tag in ordered if tag.startswith(TAG_PARENT)), None)
    image = next((tag[len(TAG_IMAGE) :] for tag in ordered if tag.startswith(TAG_IMAGE)), None)
    bare = None if image is None else image.removeprefix(TAG_ZERO).removeprefix(REMOVED_PREFIX)
    return LooseTags(slot_of(ordered), parent, bare, bare != image)


def slot_runs(slots: Iterable[tuple[int, str]], version: int) -> list[tuple[int, int, list[tuple[int, str]]]]:
    """Return how to read the records of ``(slot, volume)`` in few pieces.

    Each is where it begins, its bytes (at most ``RUN_LIMIT``), and its
    volumes with the offset of their record in it.
    """
    runs: list[tuple[int, int, list[tuple[int, str]]]] = []
    for slot, volume in sorted(slots):
        offset = slot_offset(slot, version)
        if not runs or offset + SLOT_SIZE_OLD - runs[-1][0] > RUN_LIMIT:
            runs.append((offset, 0, []))
        start, _, members = runs[-1]
        members.append((offset - start, volume))
        runs[-1] = (start, offset + SLOT_SIZE_OLD - start, members)
    return runs


def slots_of(tags: Iterable[str]) -> set[int]:
    """Return all slots that *tags* name, whatever else is wrong with them."""
    values = (tag[len(TAG_SLOT) :] for tag in tags if tag.startswith(TAG_SLOT))
    return {int(value) for value in values if _SLOT.fullmatch(value)}


def slot_of(tags: Iterable[str]) -> int | None:
    """Return the one slot that *tags* name; of two none is believed."""
    slots = slots_of(tags)
    return slots.pop() if len(slots) == 1 else None


def check_note(note: str) -> str:
    """Return *note* if it can be a tag and a file's content.  Raises: InvalidName."""
    if not _NOTE.fullmatch(note):
        raise InvalidName(f"not a note of a volume: '{printable(note[:80])}'")
    return note


def note_of(tags: Iterable[str]) -> str | None:
    """Return the note among *tags*."""
    return next((tag[len(TAG_NOTE) :] for tag in sorted(tags) if tag.startswith(TAG_NOTE)), None)


def twin_of(name: str) -> str | None:
    """Return the volume whose twin, or whose replaced bytes, are called *name*, else ``None``."""
    bare = name.removesuffix(TWIN_SUFFIX).removeprefix(REMOVED_PREFIX)
    return bare if is_id(bare) and name in (bare + TWIN_SUFFIX, REMOVED_PREFIX + bare) else None


def removed_image(name: str) -> str | None:
    """Return the image UUID of a directory marked for removal, else ``None``."""
    bare = name.removeprefix(REMOVED_PREFIX)
    return bare if bare != name and is_id(bare) else None


def normal_remote_path(remote: str) -> str:
    """Return a remote path without trailing slashes; the root of a server keeps its own."""
    stripped = remote.rstrip("/")
    return stripped + "/" if not stripped or stripped.endswith(":") else stripped


def mount_directory(remote: str) -> str:
    """Return the name of the directory where *remote* is mounted.

    Raises: InvalidName for what a mount table cannot hold or what would name
    another directory.
    """
    if not remote or any(character.isspace() or not character.isprintable() for character in remote):
        raise InvalidName(f"not a remote path: '{printable(remote[:80])}'")
    if "," in remote:
        raise InvalidName("a remote path must not hold a comma, which would add mount options")
    name = normal_remote_path(remote).replace("_", "__").replace("/", "_")
    if name in (".", "..") or name.startswith("-"):
        raise InvalidName(f"not a remote path: '{printable(remote[:80])}'")
    return name
