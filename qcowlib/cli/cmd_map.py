# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``map``: where the guest's bytes are.

Invariant: extents are printed as they are found, so memory does not grow with
the image.
"""

from __future__ import annotations

from qcowlib.cli import options
from qcowlib.cli.console import Console, Failure
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
        start = args.number("start") or 0
        limit = args.number("length")
        length = image.size - start if limit is None else min(limit, image.size - start)
        if as_json:
            _print_json(image, start, length, console)
        else:
            _print_human(_merged(_entries(image, start, length)), console)
    return 0


def _entries(image: Image, start: int, length: int) -> Iterator[Entry]:
    if length <= 0:
        return
    files = [layer.data.name for layer in image.layers]
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
