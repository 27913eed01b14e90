# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""All volumes of one disk: its chains, and whether the three accounts of them agree.

Who stands on whom is said three times: by the record of a volume, by its tag
on block storage, by the backing name in its image.  Invariant: a chain is
used only when all that can be read of it agrees; where it does not,
:func:`findings` says what is wrong and which rule mends it.

Rules: of parents the record is newer than the tag; the image decides over the
record when it names a volume of the chain; of images the tag decides; a
capacity below what the image holds is raised.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from qcowlib.errors import Error, printable
from qcowlib.qcow2.directories import read_header

from . import layout
from . import metadata_volume as mv
from .domain import Domain, VolumeEntry
from .errors import Illegal, MetadataError, NotFound
from .ids import BLANK, check_id
from .lease_records import leader_trouble
from .metadata_volume import COW, RAW, SHARED, VolumeMetadata
from .opening import backing_of
from .volume import children_of, set_role, volume_of_name

if TYPE_CHECKING:
    from .token import SpmToken

__all__ = ["Finding", "ImageGroup", "findings", "repair"]

#: Longer chains are taken for a cycle that was missed.
MAX_CHAIN: Final = 1024

Repair = Literal[
    "set parent",
    "set parent tag",
    "set role",
    "set image",
    "set capacity",
    "write lease",
    "write lockspace",
    "write lock",
    "rebuild leases",
    "none",
]
#: What is done to one volume; the others are of :mod:`.lock_check`.
_OF_VOLUMES: Final = frozenset({"set parent", "set parent tag", "set role", "set image", "set capacity", "write lease"})


class Finding(NamedTuple):
    """Something wrong with a volume or a special one, in words, and what mends it to *value*."""

    volume: str
    text: str
    repair: Repair = "none"
    value: str = ""

    def line(self) -> str:
        """Say it in one line, with what would mend it."""
        rule = "" if self.repair == "none" else f" ({self.repair} {self.value})".replace(" )", ")")
        return f"{self.volume}: {self.text}{rule}"


class ImageGroup(NamedTuple):
    """The volumes that an image uses, templates of others included."""

    domain: Domain
    image: str
    entries: dict[str, VolumeEntry]
    records: dict[str, VolumeMetadata]
    damaged: dict[str, str]

    @classmethod
    def load(cls, domain: Domain, image: str) -> ImageGroup:
        """Read the image's records.  Raises: NotFound when the domain has no such image."""
        check_id(image, "image UUID")
        entries = {
            volume: entry
            for volume, entry in domain.entries().items()
            if image in entry.images and not entry.removed and not entry.initializing
        }
        if not entries:
            raise NotFound(f"there is no image {image}", path=domain.name)
        records, damaged = {}, {}
        for volume in entries:
            try:
                records[volume] = domain.record(volume)
            except (MetadataError, NotFound) as error:
                damaged[volume] = error.message
        return cls(domain, image, entries, records, damaged)

    def own(self) -> list[str]:
        """Return the volumes that belong to the image, not to a template of another."""
        return sorted(volume for volume, entry in self.entries.items() if entry.images[0] == self.image)

    def children(self, volume: str) -> list[str]:
        """Return the volumes of this image that stand on *volume*."""
        return sorted(other for other, record in self.records.items() if record.parent == volume)

    def leaves(self) -> list[str]:
        """Return the volumes on which nothing of this image stands: one, or two during a preview."""
        parents = {record.parent for record in self.records.values()}
        return sorted(volume for volume in self.own() if volume in self.records and volume not in parents)

    def leaf(self) -> str:
        """Return the only leaf.  Raises: Illegal during a preview, when there are two; MetadataError for none."""
        leaves = self.leaves()
        if len(leaves) > 1:
            text, hint = f"the image {self.image} is previewed", "Commit or undo the preview first."
            raise Illegal(text, path=self.domain.name, hint=hint)
        if not leaves:
            raise MetadataError(f"the image {self.image} has no leaf", path=self.domain.name)
        return leaves[0]

    def chain(self, leaf: str | None = None) -> list[str]:
        """Return the volumes from *leaf* (the only one by default) down to the base.

        Raises: Illegal during a preview when *leaf* is not told, MetadataError
        for a parent that is missing or damaged, or a cycle.
        """
        volume = self.leaf() if leaf is None else leaf
        chain: list[str] = []
        while volume != BLANK:
            if volume in chain or len(chain) >= MAX_CHAIN:
                raise MetadataError(f"the chain of {self.image} runs in a circle at {volume}", path=self.domain.name)
            if volume not in self.records:
                why = self.damaged.get(volume, "it is missing")
                raise MetadataError(f"the chain of {self.image} breaks at {volume}: {why}", path=self.domain.name)
            chain.append(volume)
            volume = self.records[volume].parent
        return chain


def findings(group: ImageGroup) -> list[Finding]:
    """Compare records, tags and images of a disk; reads only."""
    found = [Finding(volume, f"unreadable record: {why}") for volume, why in sorted(group.damaged.items())]
    for volume in group.own():
        record = group.records.get(volume)
        if record is None:
            continue
        found += _against_tags(group, volume, record)
        found += _against_image(group, volume, record)
        found += _against_lease(group, volume)
        if record.legality == mv.ILLEGAL:
            found.append(Finding(volume, _about_illegal(group, volume, record)))
        if record.voltype != SHARED:
            role = mv.INTERNAL if children_of(group.domain, volume) else mv.LEAF
            # What stands on it may be one whose record cannot be read: it must not become writable.
            unseen = role == mv.LEAF and bool(group.damaged)
            if record.voltype != role and not unseen:
                found.append(Finding(volume, f"the volume is {record.voltype}, it should be {role}", "set role", role))
        if record.parent == BLANK:
            continue
        if record.parent not in group.entries:
            found.append(Finding(volume, f"its parent {record.parent} is missing"))
        if record.format == RAW:
            found.append(Finding(volume, "a RAW volume has a parent"))
    for leaf in group.leaves():
        try:
            group.chain(leaf)
        except MetadataError as error:
            found.append(Finding(leaf, error.message))
    if not group.leaves() and group.records:
        found.append(Finding(group.own()[0] if group.own() else "", f"the image {group.image} has no leaf"))
    return found


def _about_illegal(group: ImageGroup, volume: str, record: VolumeMetadata) -> str:
    """Say what an ILLEGAL volume is left of, as far as chains tell; what to do with it is for people to say."""
    text = "the volume is ILLEGAL: an operation on it did not end"
    if group.children(volume):
        return f"{text}; what stands on it does so in record and image: make it LEGAL to take a merge back"
    if len(group.children(record.parent)) > 1:
        return f"{text}; the chain goes on without it: remove it if a merge or copy left it"
    return text


def _against_tags(group: ImageGroup, volume: str, record: VolumeMetadata) -> list[Finding]:
    found = []
    entry = group.entries[volume]
    if record.domain != group.domain.uuid:
        found.append(Finding(volume, f"its record is of domain {printable(record.domain[:64])}"))
    if record.image != entry.images[0]:
        text = f"its record is of image {printable(record.image[:64])}"
        # In a directory links may have been made of it; there is no tag to decide.
        rule: Repair = "set image" if group.domain.block else "none"
        found.append(Finding(volume, text, rule, entry.images[0]))
    if group.domain.block and entry.parent != record.parent:
        text = f"its tag has the parent {entry.parent}, its record {record.parent}"
        found.append(Finding(volume, text, "set parent tag", record.parent))
    return found


def _against_lease(group: ImageGroup, volume: str) -> list[Finding]:
    """A lease under another name or of another domain can never be taken; old merges and copied devices have such."""
    view = group.domain.metadata
    if not layout.has_volume_leases(view.version, view.type):
        return []
    try:
        leader = group.domain.lease_leader(volume)
    except MetadataError as error:
        return [Finding(volume, error.message)]
    except Error as error:
        return [Finding(volume, f"unreadable lease: {error.message}", "write lease")]
    trouble = leader_trouble(leader, view.uuid, volume, block_size=view.block_size, alignment=view.alignment)
    return [] if trouble is None else [Finding(volume, f"its lease {trouble}", "write lease")]


def _against_image(group: ImageGroup, volume: str, record: VolumeMetadata) -> list[Finding]:
    try:
        if record.format != COW:
            return _against_size(volume, record, group.domain.size_of(volume))
        with closing(group.domain.open_volume(volume)) as storage:
            name, fmt = backing_of(storage)
            size = read_header(storage).size
    except Error as error:
        return [Finding(volume, f"unreadable image: {error.message}")]
    return _against_backing(group, volume, record, name, fmt) + _against_size(volume, record, size)


def _against_size(volume: str, record: VolumeMetadata, size: int) -> list[Finding]:
    # A larger one is left, and of a template others have the same number.
    if record.capacity >= size or record.voltype == SHARED:
        return []
    return [
        Finding(volume, f"its image holds {size} bytes, its record says {record.capacity}", "set capacity", str(size))
    ]


def _against_backing(
    group: ImageGroup, volume: str, record: VolumeMetadata, name: str | None, fmt: str | None
) -> list[Finding]:
    if name is None:
        return [] if record.parent == BLANK else [Finding(volume, "its image has no backing file, its record a parent")]
    parent = volume_of_name(name)
    if parent is None:
        return [Finding(volume, f"its image stands on '{printable(name[:120])}', which is no volume")]
    if parent != record.parent:
        text = f"its image stands on {parent}, its record says {record.parent}"
        if parent in group.records and parent != volume:
            return [Finding(volume, text, "set parent", parent)]
        return [Finding(volume, text)]
    expected = {COW: "qcow2", RAW: "raw"}.get(group.records[parent].format) if parent in group.records else None
    if fmt is not None and expected is not None and fmt != expected:
        return [Finding(volume, f"its image says that its parent is {printable(fmt)}, it is {expected}")]
    return []


def repair(token: SpmToken, domain: Domain, plan: Sequence[Finding]) -> list[Finding]:
    """Do what *plan* has a rule for and return that part of it."""
    done = []
    for finding in plan:
        if finding.repair not in _OF_VOLUMES:
            continue
        if finding.repair == "write lease":
            domain.make_lease(token, finding.volume)
            done.append(finding)
            continue
        record = domain.record(finding.volume)
        if finding.repair == "set parent":
            domain.write_record(token, finding.volume, record._replace(parent=finding.value))
            domain.set_parent_hint(token, finding.volume, finding.value)
        elif finding.repair == "set parent tag":
            # The record may have been mended meanwhile by a finding before.
            domain.set_parent_hint(token, finding.volume, record.parent)
        elif finding.repair == "set image":
            domain.write_record(token, finding.volume, record._replace(image=finding.value))
        elif finding.repair == "set capacity":
            domain.write_record(token, finding.volume, record._replace(capacity=int(finding.value)))
        else:
            set_role(token, domain, finding.volume, record, finding.value)
        done.append(finding)
    return done
