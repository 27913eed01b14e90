# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``qpool image move|import|export|upload|download|recover`` and ``qpool iso``: disks and media that change places."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Concatenate

from qcowlib.cli.values import parse_size
from qcowlib.units import human_size
from storage_pool import exchange, iso
from storage_pool.cli.hosting import DOMAIN, P, R, Session, Subject, add_progress, now
from storage_pool.domain import Domain
from storage_pool.errors import InvalidName
from storage_pool.metadata_volume import COW, PREALLOCATED, RAW, SPARSE
from storage_pool.token import SpmToken

if TYPE_CHECKING:
    from storage_pool.cli.hosting import Subparsers

__all__ = ["add_image_verbs", "add_parsers"]


def add_image_verbs(subject: Subject) -> None:
    """Add these verbs to the subject ``image``."""
    add = subject.add
    for verb, run, text in (
        ("move", _move, "move a disk to another domain"),
        ("export", _export, "copy a disk or template to an export domain"),
        ("import", _import, "copy a disk or template from an export domain"),
    ):
        parser = add(verb, run, text, "image", example="/mnt/data $IMAGE /mnt/other -p")
        parser.add_argument("to", metavar=f"TARGET-{DOMAIN}")
        add_progress(parser)
        if verb == "import":
            parser.add_argument("--new-ids", action="store_true", help="beside the one it was exported from")
            parser.add_argument("--collapse", action="store_true", help="make one volume of its chain")
    text = "remove a disk from an export domain; a template in use there becomes a fake one"
    add("unexport", _unexport, text, "image", example="/mnt/export $IMAGE")
    upload = add("upload", _upload, "make a disk of a file or of standard input", example="/mnt/data disk.raw -p")
    upload.add_argument("file", metavar="FILE|-")
    upload.add_argument("--content", choices=("raw", "qcow2"), default="raw", help="what the file holds")
    upload.add_argument("--size", default=None, metavar="SIZE", help="bytes of the stream; of a file its length")
    upload.add_argument("--format", choices=(RAW, COW), default=COW)
    upload.add_argument("--preallocated", action="store_true")
    upload.add_argument("--description", default="")
    upload.add_argument("--sha256", default=None, metavar="HEX", help="refuse another checksum")
    text = "write what a guest reads of a disk to a new file or standard output"
    download = add("download", _download, text, "image", example="/mnt/data $IMAGE disk.raw")
    download.add_argument("file", metavar="FILE|-")
    download.add_argument("--volume", default=None, help="a snapshot, or one of two leaves; the leaf by default")
    add_progress(upload, download)
    text = "end moves out of a domain that were cut, or take them back"
    recover = add("recover", _recover, text, example="/mnt/data /mnt/other")
    recover.add_argument("other", nargs="*", metavar=f"TARGET-{DOMAIN}", help="the domains they went to")


def add_parsers(subjects: Subparsers, common: argparse.ArgumentParser) -> None:
    """Add the subcommands of the subject ``iso``."""
    add = Subject(subjects, common, "iso", "media of an ISO domain").add
    add("list", _media, "list media", domain="DIRECTORY", example="/mnt/iso")
    upload = add("upload", _upload_medium, "put a medium into the domain", domain="DIRECTORY", example="/mnt/iso a.iso")
    upload.add_argument("file", metavar="FILE|-")
    upload.add_argument("--name", default=None, help="that of the file by default")
    upload.add_argument("--sha256", default=None, metavar="HEX", help="refuse another checksum")
    upload.add_argument("--replace", action="store_true", help="take the place of one of this name")
    add_progress(upload)
    add("remove", _remove_medium, "remove a medium", "name", domain="DIRECTORY", example="/mnt/iso a.iso")


@contextmanager
def _reading(name: str) -> Iterator[IO[bytes]]:
    if name == "-":
        yield sys.stdin.buffer
        return
    with Path(name).open("rb") as file:
        yield file


def _carry(
    session: Session,
    work: Callable[Concatenate[SpmToken, Domain, str, Domain, P], R],
    *args: P.args,
    **kwargs: P.kwargs,
) -> R:
    """Do *work*, which takes the disk of the command line to another domain."""
    source, target = session.domain(), session.domain(session.args.to)
    return session.change(work, source, session.args.image, target, *args, **kwargs)


def _move(session: Session) -> int:
    _carry(session, exchange.move_image, ctime=now(), progress=session.told)
    return session.answer(image=session.args.image)


def _export(session: Session) -> int:
    _carry(session, exchange.export_image, ctime=now(), progress=session.told)
    return session.answer(image=session.args.image)


def _import(session: Session) -> int:
    new_ids, flat = session.args.new_ids, session.args.collapse
    made = _carry(session, exchange.import_image, ctime=now(), new_ids=new_ids, flat=flat, progress=session.told)
    return session.answer(image=made)


def _unexport(session: Session) -> int:
    session.change(exchange.remove_exported, session.domain(), session.args.image)
    return 0


def _upload(session: Session) -> int:
    arguments = session.args
    size = None if arguments.size is None else parse_size(arguments.size)
    if arguments.size is not None and size is None:
        raise InvalidName("not a size; such as 10G")
    if size is None:
        if arguments.file == "-":
            raise InvalidName("the size of standard input is not known", hint="Tell it with --size.")
        size = Path(arguments.file).stat().st_size
    domain = session.domain()
    with _reading(arguments.file) as stream:
        made = session.change(
            exchange.upload,
            domain,
            stream,
            size,
            ctime=now(),
            content=arguments.content,
            fmt=arguments.format,
            kind=PREALLOCATED if arguments.preallocated or (arguments.format == RAW and domain.block) else SPARSE,
            description=arguments.description,
            sha256=arguments.sha256,
            progress=session.told,
        )
    return session.answer(**made._asdict())


def _download(session: Session) -> int:
    domain, image, volume = session.domain(), session.args.image, session.args.volume
    if session.args.file == "-":
        exchange.download(domain, image, sys.stdout.buffer, volume=volume, progress=session.told)
        return 0
    path = Path(session.args.file)
    try:
        with path.open("xb") as sink:
            done = exchange.download(domain, image, sink, volume=volume, progress=session.told)
    except FileExistsError:
        raise
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return session.answer(**done._asdict())


def _recover(session: Session) -> int:
    ended = session.change(exchange.recover_moves, session.domain(), session.find)
    session.table(ended, ("image", "end"), sorted(ended.items()))
    return 3 if exchange.AWAY in ended.values() else 0


# Media


def _media(session: Session) -> int:
    found = iso.list_media(session.files())
    return session.table(found, ("name", "size"), [(name, human_size(size)) for name, size in found.items()])


def _upload_medium(session: Session) -> int:
    arguments = session.args
    if arguments.file == "-" and arguments.name is None:
        raise InvalidName("standard input has no name", hint="Tell it with --name.")
    name = arguments.name or Path(arguments.file).name
    size = None if arguments.file == "-" else Path(arguments.file).stat().st_size
    with _reading(arguments.file) as stream:
        done = session.change(
            iso.upload_media,
            session.files(),
            name,
            stream,
            size=size,
            sha256=arguments.sha256,
            replace=arguments.replace,
            progress=session.told,
        )
    return session.answer(name=name, **done._asdict())


def _remove_medium(session: Session) -> int:
    session.change(iso.remove_media, session.files(), session.args.name)
    return 0
