# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``convert``: copy images into a new one, or into one that exists.

Invariant: the line is understood in full, and the sources are open, before
anything is created.
"""

from __future__ import annotations

import os
from contextlib import ExitStack

from qcowlib.cli import creation, options
from qcowlib.cli.console import Console, Failure
from qcowlib.cli.encryption import encryption_of
from qcowlib.cli.jsonout import pretty
from qcowlib.cli.names import ImageRef, image_ref
from qcowlib.cli.objects import parse_secrets
from qcowlib.cli.opening import hint_text, open_image, references
from qcowlib.cli.optlist import OptionList, create_help, create_table, help_wanted
from qcowlib.cli.parser import Args, Command, Option
from qcowlib.cli.progress import Progress
from qcowlib.cli.values import parse_decimal, size_option
from qcowlib.errors import Error, StorageError, printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from qcowlib.image import Image

__all__ = ["COMMAND", "run"]

_MAX_SPARSE = 16 << 20
_MAX_WORKERS = 16


def _sparse(text: str, console: Console) -> int:
    size = size_option("buffer size for sparse output", text, console)
    if size % 512 or size > _MAX_SPARSE:
        raise Failure(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to "
            f"{_MAX_SPARSE}. Select 0 to disable sparse detection (fully allocates output)."
        )
    return size


def _workers(text: str, _console: Console) -> int:
    value = parse_decimal(text)
    if value is None or not 1 <= value <= _MAX_WORKERS:
        raise Failure(f"Invalid number of coroutines. Allowed number of coroutines is between 1 and {_MAX_WORKERS}")
    return value


COMMAND = Command(
    "convert",
    "Copy images into a new image.",
    "FILE... NEW-FILE",
    (
        options.HELP,
        options.OBJECT,
        options.IMAGE_OPTS,
        Option("", "target-image-opts", "target-image-opts", "the target is an option list (with -n)"),
        Option("", "target-is-zero", "target-is-zero", "the existing target reads as zeros (with -n)"),
        Option("", "bitmaps", "bitmaps", "copy the persistent bitmaps"),
        Option("", "skip-broken-bitmaps", "skip-broken-bitmaps", "leave out inconsistent bitmaps"),
        options.FORCE_SHARE,
        Option("C", "", "offload", "let the kernel copy"),
        Option("c", "", "compress", "compress the data (qcow2)"),
        options.PROGRESS,
        options.PROGRESS_FORM,
        options.QUIET,
        Option("n", "", "no-create", "the target exists"),
        options.FORMAT,
        options.CACHE,
        options.SOURCE_CACHE,
        Option("O", "", "target-format", "format of the new image (default: raw)", meta="FMT"),
        Option("B", "", "backing", "the new image is based on this one", meta="BACKING"),
        Option("F", "", "backing-format", "format of the backing file", meta="FMT"),
        options.list_option(),
        Option("l", "", "snapshot", "copy this snapshot (id or name)", meta="SNAPSHOT", convert=options.snapshot_name),
        Option("S", "", "sparse", "smallest run of zeros to leave out (4k)", meta="SIZE", convert=_sparse),
        options.RATE,
        Option("m", "", "workers", "how many work in parallel", meta="COUNT", convert=_workers),
        Option("W", "", "out-of-order", "allow to write out of order"),
        Option("", "salvage", "salvage", "unreadable sectors become zeros"),
        options.OUTPUT_EXTRA,
    ),
    "convert -O qcow2 -c -p disk.raw disk.qcow2",
)


def run(args: Args, console: Console) -> int:
    """Run ``convert``."""
    fmt = args.text("target-format") or "raw"
    lists, names = args.texts("options"), args.operands
    _check_flags(args)
    if help_wanted(lists):
        if not creation.can_create(fmt):
            raise creation.not_made(fmt)
        console.out(create_help(fmt, len(names) > 1))
        return 0
    if len(names) < 2:
        raise Failure("Must specify image file name")
    as_json = options.wants_json(args)
    secrets = parse_secrets(args.texts("object"))
    progress = Progress(console, args.flag("progress") and not args.flag("quiet"), form=options.progress_form(args))
    progress.report(0)
    try:
        with ExitStack() as stack:
            _Conversion(args, fmt, secrets, console, stack).run(progress)
        progress.report(100)
    finally:
        progress.end()
    if as_json:
        console.out(pretty({"filename": names[-1], "format": fmt}))
    return 0


def _check_flags(args: Args) -> None:
    """Refuse flags that do not go together, in qemu-img's order."""
    if args.texts("options") and args.flag("no-create") and not help_wanted(args.texts("options")):
        raise Failure("-o has no effect when skipping image creation")
    rules = (
        (args.flag("target-image-opts") and not args.flag("no-create"), "--target-image-opts requires use of -n flag"),
        (
            args.flag("skip-broken-bitmaps") and not args.flag("bitmaps"),
            "Use of --skip-broken-bitmaps requires --bitmaps",
        ),
        (args.flag("offload") and args.flag("compress"), "Cannot enable copy offloading when -c is used"),
        (args.flag("offload") and args.flag("sparse"), "Cannot enable copy offloading when -S is used"),
        (args.flag("offload") and args.flag("salvage"), "Cannot use copy offloading in salvaging mode"),
        (args.flag("target-is-zero") and not args.flag("no-create"), "--target-is-zero requires use of -n flag"),
    )
    for broken, message in rules:
        if broken:
            raise Failure(message)


def _has_bitmaps(image: Image | str) -> bool:
    """Whether an open image can hold bitmaps: version 2 cannot."""
    from qcowlib.qcow2.image import Qcow2Image

    top = None if isinstance(image, str) else image.layers[0]
    return isinstance(top, Qcow2Image) and top.header.version >= 3


class _Conversion:
    """One conversion: opens the sources, checks the target, and has the job done."""

    def __init__(self, args: Args, fmt: str, secrets: Mapping[str, bytes], console: Console, stack: ExitStack) -> None:
        self.args = args
        self.fmt = fmt
        self.secrets = secrets
        self.console = console
        self.stack = stack
        self.target = args.operands[-1]
        #: What was written: an open image, or the path of a new one.
        self.filled: Image | str = self.target
        #: Offsets and causes of block status that could not be read, to be told.
        self.unknown: list[tuple[int, str]] = []

    def run(self, progress: Progress) -> None:
        args = self.args
        cache = options.cache_mode(args, source=True)
        sources = [self._source(name, cache) for name in args.operands[:-1]]
        if args.flag("bitmaps"):
            self._check_bitmaps(sources)
        if args.flag("no-create"):
            target: Image | str = self._existing()
            values = None
        else:
            values = self._values(len(sources))
            target = creation.protocol_path(self.target)
        write_cache = options.cache_mode(args, default="unsafe")
        if args.flag("bitmaps"):
            # Source: qemu-img finds out when the target is made; here nothing is left behind.
            old = values.text("compat") in ("0.10", "v2") if values is not None else not _has_bitmaps(target)
            if old or self.fmt != "qcow2":
                raise Failure(f"Format driver '{self.fmt}' does not support bitmaps")
            if not isinstance(target, str):
                self._check_room(sources[0], target)
        try:
            self._convert(sources, target, values, write_cache, progress)
            self._tell_unknown(None)
        except Error as error:
            raise self._failure(error, created=values is not None) from None
        if args.flag("bitmaps"):
            if isinstance(self.filled, str):
                ref = ImageRef(self.target, self.filled, self.fmt)
                ref.secret = values.text("encrypt.key-secret") if values is not None else None
                self.filled = open_image(ref, self.console, secrets=self.secrets, writable=True, backing=False)
                self.stack.callback(self.filled.close)
            self._copy_bitmaps(sources[0], self.filled)

    def _source(self, name: str, cache: str) -> Image:
        args = self.args
        ref = image_ref(name, args.text("format"), image_opts=args.flag("image-opts"))
        snapshot = args.text("snapshot")
        if snapshot is not None and len(args.operands) > 2:
            raise Failure("No support for concatenating multiple snapshot")
        try:
            image = open_image(
                ref,
                self.console,
                secrets=self.secrets,
                force_share=args.flag("force-share"),
                cache=cache,
                snapshot=snapshot,
            )
        except Failure as failure:
            options.reraise_snapshot(failure, snapshot)
            raise
        self.stack.callback(image.close)
        return image

    def _check_bitmaps(self, sources: list[Image]) -> None:
        if len(sources) > 1:
            raise Failure("Copying bitmaps only possible with single source")
        if not _has_bitmaps(sources[0]):
            raise Failure("Source lacks bitmap support")
        for bitmap in reversed(sources[0].bitmaps()):
            if bitmap.inconsistent and not self.args.flag("skip-broken-bitmaps"):
                raise Failure(
                    f"Cannot copy inconsistent bitmap '{printable(bitmap.name)}'",
                    hint="Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it\n",
                )

    def _check_room(self, source: Image, target: Image) -> None:
        """Refuse an existing target that cannot have the bitmaps, in the words that qemu-img has for it afterwards."""
        there = {bitmap.name for bitmap in target.bitmaps()}
        for bitmap in reversed(source.bitmaps()):
            name = printable(bitmap.name)
            if not bitmap.inconsistent and bitmap.name in there:
                raise Failure(f"Failed to create bitmap {name}: Bitmap already exists: {name}")
            if not bitmap.inconsistent and source.size != target.size:
                sizes = f"destination size is {target.size}, source size is {source.size}"
                raise Failure(
                    f"Failed to populate bitmap {name}: Bitmaps are of different sizes ({sizes}) and can't be merged"
                )

    def _copy_bitmaps(self, source: Image, target: Image) -> None:
        """Copy all bitmaps.  Source: qemu-img sees them last first."""
        for bitmap in reversed(source.bitmaps()):
            if bitmap.inconsistent:
                self.console.warn(f"Skipping inconsistent bitmap '{printable(bitmap.name)}'")
        try:
            target.copy_bitmaps(source, skip_broken=True)
        except Error as error:
            raise Failure(f"Failed to copy bitmaps: {error.message}", hint=hint_text(error)) from None

    def _values(self, count: int) -> OptionList:
        """Return the options of the new image."""
        args, fmt = self.args, self.fmt
        if not creation.can_create(fmt):
            raise creation.not_made(fmt)
        creation.protocol_path(self.target)
        values = OptionList(create_table(fmt))
        values.parse(args.texts("options"), self.console)
        for option, key in (("backing", "backing_file"), ("backing-format", "backing_fmt")):
            text = args.text(option)
            if text is not None:
                if fmt != "qcow2":
                    what = "Backing file" if option == "backing" else "Backing file format"
                    raise Failure(f"{what} not supported for file format '{fmt}'")
                values.set(key, text)
        backing = values.text("backing_file")
        if count > 1 and backing is not None:
            raise Failure(
                "Having a backing file for the target makes no sense when concatenating multiple input images"
            )
        if backing is not None and values.text("backing_fmt") is None:
            raise Failure("Use of backing file requires explicit backing format")
        if args.flag("compress"):
            _check_compression(fmt, values)
        return values

    def _existing(self) -> Image:
        args = self.args
        image_opts = args.flag("target-image-opts")
        ref = image_ref(self.target, args.text("target-format") if image_opts else self.fmt, image_opts=image_opts)
        image = open_image(
            ref, self.console, secrets=self.secrets, writable=True, cache=options.cache_mode(args, default="unsafe")
        )
        self.stack.callback(image.close)
        return image

    def _convert(
        self, sources: list[Image], target: Image | str, values: OptionList | None, cache: str, progress: Progress
    ) -> None:
        from qcowlib.image import Image
        from qcowlib.jobs.convert import convert

        args = self.args
        salvage = args.flag("salvage")
        # Source: what an image behind blkdebug makes us say comes in the order of its offsets.
        alone = salvage and any(type(source) is not Image for source in sources)
        fresh = self._create_luks(sources, values) if values is not None and self.fmt == "luks" else None
        made = values if fresh is None else None
        self.filled = fresh or target
        convert(
            list(sources),
            fresh or target,
            format="qcow2" if self.fmt == "qcow2" else "raw",
            backing=values.text("backing_file") if values is not None else args.text("backing"),
            backing_format=values.text("backing_fmt") if values is not None else args.text("backing-format"),
            compress=args.flag("compress"),
            sparse_size=args.number("sparse"),
            existing=args.flag("no-create") or fresh is not None,
            target_is_zero=args.flag("target-is-zero") or fresh is not None,
            copy_offload=args.flag("offload"),
            out_of_order=args.flag("out-of-order"),
            salvage=self._salvage if salvage else None,
            references=references(),
            cache=cache,  # type: ignore[arg-type]
            progress=progress.within(),
            rate=args.number("rate") or None,
            workers=1 if alone else args.number("workers"),
            target_secret=self._target_secret(made),
            **(self._job_options(made) if made is not None else {}),
        )

    def _target_secret(self, values: OptionList | None) -> bytes | None:
        name = values.text("encrypt.key-secret") if values is not None else None
        return None if name is None else self.secrets.get(name)

    def _job_options(self, values: OptionList) -> dict[str, Any]:
        given = creation.job_options(values)
        if self.fmt == "qcow2":
            try:
                encrypt = encryption_of(values, self.secrets)
            except Failure as failure:
                text = f"{self.target}: error while converting {self.fmt}: {failure.messages[0]}"
                raise Failure(text, hint=failure.hint) from None
            if encrypt is not None:
                given["encrypt"] = encrypt
        return given

    def _create_luks(self, sources: list[Image], values: OptionList) -> Image:
        """Make a LUKS file and open it; the job fills it."""
        values.set("size", sum(source.size for source in sources))
        request = creation.Request(self.fmt, self.target, creation.protocol_path(self.target), values)
        try:
            creation.create(request, self.secrets)
        except Failure as failure:
            text = f"{self.target}: error while converting {self.fmt}: {failure.messages[0]}"
            raise Failure(text, hint=failure.hint) from None
        ref = ImageRef(self.target, request.path, self.fmt)
        ref.secret = values.text("key-secret")
        image = open_image(ref, self.console, secrets=self.secrets, writable=True)
        self.stack.callback(image.close)
        return image

    def _salvage(self, offset: int, error: Error) -> None:
        """Tell what cannot be read, in order: the map is asked for before anything in it is read."""
        if isinstance(error, StorageError) and error.operation == "block-status":
            if self.unknown and offset <= self.unknown[-1][0]:
                # The plan begins: what was told until now was for the progress.
                self._tell_unknown(None)
            self.unknown.append((offset, str(error.strerror)))
            return
        self._tell_unknown(offset)
        if not self.args.flag("quiet"):
            cause = error.strerror if isinstance(error, StorageError) else error.message
            self.console.warn(f"error while reading offset {offset}: {cause}")

    def _tell_unknown(self, end: int | None) -> None:
        """Tell of block status that could not be read, up to *end*."""
        while self.unknown and (end is None or self.unknown[0][0] <= end):
            offset, cause = self.unknown.pop(0)
            if not self.args.flag("quiet"):
                self.console.warn(f"error while reading block status at offset {offset}: {cause}")

    def _failure(self, error: Error, *, created: bool) -> Failure:
        text = error.message
        if isinstance(error, StorageError) and error.offset is not None and error.operation in ("read", "write"):
            verb = "reading" if error.operation == "read" else "writing"
            text = f"error while {verb} at byte {error.offset}: {error.strerror}"
        elif isinstance(error, StorageError) and error.operation == "block-status":
            text = f"error while reading block status at offset {error.offset}: {error.strerror}"
        elif error.hint == "Could not open backing image.":
            return Failure(f"Could not open '{self.target}': Could not open backing file: {text}")
        elif created and os.path.isdir(self.target):  # noqa: PTH112
            text = f"{self.target}: error while converting {self.fmt}: Could not create '{self.target}': Is a directory"
        elif created:
            text = f"{self.target}: error while converting {self.fmt}: {text}"
        return Failure(text, hint=hint_text(error))


def _check_compression(fmt: str, values: OptionList) -> None:
    if fmt != "qcow2":
        raise Failure("Compression not supported for this file format")
    if values.flag("encryption") or values.text("encrypt.format") is not None:
        raise Failure("Compression and encryption not supported at the same time")
    if values.text("preallocation") not in (None, "off"):
        raise Failure("Compression and preallocation not supported at the same time")
