# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``map``: where the guest's bytes are.

Invariant: extents are printed as they are found, so memory does not grow with
the image.
"""

from __future__ import annotations

import os

from qcowlib.cli import options
from qcowlib.cli.console import Console, Failure, usage_failure
from qcowlib.cli.jsonout import pretty
from qcowlib.cli.objects import parse_secrets
from qcowlib.cli.opening import open_image
from qcowlib.cli.parser import Args, Command, Option
from qcowlib.cli.values import size_option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from qcowlib.image import Image

__all__ = ["COMMAND", "run"]

COMMAND = Command(
    "map",
    "Show where the data of an image is.",
    "FILE",
    (
        options.HELP,
        options.FORMAT_LONG,
        options.OUTPUT,
        options.OBJECT,
        options.IMAGE_OPTS,
        options.FORCE_SHARE,
        Option(
            "s",
            "start-offset",
            "start",
            "begin at this byte",
            meta="OFFSET",
            convert=lambda text, console: size_option("start offset", text, console),
        ),
        Option(
            "l",
            "max-length",
            "length",
            "look at this many bytes at most",
            meta="LENGTH",
            convert=lambda text, console: size_option("max length", text, console),
        ),
        Option("", "svg", "svg", "draw the disk and the file as an SVG picture", extra=True),
        Option("", "html", "html", "draw them as a page that needs nothing else", extra=True),
        Option("", "heat", "heat", "draw them in characters, coloured on a terminal", extra=True),
        Option(
            "",
            "cells",
            "cells",
            "so many cells a drawing at most",
            meta="COUNT",
            convert=lambda text, console: size_option("cell count", text, console),
            extra=True,
        ),
    ),
    "map --output=json disk.qcow2",
)


class Entry:
    """A run of bytes with one status; *file* is where ``offset`` counts from."""

    __slots__ = ("data", "depth", "file", "length", "offset", "present", "start", "zero")

    def __init__(
        self,
        start: int,
        length: int,
        depth: int = 0,
        *,
        present: bool = False,
        zero: bool = False,
        data: bool = False,
        offset: int | None = None,
        file: str = "",
    ) -> None:
        self.start = start
        self.length = length
        self.depth = depth
        self.present = present
        self.zero = zero
        self.data = data
        self.offset = offset
        self.file = file

    def continued_by(self, other: Entry) -> bool:
        """Return whether *other* only makes this entry longer."""
        if (self.depth, self.present, self.zero, self.data, self.file) != (
            other.depth,
            other.present,
            other.zero,
            other.data,
            other.file,
        ):
            return False
        if self.offset is None or other.offset is None:
            return self.offset is other.offset
        return self.offset + self.length == other.offset


def run(args: Args, console: Console) -> int:
    """Run ``map``."""
    ref = options.single_image(args)
    as_json = options.wants_json(args)
    secrets = parse_secrets(args.texts("object"))
    with open_image(ref, console, secrets=secrets, force_share=args.flag("force-share")) as image:
        drawings = [name for name in ("svg", "html", "heat") if args.flag(name)]
        if drawings:
            _draw(image, drawings, args, console)
            return 0
        start = args.number("start") or 0
        limit = args.number("length")
        length = image.size - start if limit is None else min(limit, image.size - start)
        if as_json:
            _print_json(image, start, length, console)
        else:
            _print_human(_merged(_entries(image, start, length)), console)
    return 0


def _draw(image: Image, drawings: list[str], args: Args, console: Console) -> None:
    """Print the one drawing that was asked for.  Raises :class:`Failure` where it is not one."""
    from qcowlib.picture.heat import LABEL, heat
    from qcowlib.picture.page import page
    from qcowlib.picture.survey import DEFAULT_CELLS, survey
    from qcowlib.picture.svg import svg

    if len(drawings) > 1 or args.flag("start") or args.flag("length"):
        raise usage_failure("--svg, --html and --heat draw the whole image, one of them at a time")
    if drawings == ["heat"]:
        width = os.get_terminal_size(1).columns if console.stdout_is_tty else 80
        picture = survey(image, cells=args.number("cells") or 16 * max(width - LABEL, 8))
        if options.wants_json(args):
            console.out(pretty(picture.to_dict()))
            return
        colour = console.stdout_is_tty and not os.environ.get("NO_COLOR")
        console.out("\n".join(heat(picture, width, colour=colour)))
        return
    picture = survey(image, cells=args.number("cells") or DEFAULT_CELLS)
    console.out(svg(picture) if drawings == ["svg"] else page(picture))


def _entries(image: Image, start: int, length: int) -> Iterator[Entry]:
    if length <= 0:
        return
    files = [str(getattr(layer.data, "shown", layer.data.name)) for layer in image.layers]
    plain = [layer.plain for layer in image.layers]
    for kind, first, size, offset, depth, present in image.extents(start, length):
        yield Entry(
            first,
            size,
            depth,
            present=present,
            zero=kind in ("zero", "hole", "sparse"),
            data=kind in ("data", "compressed", "sparse"),
            offset=offset if plain[depth] else None,
            file=files[depth] if offset is not None and plain[depth] else "",
        )


def _merged(entries: Iterator[Entry]) -> Iterator[Entry]:
    """Join neighbours that differ only in what the table does not show."""
    last: Entry | None = None
    for entry in entries:
        if entry.zero or not entry.data:
            entry.zero, entry.data, entry.present = True, False, True
            entry.offset, entry.file = None, ""
        if last is not None and last.continued_by(entry):
            last.length += entry.length
            continue
        if last is not None:
            yield last
        last = entry
    if last is not None:
        yield last


def _print_human(entries: Iterator[Entry], console: Console) -> None:
    console.out(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File\n")
    for entry in entries:
        if not entry.data or entry.zero:
            continue
        if entry.offset is None:
            raise Failure("File contains external, encrypted or compressed clusters.")
        console.out(f"{_hex(entry.start)}{_hex(entry.length)}{_hex(entry.offset)}{entry.file}\n")


def _hex(value: int) -> str:
    return f"{value and hex(value):<16}"


def _print_json(image: Image, start: int, length: int, console: Console) -> None:
    from qcowlib.native import MapText

    text = MapText(bytes(layer.plain for layer in image.layers))
    console.out("[")
    end = start + max(length, 0)
    position = start
    while position < end:
        runs = image.map(position, end - position)
        console.out(text.feed(runs))
        position = runs.end
    none = f'{{ "start": {start}, "length": 0, "depth": 0, "present": false, "zero": false, "data": false}}'
    console.out((text.finish() or none) + "]\n")
