# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``serve``: images over NBD until a signal or the last client ends it.

Invariant: nobody but the owner can connect unless a port was asked for; on
SIGTERM and SIGINT what clients wrote is durable before the command ends.
"""

from __future__ import annotations

import os
import signal

from qcowlib.cli import options
from qcowlib.cli.console import Console, Failure, usage_failure
from qcowlib.cli.jsonout import compact, pretty
from qcowlib.cli.names import image_ref
from qcowlib.cli.objects import parse_secrets
from qcowlib.cli.opening import hint_text, open_image
from qcowlib.cli.parser import Args, Command, Option
from qcowlib.errors import Error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from qcowlib.cli.jsonout import Json
    from qcowlib.image import Image
    from qcowlib.nbd.export import Export
    from qcowlib.nbd.server import Event, NbdServer

__all__ = ["COMMAND", "run"]


def _number(what: str, low: int, high: int) -> Callable[[str, Console], int]:
    def convert(text: str, _console: Console) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 8 and low <= int(text) <= high):
            raise Failure(f"{what} must be a number from {low} to {high}")
        return int(text)

    return convert


COMMAND = Command(
    "serve",
    "Serve images over NBD.",
    "FILE...",
    (
        options.HELP,
        options.OBJECT,
        options.IMAGE_OPTS,
        options.FORCE_SHARE,
        options.QUIET,
        options.FORMAT,
        Option("", "cache", "cache", "cache mode of what is written", meta="CACHE"),
        Option("k", "socket", "socket", "listen on this Unix socket (default: in a new private folder)", meta="PATH"),
        Option(
            "p",
            "port",
            "port",
            "listen on this TCP port of 127.0.0.1 instead (0: any)",
            meta="PORT",
            convert=_number("--port", 0, 65535),
        ),
        Option(
            "",
            "fd",
            "fd",
            "serve a descriptor that listens already (default: that of socket activation)",
            meta="FD",
            convert=_number("--fd", 0, 1 << 20),
        ),
        Option("r", "read-only", "read-only", "refuse changes (the default)"),
        Option("w", "writable", "writable", "let clients write"),
        Option("x", "export-name", "names", "name of the export, once for each FILE", meta="NAME", repeat=True),
        Option("D", "description", "description", "what a list of exports says of them", meta="TEXT"),
        Option("l", "snapshot", "snapshot", "serve this internal snapshot, read-only", meta="SNAPSHOT"),
        Option("B", "bitmap", "bitmaps", "let clients read this dirty bitmap", meta="NAME", repeat=True),
        Option("t", "persistent", "persistent", "go on when the last client has gone (the default)"),
        Option("", "once", "once", "end when the last client has gone"),
        Option(
            "e",
            "shared",
            "shared",
            "clients at once (default: 16)",
            meta="COUNT",
            convert=_number("--shared", 1, 1024),
        ),
        Option(
            "",
            "timeout",
            "timeout",
            "seconds after which a client that takes no answer is dropped (default: 60; 0: never)",
            meta="SECONDS",
            convert=_number("--timeout", 0, 1_000_000),
        ),
        Option("", "pid-file", "pid-file", "write the process number there once clients can connect", meta="PATH"),
        Option("", "plan", "plan", "tell what would be served, and serve nothing"),
        options.OUTPUT,
    ),
    "serve --plan --writable --socket disk.sock disk.qcow2",
)


def run(args: Args, console: Console) -> int:
    """Run ``serve``."""
    as_json = options.wants_json(args)
    names = _names(args)
    if args.flag("read-only") and args.flag("writable"):
        raise usage_failure("--read-only and --writable exclude each other")
    if args.flag("once") and args.flag("persistent"):
        raise usage_failure("--once and --persistent exclude each other")
    writable = args.flag("writable")
    if writable and args.text("snapshot") is not None:
        raise usage_failure("A snapshot can only be served for reading")
    images: list[Image] = []
    try:
        exports = _exports(args, console, names, images, writable)
        if args.flag("plan"):
            _plan(args, console, exports, as_json)
            return 0
        return _serve(args, console, exports, as_json)
    except Error as error:
        raise Failure(str(error), hint=hint_text(error)) from None
    finally:
        _close(images)


def _names(args: Args) -> list[str]:
    """The name of each export: as given, nothing for one alone, else the name of the file."""
    files, given = args.operands, args.texts("names")
    if not files:
        raise usage_failure("Expecting at least one image file name")
    if given and len(given) != len(files):
        raise usage_failure("--export-name must be given once for each file")
    names = given or ([""] if len(files) == 1 else [os.path.basename(name) for name in files])
    if len(set(names)) != len(names):
        raise Failure("Exports need different names; give them with --export-name")
    return names


def _exports(args: Args, console: Console, names: list[str], images: list[Image], writable: bool) -> list[Export]:
    from qcowlib.nbd.export import Export

    secrets: Mapping[str, bytes] = parse_secrets(args.texts("object"))
    cache = options.cache_mode(args)
    exports = []
    for name, text in zip(names, args.operands, strict=True):
        ref = image_ref(text, args.text("format"), image_opts=args.flag("image-opts"))
        image = open_image(
            ref,
            console,
            secrets=secrets,
            writable=writable,
            force_share=args.flag("force-share"),
            cache=cache,
            snapshot=args.text("snapshot"),
        )
        images.append(image)
        description = args.text("description") or ""
        exports.append(Export(image, name, bitmaps=args.texts("bitmaps"), description=description))
    return exports


def _plan(args: Args, console: Console, exports: list[Export], as_json: bool) -> None:
    where, fd = args.text("socket"), args.number("fd")
    if args.number("port") is not None:
        where = f"127.0.0.1:{args.number('port')}"
    elif fd is not None:
        where = f"descriptor {fd}"
    described: list[Json] = [
        {
            "filename": export.image.path,
            "export-name": export.name,
            "size": export.info.size,
            "read-only": export.read_only,
            "contexts": list(export.info.contexts),
        }
        for export in exports
    ]
    if as_json:
        console.out(pretty({"address": where, "exports": described}))
        return
    console.out(f"would listen on {where or 'a Unix socket in a new private folder'}\n")
    for export in exports:
        access = "read-only" if export.read_only else "writable"
        console.out(f"'{export.name}': {export.image.path}, {export.info.size} bytes, {access}\n")
        console.out(f"    {', '.join(export.info.contexts)}\n")


def _serve(args: Args, console: Console, exports: list[Export], as_json: bool) -> int:
    from qcowlib.nbd.address import activated_descriptor
    from qcowlib.nbd.server import NbdServer

    fd = args.number("fd")
    if fd is None and args.text("socket") is None and args.number("port") is None:
        fd = activated_descriptor(os.environ)
    timeout = args.number("timeout")
    tell = _teller(console, as_json, args.flag("quiet"))
    server = NbdServer(
        exports,
        socket=args.text("socket"),
        port=args.number("port"),
        fd=fd,
        shared=args.number("shared") or 16,
        once=args.flag("once"),
        timeout=(60 if timeout is None else timeout) or None,
        on_event=tell,
    )
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: server.request_stop())
    try:
        _announce(args, tell, server, console, as_json)
        server.wait()
    finally:
        server.stop()
    tell({"event": "stopped"})
    return 0


def _announce(args: Args, tell: Callable[[Event], None], server: NbdServer, console: Console, as_json: bool) -> None:
    if as_json:
        for name in server.exports:
            tell({"event": "listening", "export": name, "uri": server.uri_of(name)})
    elif not args.flag("quiet"):
        console.out("".join(f"{server.uri_of(name)}\n" for name in server.exports))
        console.flush()
    path = args.text("pid-file")
    if path is not None:
        try:
            with open(path, "w") as file:
                file.write(f"{os.getpid()}\n")
        except OSError as error:
            raise Failure(f"Could not write '{path}': {error.strerror}") from None


def _teller(console: Console, as_json: bool, quiet: bool) -> Callable[[Event], None]:
    """What is said of events: JSON lines on standard output, or problems on standard error."""

    def tell(event: Event) -> None:
        if as_json:
            # One write a line: threads tell too.
            os.write(1, (compact(event) + "\n").encode())
        elif event.get("problem") and not quiet:
            console.warn(f"client {event['client']}: {event['problem']}")

    return tell


def _close(images: list[Image]) -> None:
    first: Error | None = None
    for image in images:
        try:
            image.close()
        except Error as error:
            first = first or error
    if first is not None:
        raise Failure(str(first), hint=hint_text(first))
