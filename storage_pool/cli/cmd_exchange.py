# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``qpool image move|import|export|upload|download|recover`` and ``qpool iso``: disks and media that change places."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from qcowlib.cli.values import parse_size
from qcowlib.units import human_size
from storage_pool import exchange, iso
from storage_pool.cli.hosting import now, open_domain, take_token
from storage_pool.cli.output import Output
from storage_pool.errors import Illegal, InvalidName
from storage_pool.file_domain import FileDomain
from storage_pool.metadata_volume import COW, PREALLOCATED, RAW, SPARSE

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

__all__ = ["add_image_verbs", "add_parsers"]

Run = Callable[[argparse.Namespace, Output], int]
Add = Callable[[str, Run, str], argparse.ArgumentParser]


def add_image_verbs(add: Add) -> None:
    """Add these verbs to the subject ``image``."""
    for verb, run, text in (
        ("move", _move, "move a disk to another domain"),
        ("export", _export, "copy a disk or template to an export domain"),
        ("import", _import, "copy a disk or template from an export domain"),
    ):
        parser = add(verb, run, text)
        parser.add_argument("image")
        parser.add_argument("to", metavar="TARGET-DIRECTORY|UUID")
        _add_progress(parser)
        if verb == "import":
            parser.add_argument("--new-ids", action="store_true", help="beside the one it was exported from")
            parser.add_argument("--collapse", action="store_true", help="make one volume of its chain")
    upload = add("upload", _upload, "make a disk of a file or of standard input")
    upload.add_argument("file", metavar="FILE|-")
    upload.add_argument("--content", choices=("raw", "qcow2"), default="raw", help="what the file holds")
    upload.add_argument("--size", default=None, metavar="SIZE", help="bytes of the stream; of a file its length")
    upload.add_argument("--format", choices=(RAW, COW), default=COW)
    upload.add_argument("--preallocated", action="store_true")
    upload.add_argument("--description", default="")
    download = add("download", _download, "write what a guest reads of a disk to a new file or standard output")
    download.add_argument("image")
    download.add_argument("file", metavar="FILE|-")
    download.add_argument("--volume", default=None, help="a snapshot, or one of two leaves; the leaf by default")
    for parser in (upload, download):
        _add_progress(parser)
    upload.add_argument("--sha256", default=None, metavar="HEX", help="refuse another checksum")
    recover = add("recover", _recover, "end moves out of a domain that were cut, or take them back")
    recover.add_argument("to", nargs="*", metavar="TARGET-DIRECTORY|UUID", help="the domains they went to")


def _add_progress(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-p", "--progress", action="store_true", help="tell the progress on standard error")


def add_parsers(subjects: Subparsers, common: argparse.ArgumentParser) -> None:
    """Add the subcommands of the subject ``iso``."""
    verbs = subjects.add_parser("iso", help="media of an ISO domain").add_subparsers(
        dest="verb", required=True, metavar="VERB"
    )
    for verb, run, text in (
        ("list", _media, "list media"),
        ("upload", _upload_medium, "put a medium into the domain"),
        ("remove", _remove_medium, "remove a medium"),
    ):
        parser = verbs.add_parser(verb, parents=[common], help=text, description=text)
        parser.set_defaults(run=run)
        parser.add_argument("domain", metavar="DIRECTORY")
        if verb == "upload":
            parser.add_argument("file", metavar="FILE|-")
            parser.add_argument("--name", default=None, help="that of the file by default")
            parser.add_argument("--sha256", default=None, metavar="HEX", help="refuse another checksum")
            parser.add_argument("--replace", action="store_true", help="take the place of one of this name")
            _add_progress(parser)
        if verb == "remove":
            parser.add_argument("name")


@contextmanager
def _reading(name: str) -> Iterator[IO[bytes]]:
    if name == "-":
        yield sys.stdin.buffer
        return
    with Path(name).open("rb") as file:
        yield file


def _answer(output: Output, **values: object) -> int:
    if output.as_json:
        output.document(values)
    else:
        output.fields(list(values.items()))
    return 0


def _move(arguments: argparse.Namespace, output: Output) -> int:
    with (
        open_domain(arguments, arguments.domain) as source,
        open_domain(arguments, arguments.to) as target,
        take_token(arguments) as token,
        output.progress(arguments.progress) as told,
    ):
        exchange.move_image(token, source, arguments.image, target, ctime=now(), progress=told)
    return _answer(output, image=arguments.image)


def _export(arguments: argparse.Namespace, output: Output) -> int:
    with (
        open_domain(arguments, arguments.domain) as source,
        open_domain(arguments, arguments.to) as target,
        take_token(arguments) as token,
        output.progress(arguments.progress) as told,
    ):
        exchange.export_image(token, source, arguments.image, target, ctime=now(), progress=told)
    return _answer(output, image=arguments.image)


def _import(arguments: argparse.Namespace, output: Output) -> int:
    with (
        open_domain(arguments, arguments.domain) as source,
        open_domain(arguments, arguments.to) as target,
        take_token(arguments) as token,
        output.progress(arguments.progress) as told,
    ):
        made = exchange.import_image(
            token,
            source,
            arguments.image,
            target,
            ctime=now(),
            new_ids=arguments.new_ids,
            flat=arguments.collapse,
            progress=told,
        )
    return _answer(output, image=made)


def _upload(arguments: argparse.Namespace, output: Output) -> int:
    size = None if arguments.size is None else parse_size(arguments.size)
    if arguments.size is not None and size is None:
        raise InvalidName("not a size; such as 10G")
    if size is None:
        if arguments.file == "-":
            raise InvalidName("the size of standard input is not known", hint="Tell it with --size.")
        size = Path(arguments.file).stat().st_size
    with (
        _reading(arguments.file) as stream,
        open_domain(arguments, arguments.domain) as domain,
        take_token(arguments) as token,
        output.progress(arguments.progress) as told,
    ):
        made = exchange.upload(
            token,
            domain,
            stream,
            size,
            ctime=now(),
            content=arguments.content,
            fmt=arguments.format,
            kind=PREALLOCATED if arguments.preallocated or (arguments.format == RAW and domain.block) else SPARSE,
            description=arguments.description,
            sha256=arguments.sha256,
            progress=told,
        )
    return _answer(output, **made._asdict())


def _download(arguments: argparse.Namespace, output: Output) -> int:
    with open_domain(arguments, arguments.domain) as domain, output.progress(arguments.progress) as told:
        if arguments.file == "-":
            exchange.download(domain, arguments.image, sys.stdout.buffer, volume=arguments.volume, progress=told)
            return 0
        path = Path(arguments.file)
        try:
            with path.open("xb") as sink:
                done = exchange.download(domain, arguments.image, sink, volume=arguments.volume, progress=told)
        except FileExistsError:
            raise
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    return _answer(output, **done._asdict())


def _recover(arguments: argparse.Namespace, output: Output) -> int:
    targets = [open_domain(arguments, name) for name in arguments.to]
    known = {target.uuid: target for target in targets}
    try:
        with open_domain(arguments, arguments.domain) as source, take_token(arguments) as token:
            ended = exchange.recover_moves(
                token, source, lambda uuid: known[uuid] if uuid in known else open_domain(arguments, uuid)
            )
    finally:
        for target in targets:
            target.close()
    if output.as_json:
        output.document(ended)
    else:
        output.table(("IMAGE", "END"), sorted(ended.items()))
    return 0


# Media


@contextmanager
def _open_iso(arguments: argparse.Namespace) -> Iterator[FileDomain]:
    with open_domain(arguments, arguments.domain) as domain:
        if not isinstance(domain, FileDomain):
            raise Illegal("a volume group holds no media", path=domain.name)
        yield domain


def _media(arguments: argparse.Namespace, output: Output) -> int:
    with _open_iso(arguments) as domain:
        found = iso.list_media(domain)
    if output.as_json:
        output.document(found)
    else:
        output.table(("NAME", "SIZE"), [(name, human_size(size)) for name, size in found.items()])
    return 0


def _upload_medium(arguments: argparse.Namespace, output: Output) -> int:
    if arguments.file == "-" and arguments.name is None:
        raise InvalidName("standard input has no name", hint="Tell it with --name.")
    name = arguments.name or Path(arguments.file).name
    size = None if arguments.file == "-" else Path(arguments.file).stat().st_size
    with (
        _reading(arguments.file) as stream,
        _open_iso(arguments) as domain,
        take_token(arguments) as token,
        output.progress(arguments.progress) as told,
    ):
        done = iso.upload_media(
            token,
            domain,
            name,
            stream,
            size=size,
            sha256=arguments.sha256,
            replace=arguments.replace,
            progress=told,
        )
    return _answer(output, name=name, **done._asdict())


def _remove_medium(arguments: argparse.Namespace, output: Output) -> int:
    with _open_iso(arguments) as domain, take_token(arguments) as token:
        iso.remove_media(token, domain, arguments.name)
    return 0
