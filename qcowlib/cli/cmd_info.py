# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``info``: what an image is.

Invariant: nothing is printed for a chain of which one link cannot be opened.
"""

from __future__ import annotations

from qcowlib.cli import options, several
from qcowlib.cli.console import Console, Failure, usage_failure
from qcowlib.cli.describe import describe, snapshot_table
from qcowlib.cli.jsonout import human, pretty
from qcowlib.cli.names import ImageRef, image_ref
from qcowlib.cli.opening import open_failure, open_storage, references, tell_lost_bitmaps
from qcowlib.cli.parser import Args, Command, Option
from qcowlib.errors import Error, printable
from qcowlib.units import human_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qcowlib.cli.jsonout import Json

__all__ = ["COMMAND", "run"]

COMMAND = Command(
    "info",
    "Show what images are.",
    "FILE...",
    (
        options.HELP,
        options.FORMAT_LONG,
        options.OUTPUT,
        Option("", "backing-chain", "chain", "show the backing files too"),
        options.OBJECT,
        options.IMAGE_OPTS,
        options.FORCE_SHARE,
        several.JOBS,
        several.RECURSIVE,
    ),
    "info --output=json --backing-chain disk.qcow2",
)


def run(args: Args, console: Console) -> int:
    """Run ``info``."""
    if not args.operands or (len(args.operands) > 1 and console.prog.startswith("qemu-img")):
        raise usage_failure("Expecting one image file name")
    as_json = options.wants_json(args)
    if args.texts("object"):
        from qcowlib.cli.objects import parse_secrets

        parse_secrets(args.texts("object"))
    if several.is_many(args, console):
        return _many(args, console, as_json)
    more = len(args.operands) > 1
    status, shown = 0, []
    for name in args.operands:
        try:
            ref = image_ref(name, args.text("format"), image_opts=args.flag("image-opts"), backing=False)
            shown += _chain(ref, args, console)
        except Failure as failure:
            if not more:
                raise
            status = console.fail(failure)
    if as_json:
        console.out(pretty(list(shown) if args.flag("chain") or more else shown[0]))
    else:
        console.out("\n".join(_text(item) for item in shown))
    return status


def _many(args: Args, console: Console, as_json: bool) -> int:
    def action(name: str) -> several.Answer:
        ref = image_ref(name, args.text("format"), image_opts=args.flag("image-opts"))
        items = _chain(ref, args, console)
        first = items[0]
        size, disk = first["virtual-size"], first["actual-size"]
        text = f"{first['format']}, {human_size(_int(size))} virtual, {human_size(_int(disk))} on disk"
        if "backing-filename" in first:
            text += f", over {printable(str(first['backing-filename']))}"
        found: dict[str, Json] = dict(first)
        if args.flag("chain"):
            found["chain"] = list(items)
        return several.Answer(str(first["format"]), text, found)

    return several.run_many(args, console, action, as_json=as_json)


def _int(value: Json) -> int:
    if not isinstance(value, int):
        raise TypeError("sizes are numbers")
    return value


def _chain(ref: ImageRef, args: Args, console: Console) -> list[dict[str, Json]]:
    found = [_one(ref, args, console)]
    seen = {ref.path}
    while args.flag("chain") and isinstance(found[-1].get("full-backing-filename"), str):
        try:
            ref = _next(ref, found[-1])
            if ref.path in seen:
                raise Failure(f"Backing file '{ref.path}' creates an infinite loop.")
            seen.add(ref.path)
            item = _one(ref, args, console)
        except Failure as failure:
            failure.messages = tuple(printable(message) for message in failure.messages)
            raise
        # The name comes from an image, not from the user.
        if not options.wants_json(args):
            item["filename"] = printable(str(item["filename"]))
        found.append(item)
    return found


def _next(ref: ImageRef, item: dict[str, Json]) -> ImageRef:
    """Return the backing file that *item*, the description of *ref*, names."""
    _check_allowed(ref, str(item["backing-filename"]))
    fmt = item.get("backing-filename-format")
    return image_ref(str(item["full-backing-filename"]), fmt if isinstance(fmt, str) else None)


def _check_allowed(ref: ImageRef, name: str) -> None:
    """Refuse what the policy for files that images name refuses.  Raises :class:`Failure`."""
    from qcowlib.errors import GateDenied
    from qcowlib.gate import name_of

    try:
        policy = references()
        path = name_of(policy, name, ref.path).path
        policy.open("backing", path, ref.path, writable=False, cache="writeback").close()
    except GateDenied as error:
        raise open_failure(name, error) from None
    except Error:
        return  # what opens it next says it better


def _one(ref: ImageRef, args: Args, console: Console) -> dict[str, Json]:
    file, storage, header = open_storage(ref, force_share=args.flag("force-share"))
    try:
        tell_lost_bitmaps(header, console)
        return describe(ref, file, storage, header)
    except Error as error:
        raise open_failure(ref.text, error) from None
    finally:
        file.close()


def _text(item: dict[str, Json]) -> str:
    size, disk = _int(item["virtual-size"]), item.get("actual-size")
    lines = [
        f"image: {item['filename']}\n",
        f"file format: {item['format']}\n",
        f"virtual size: {human_size(size)} ({size} bytes)\n",
        f"disk size: {'unavailable' if disk is None else human_size(_int(disk))}\n",
    ]
    if item.get("encrypted"):
        lines.append("encrypted: yes\n")
    if "cluster-size" in item:
        lines.append(f"cluster_size: {item['cluster-size']}\n")
    if item["dirty-flag"]:
        lines.append("cleanly shut down: no\n")
    if "backing-filename" in item:
        lines.append(_backing_line(item))
    if "backing-filename-format" in item:
        lines.append(f"backing file format: {printable(str(item['backing-filename-format']))}\n")
    snapshots = item.get("snapshots")
    if isinstance(snapshots, list):
        lines.append("Snapshot list:\n" + snapshot_table(snapshots))
    specific = item.get("format-specific")
    if isinstance(specific, dict):
        lines.append("Format specific information:\n" + human(specific["data"], 1))
    return "".join(lines)


def _backing_line(item: dict[str, Json]) -> str:
    name, full = item["backing-filename"], item.get("full-backing-filename")
    where = f" (actual path: {printable(str(full))})" if full != name else ""
    return f"backing file: {printable(str(name))}{where}\n"
