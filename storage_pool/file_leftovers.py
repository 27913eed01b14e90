# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What interrupted operations leave in the directory of a domain, and taking it away.

Invariant: only what no operation can need any more is taken away, data
before nothing and records first, so that a cut in the middle leaves what the
next look finds again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from . import layout
from .domain import Leftover
from .ids import is_id
from .rooted import Rooted

if TYPE_CHECKING:
    from .token import SpmToken

__all__ = ["find_leftovers", "sweep_leftovers"]

_METADATA: Final = f"{layout.METADATA_DIR}/metadata{layout.NEW_SUFFIX}"
_UNUSED: Final = "unused template"


def find_leftovers(
    root: Rooted, images: Sequence[str], listing: Mapping[str, Sequence[str]], notes: Collection[str]
) -> list[Leftover]:
    """Look through *images*, directories by name; *listing* has the images of each volume, its own first."""
    found = []
    if root.exists(_METADATA):
        found.append(Leftover("new file", _METADATA, "a change of the domain that did not end"))
    for image in images:
        folder = f"{layout.IMAGES_DIR}/{image}"
        if layout.removed_image(image):
            found.append(Leftover("removed image", folder, "a removal that did not end"))
            continue
        names = set(root.names(folder))
        found += _of_names(folder, names, notes)
        volumes = [volume for name in names if (volume := name.removesuffix(layout.META_SUFFIX)) != name]
        users = [listing[volume] for volume in volumes if volume in listing]
        if users and len(users) == len(volumes) and all(one[0] != image for one in users):
            text = "links to a template of another image, without a volume that stands on it"
            found.append(Leftover(_UNUSED, folder, text))
    return found


def _of_names(folder: str, names: set[str], notes: Collection[str]) -> Iterator[Leftover]:
    for name in sorted(names):
        path = f"{folder}/{name}"
        volume = name.partition(".")[0]
        if name.endswith(layout.NEW_SUFFIX):
            yield Leftover("new file", path, "a change of a volume that did not end")
        elif is_id(name) and name + layout.META_SUFFIX not in names:
            yield Leftover("unfinished volume", path, "a creation or removal that did not end")
        elif name.endswith((layout.LEASE_SUFFIX, layout.NOTE_SUFFIX)) and volume + layout.META_SUFFIX not in names:
            yield Leftover("unfinished volume", path, "what a volume that is not there would have")
        elif (twin := layout.twin_of(name)) is not None:
            # While a note tells of its merge it is that one's to end.
            if not any(twin in note for note in notes):
                yield Leftover("unfinished merge", path, "a merged volume without a note of its merge")
        elif name.endswith(layout.META_SUFFIX) and volume not in names:
            yield Leftover("broken volume", path, "a record without its volume; kept")


def sweep_leftovers(token: SpmToken, root: Rooted, leftovers: Sequence[Leftover]) -> None:
    """Remove what has been found; what is not known what for is kept."""
    for leftover in leftovers:
        token.check()
        if leftover.kind == "removed image":
            root.remove_tree(leftover.name)
        elif leftover.kind in ("new file", "unfinished volume", "unfinished merge"):
            root.unlink(leftover.name, missing_ok=True)
        elif leftover.kind == _UNUSED:
            # Without its record a link is one of an unfinished volume.
            for name in sorted(root.names(leftover.name), key=lambda name: not name.endswith(layout.META_SUFFIX)):
                root.unlink(f"{leftover.name}/{name}", missing_ok=True)
            root.remove_tree(leftover.name)
