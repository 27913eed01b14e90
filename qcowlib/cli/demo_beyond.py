# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Steps of ``demo`` for what qemu-img has no command for: differences, seals, salvage, pictures.

Invariant: as :mod:`.demo_steps`; each uses the disk that the first steps made.
"""

from __future__ import annotations

import time

import qcowlib
from qcowlib.cli.demo import Demo, Figures, Problem
from qcowlib.units import KiB, MiB, human_size

__all__ = ["carry_difference", "draw_picture", "find_silent_damage", "salvage_damaged"]


def carry_difference(demo: Demo) -> tuple[str, Figures]:
    """What a guest changed, as a stream, applied to a copy of what it began from."""
    base, work, copy = demo.path("flat.qcow2"), demo.path("work.qcow2"), demo.path("copy.qcow2")
    qcowlib.convert(demo.path("disk.raw"), base, source_format="raw", cache="unsafe")
    qcowlib.create(work, None, backing=base, backing_format="qcow2")
    with qcowlib.open(work, "r+") as image:
        for number in range(20):
            image.pwrite(number.to_bytes(2, "big") * (2 * KiB), number * image.size // 20)
    qcowlib.convert(base, copy, cache="unsafe")
    stream = demo.path("changes.diff")
    started = time.monotonic()
    with open(stream, "wb") as output:
        made = qcowlib.write_diff(base, work, output)
    with open(stream, "rb") as source:
        qcowlib.apply(source, copy)
    ours = time.monotonic() - started
    demo.judge.compare(work, "qcow2", copy, "qcow2")
    if not qcowlib.compare(work, copy):
        raise Problem("the copy is not what the guest has")
    return (
        f"{human_size(made.data)} in {made.records} records, applied to a copy in {1000 * ours:.0f} ms",
        {"seconds-ours": ours, "records": made.records, "data": made.data},
    )


def find_silent_damage(demo: Demo) -> tuple[str, Figures]:
    """A byte that changes behind everybody's back: check is content, verify is not; mended from a copy."""
    disk, replica, sealed = demo.path("copy.qcow2"), demo.path("work.qcow2"), demo.path("copy.qcow2.seal")
    made = qcowlib.seal(disk, sealed)
    with qcowlib.open(disk) as image:
        place = next(extent.offset for extent in image.extents() if extent.kind == "data" and extent.offset)
    with open(disk, "r+b") as file:
        file.seek(place + 1000)
        byte = file.read(1)
        file.seek(place + 1000)
        file.write(bytes([byte[0] ^ 1]))
    demo.judge.check(disk)
    found = qcowlib.verify(disk, sealed)
    if len(found.damages) != 1:
        raise Problem(f"one unit was damaged, {len(found.damages)} were found")
    healed = qcowlib.heal(disk, replica, sealed)
    if not healed or not qcowlib.compare(disk, replica):
        raise Problem("the disk was not mended")
    text = f"{made.hashes} hashes; one flipped bit found at {found.damages[0].start:#x} and mended from a copy"
    return text, {"hashes": made.hashes, "mended": healed.healed}


def salvage_damaged(demo: Demo) -> tuple[str, Figures]:
    """An L1 entry that leads nowhere: what it maps is lost and named, all else is copied."""
    disk, rescued = demo.path("broken.qcow2"), demo.path("rescued.qcow2")
    qcowlib.convert(demo.path("disk.raw"), disk, source_format="raw", cluster_size=4 * KiB, cache="unsafe")
    with open(disk, "r+b") as file:
        file.seek(40)
        table = int.from_bytes(file.read(8), "big")
        file.seek(table + 8)
        file.write((1 << 63 | 1 << 50).to_bytes(8, "big"))
    found = qcowlib.salvage(disk, rescued)
    reach = 4 * KiB // 8 * 4 * KiB
    if [(one.start, one.length) for one in found.lost] != [(reach, reach)]:
        raise Problem(f"other ranges were lost than were damaged: {found.lost[:3]}")
    demo.judge.check(rescued)
    text = f"{human_size(found.lost_bytes)} of {human_size(found.size)} lost and named, all else copied"
    return text, {"lost": found.lost_bytes}


def draw_picture(demo: Demo) -> tuple[str, Figures]:
    """A map of an image of 1 TiB, drawn."""
    from qcowlib.picture.svg import svg

    path, picture = demo.path("large.qcow2"), demo.path("large.svg")
    qcowlib.create(path, 1 << 40)
    with qcowlib.open(path, "r+") as image:
        image.pwrite_many((number << 30, bytes(4 * KiB) + b"x") for number in range(1, 1024, 3))
    started = time.monotonic()
    picture.write_text(svg(qcowlib.survey(path)))
    ours = time.monotonic() - started
    size = picture.stat().st_size
    if size > MiB:
        raise Problem(f"the drawing has {human_size(size)}")
    return f"1 TiB in {human_size(size)} of SVG in {1000 * ours:.0f} ms", {"seconds-ours": ours, "svg": size}
