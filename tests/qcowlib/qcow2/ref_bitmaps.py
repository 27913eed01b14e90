# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Bitmaps as an independent reader sees them, slow and plain."""

from __future__ import annotations

import struct

from qcowlib.testing.reference import ReferenceError, RefImage

SECTOR = 512
MASK = 0x00FF_FFFF_FFFF_FE00


class RefBitmap:
    """One bitmap as an independent reader sees it: flags, and what it has recorded, in sectors."""

    def __init__(self, image: RefImage, at: int) -> None:
        self.table, entries, self.flags, kind, bits, name_size, extra = struct.unpack_from(">QIIBBHI", image.raw, at)
        if kind != 1 or extra or self.flags & ~3:
            raise ReferenceError("a bitmap of an unknown kind")
        self.name = image.raw[at + 24 : at + 24 + name_size].decode()
        self.end = at + -(-(24 + name_size) // 8) * 8
        self.in_use = bool(self.flags & 1)
        self.dirty: set[int] = set()
        if self.in_use:
            return
        total = -(-image.size // (1 << bits))
        if entries != (total + 8 * image.cluster - 1) // (8 * image.cluster):
            raise ReferenceError(f"bitmap {self.name} has a table of {entries} entries")
        data = b"".join(self.page(image, word) for word in image.words(self.table, entries, "bitmap table"))
        for bit in range(len(data) * 8):
            if data[bit // 8] >> bit % 8 & 1 and bit < total:
                self.dirty.update(range((bit << bits) // SECTOR, ((bit + 1) << bits) // SECTOR))

    @staticmethod
    def page(image: RefImage, word: int) -> bytes:
        if not word & MASK:
            return (b"\xff" if word & 1 else b"\0") * image.cluster
        page = image.raw[word & MASK : (word & MASK) + image.cluster]
        return page.ljust(image.cluster, b"\0")


def ref_bitmaps(image: RefImage) -> dict[str, RefBitmap]:
    """The bitmaps that a reader may trust the directory about."""
    if not image.autoclear & 1:
        return {}
    if 0x23852875 not in image.extensions:
        raise ReferenceError("the autoclear bit promises a bitmap directory")
    count, zero, size, at = struct.unpack(">IIQQ", image.extensions[0x23852875])
    if zero or not count:
        raise ReferenceError("a broken bitmaps extension")
    end = at + size
    found = {}
    for _ in range(count):
        bitmap = RefBitmap(image, at)
        found[bitmap.name], at = bitmap, bitmap.end
    if at != end:
        raise ReferenceError("the bitmap directory has another length")
    return found
