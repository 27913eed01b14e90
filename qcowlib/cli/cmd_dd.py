# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``dd``: copy blocks of an image into a new one.

Invariant: as in qemu-img, ``count`` is measured from the start of the input,
not from the skipped position.
"""

from __future__ import annotations

from qcowlib.cli import creation, options
from qcowlib.cli.console import Console, Failure
from qcowlib.cli.jsonout import pretty
from qcowlib.cli.names import image_ref
from qcowlib.cli.objects import parse_secrets
from qcowlib.cli.opening import open_image
from qcowlib.cli.optlist import OptionList, create_table
from qcowlib.cli.parser import Args, Command, Option
from qcowlib.cli.values import MAX_SIZE, size_option
from qcowlib.errors import Error, StorageError
from qcowlib.native import is_zero

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qcowlib.image import Image

__all__ = ["COMMAND", "run"]

_MAX_BLOCK = (1 << 31) - 1
_PIECE = 1 << 21
_ZERO_UNIT = 1 << 16

COMMAND = Command(
    "dd",
    "Copy blocks of an image into a new image.",
    "[bs=SIZE] [count=N] [skip=N] if=FILE of=FILE",
    (
        options.HELP,
        options.OBJECT,
        options.IMAGE_OPTS,
        options.FORCE_SHARE,
        options.FORMAT,
        Option("O", "", "target-format", "format of the new image (default: raw)", meta="FMT"),
        options.OUTPUT_EXTRA,
    ),
    "dd -O qcow2 bs=1M count=16 if=disk.qcow2 of=head.qcow2",
)

_NUMBERS = ("bs", "count", "skip")


def run(args: Args, console: Console) -> int:
    """Run ``dd``."""
    texts, numbers = _operands(args.operands, console)
    if "if" not in texts or "of" not in texts:
        raise Failure("Must specify both input and output files")
    as_json = options.wants_json(args)
    secrets = parse_secrets(args.texts("object"))
    fmt = args.text("target-format") or "raw"
    ref = image_ref(texts["if"], args.text("format"), image_opts=args.flag("image-opts"))
    with open_image(ref, console, secrets=secrets, force_share=args.flag("force-share")) as source:
        if not creation.can_create(fmt):
            raise creation.not_made(fmt, "")
        block = numbers.get("bs", 512)
        end = source.size
        if "count" in numbers and numbers["count"] <= MAX_SIZE // block:
            end = min(end, numbers["count"] * block)
        start = numbers.get("skip", 0) * block
        size = max(end - start, 0)
        target = texts["of"]
        values = OptionList(create_table(fmt))
        values.set("size", size)
        try:
            request = creation.Request(fmt, target, creation.protocol_path(target), values)
            creation.create(request, secrets)
        except Failure as failure:
            text = failure.messages[0]
            raise Failure(f"{target}: error while creating output image: {text}", hint=failure.hint) from None
        if start > source.size:
            console.error(f"{ref.text}: cannot skip to specified offset")
        elif size:
            new = image_ref(target, fmt)
            with open_image(new, console, secrets=secrets, writable=True, cache="unsafe") as out:
                _copy(source, out, start, size)
    if as_json:
        console.out(pretty({"filename": target, "virtual-size": size}))
    return 0


def _operands(words: list[str], console: Console) -> tuple[dict[str, str], dict[str, int]]:
    texts: dict[str, str] = {}
    numbers: dict[str, int] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or name not in (*_NUMBERS, "if", "of"):
            raise Failure(f"unrecognized operand {name}")
        if name in _NUMBERS:
            low, high = (1, _MAX_BLOCK) if name == "bs" else (0, MAX_SIZE)
            numbers[name] = size_option(name, text, console, low=low, high=high)
        else:
            texts[name] = text
    return texts, numbers


def _copy(source: Image, target: Image, start: int, size: int) -> None:
    """Copy, leaving out whole units of zeros: the target is new and reads as zeros."""
    try:
        for extent in source.extents(start, size):
            if extent.kind in ("zero", "hole", "sparse"):
                continue
            position, end = extent.start, extent.start + extent.length
            while position < end:
                data = memoryview(source.pread(min(_PIECE, end - position), position))
                _write(target, data, position - start)
                position += len(data)
        target.flush()
    except StorageError as error:
        what = {"read": "reading from input", "write": "writing to output"}.get(error.operation)
        raise Failure(f"error while {what} image file: {error.strerror}" if what else str(error)) from None
    except Error as error:
        raise Failure(str(error)) from None


def _write(target: Image, data: memoryview, offset: int) -> None:
    for first in range(0, len(data), _ZERO_UNIT):
        piece = data[first : first + _ZERO_UNIT]
        if not is_zero(piece):
            target.pwrite(piece, offset + first)
