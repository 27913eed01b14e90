# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies: geometries, guest workloads, hostile images.

Invariant: everything drawn is small (a few hundred clusters, a few dozen
operations), so a failing example shrinks to something a person can read.
"""

from __future__ import annotations

import struct
from typing import Literal, NamedTuple

from hypothesis import strategies as st

from qcowlib.testing.tiny import HEADER_FIELDS, TinyImage, TinySpec, build

__all__ = [
    "EDGE_VALUES",
    "Geometry",
    "WorkOp",
    "geometries",
    "hostile_images",
    "tiny_specs",
    "workloads",
]

SECTOR = 512

#: Values at which arithmetic on image fields goes wrong.
EDGE_VALUES = tuple(
    sorted(
        {0, 1, 2, 3, 7, 8, 9, 21, 22, 31, 32, 33, 62, 63, 64, 104, 112, 511, 512, 513, 1023, 1024}
        | {(1 << bits) + delta for bits in (16, 24, 31, 32, 40, 48, 55, 56, 62, 63, 64) for delta in (-1, 0, 1)}
    )
)

Kind = Literal["write", "zero", "discard", "flush", "read", "snapshot", "revert", "delete"]


class Geometry(NamedTuple):
    """Options of a new image; ``size`` in bytes, a multiple of 512."""

    version: int
    cluster_bits: int
    size: int
    refcount_order: int
    extended_l2: bool
    lazy_refcounts: bool

    def qemu_options(self) -> str:
        """Return the same as ``qemu-img create -o`` takes it."""
        parts = [
            f"compat={'0.10' if self.version == 2 else '1.1'}",
            f"cluster_size={1 << self.cluster_bits}",
            f"refcount_bits={1 << self.refcount_order}",
        ]
        if self.version == 3:
            parts += [f"extended_l2={'on' if self.extended_l2 else 'off'}"]
            parts += [f"lazy_refcounts={'on' if self.lazy_refcounts else 'off'}"]
        return ",".join(parts)


class WorkOp(NamedTuple):
    """One guest operation; ``name`` is the snapshot's."""

    kind: Kind
    offset: int = 0
    length: int = 0
    name: str = ""


@st.composite
def geometries(draw: st.DrawFn, *, max_clusters: int = 300, max_bits: int = 16) -> Geometry:
    """Draw options that ``create`` accepts."""
    version = draw(st.sampled_from((3, 3, 3, 2)))
    bits = draw(st.integers(9, max_bits))
    extended = version == 3 and bits >= 14 and draw(st.booleans())
    clusters = draw(st.integers(1, max_clusters))
    tail = draw(st.integers(0, (1 << bits) // SECTOR - 1))
    return Geometry(
        version=version,
        cluster_bits=bits,
        size=(clusters << bits) - tail * SECTOR,
        refcount_order=draw(st.integers(0, 6)) if version == 3 else 4,
        extended_l2=extended,
        lazy_refcounts=version == 3 and draw(st.booleans()),
    )


@st.composite
def workloads(
    draw: st.DrawFn,
    size: int,
    cluster_size: int,
    *,
    max_ops: int = 30,
    kinds: tuple[Kind, ...] = ("write", "write", "write", "zero", "discard", "flush"),
    unit: int = SECTOR,
) -> list[WorkOp]:
    """Draw operations on an image of *size* bytes, often at the borders of a few clusters.

    Ranges are multiples of *unit* inside the image.  With ``snapshot``,
    ``revert`` and ``delete`` among *kinds* names are used only while they exist.
    """
    clusters = -(-size // cluster_size)
    favourites = draw(st.lists(st.integers(0, clusters - 1), min_size=1, max_size=4))
    ops: list[WorkOp] = []
    names: list[str] = []
    made = 0
    for _ in range(draw(st.integers(1, max_ops))):
        kind = draw(st.sampled_from(kinds))
        if kind == "flush":
            ops.append(WorkOp(kind))
        elif kind == "snapshot":
            made += 1
            names.append(f"s{made}")
            ops.append(WorkOp(kind, name=names[-1]))
        elif kind in ("revert", "delete"):
            if not names:
                continue
            name = draw(st.sampled_from(names))
            if kind == "delete":
                names.remove(name)
            ops.append(WorkOp(kind, name=name))
        else:
            offset, length = draw(_ranges(size, cluster_size, favourites, unit))
            ops.append(WorkOp(kind, offset, length))
    return ops


@st.composite
def _ranges(draw: st.DrawFn, size: int, cluster_size: int, favourites: list[int], unit: int) -> tuple[int, int]:
    start = draw(st.sampled_from(favourites)) * cluster_size
    inside = draw(st.one_of(st.just(0), st.integers(0, cluster_size // unit)))
    start = min(start + inside * unit, (size - 1) // unit * unit)
    whole = draw(st.booleans())
    length = draw(st.integers(1, 4)) * cluster_size if whole else draw(st.integers(1, cluster_size // unit + 2)) * unit
    return start, min(length, size - start)


def tiny_specs() -> st.SearchStrategy[TinySpec]:
    """Draw specs that :func:`qcowlib.testing.tiny.build` makes."""
    plain = _specs(
        version=st.sampled_from((2, 3)),
        cluster_bits=st.sampled_from((9, 10, 12, 16)),
        size=st.just(512 << 10),
        snapshot=st.booleans(),
    )
    full = _specs(
        cluster_bits=st.sampled_from((12, 14, 16)),
        size=st.just(512 << 10),
        refcount_order=st.integers(2, 6),
        zstd=st.booleans(),
        snapshot=st.booleans(),
        bitmap=st.booleans(),
        backing=st.sampled_from((b"", b"", b"base")),
        backing_format=st.sampled_from((b"", b"raw")),
        extensions=st.sampled_from(((), ((0x12345678, b"unknown"),))),
    )
    extended = _specs(cluster_bits=st.sampled_from((14, 16)), size=st.just(512 << 10), extended_l2=st.just(True))
    return st.one_of(plain, full, extended)


def _specs(**fields: st.SearchStrategy[object]) -> st.SearchStrategy[TinySpec]:
    """Draw the *fields* given; the others keep their defaults (``builds`` would draw them too)."""
    return st.fixed_dictionaries(dict(fields)).map(lambda drawn: TinySpec(**drawn))  # type: ignore[arg-type]


@st.composite
def hostile_images(draw: st.DrawFn, *, max_changes: int = 3) -> bytes:
    """Draw a valid image with a few fields, entries, bytes or its end changed."""
    image = build(draw(tiny_specs()))
    raw = bytearray(image.raw)
    for _ in range(draw(st.integers(1, max_changes))):
        change = draw(st.sampled_from((_change_header, _change_entry, _change_table, _change_bytes, _cut)))
        change(draw, image, raw)
    return bytes(raw)


def _put(raw: bytearray, offset: int, data: bytes) -> None:
    raw[offset : offset + len(data)] = data[: max(0, len(raw) - offset)]


def _change_header(draw: st.DrawFn, image: TinyImage, raw: bytearray) -> None:
    offset, width = HEADER_FIELDS[draw(st.sampled_from(sorted(HEADER_FIELDS)))]
    value = draw(st.one_of(st.sampled_from(EDGE_VALUES), st.integers(0, (1 << 64) - 1)))
    _put(raw, offset, (value & (1 << 8 * width) - 1).to_bytes(width, "big"))


def _change_entry(draw: st.DrawFn, image: TinyImage, raw: bytearray) -> None:
    """Point an L1, L2 or refcount table entry somewhere it should not."""
    base = draw(st.sampled_from((image.l1, image.l2, image.table, image.snapshot_l1 or image.l2)))
    slot = base + 8 * draw(st.integers(0, 9))
    target = draw(st.sampled_from((image.table, image.block, image.l1, image.l2, image.data, len(raw), 0, 1, 1 << 55)))
    flags = draw(st.sampled_from((0, 1 << 63, 1 << 62, 1, 0x1FE, 0x7F << 56)))
    noise = draw(st.sampled_from((0, 0, image.cluster, 512, 7)))
    _put(raw, slot, struct.pack(">Q", (target + noise | flags) & (1 << 64) - 1))


def _change_table(draw: st.DrawFn, image: TinyImage, raw: bytearray) -> None:
    """Change a field of a snapshot, bitmap or extension, or a refcount."""
    places = [image.snapshot_table, image.bitmap_directory, image.bitmap_table, image.block]
    places += image.extensions.values()
    base = draw(st.sampled_from([place for place in places if place]))
    width = draw(st.sampled_from((1, 2, 4, 8)))
    value = draw(st.sampled_from(EDGE_VALUES))
    _put(raw, base + draw(st.integers(0, 48)), (value & (1 << 8 * width) - 1).to_bytes(width, "big"))


def _change_bytes(draw: st.DrawFn, image: TinyImage, raw: bytearray) -> None:
    """Overwrite any bytes, most often those of the compressed cluster."""
    places = [0, image.l2, image.data, image.compressed, image.compressed]
    base = draw(st.sampled_from(places)) + draw(st.integers(0, 40))
    _put(raw, base, draw(st.binary(min_size=1, max_size=16)))


def _cut(draw: st.DrawFn, image: TinyImage, raw: bytearray) -> None:
    del raw[draw(st.integers(0, len(raw))) :]
