# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``qpool domain``: make, look at, check, convert, grow, watch and remove domains."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from qcowlib.errors import Error
from qcowlib.units import human_size
from storage_pool import activation, block_group, mounts
from storage_pool.block_domain import BlockDomain
from storage_pool.check import check_domain, mend
from storage_pool.cli.hosting import DOMAIN, Session, Subject, now
from storage_pool.dump import dump_block, dump_file
from storage_pool.errors import InvalidName, UnsupportedVersion, printable
from storage_pool.file_domain import FileDomain, discover
from storage_pool.handles import AnyDomain
from storage_pool.ids import make_id
from storage_pool.metadata_domain import BACKUP, BLOCK_TYPES, DATA, LATEST_VERSION, TYPES, VERSIONS
from storage_pool.monitor import DomainMonitor, DomainStatus
from storage_pool.process import SystemRunner
from storage_pool.space import SpacePolicy, account
from storage_pool.upgrade import upgrade

if TYPE_CHECKING:
    from storage_pool.cli.hosting import Subparsers

__all__ = ["add_parsers"]

_CHECK_TEXT = "check a whole domain; reads only unless told to mend"
_CLASS_NAMES = {"data": DATA, "iso": "Iso", "export": BACKUP}


def _version(text: str) -> int:
    """Read V1 to V5, or the number that is stored; V1 is stored as 0."""
    number = text.upper().removeprefix("V")
    if number == "1":
        return 0
    if number.isascii() and number.isdigit() and int(number) in VERSIONS:
        return int(number)
    raise argparse.ArgumentTypeError(f"there is no domain version '{printable(text)}'; use V1 to V5")


def add_parsers(subjects: Subparsers, common: argparse.ArgumentParser) -> None:
    """Add the subcommands of this subject."""
    subject = Subject(subjects, common, "domain", "storage domains")
    add = subject.add
    text = "make a domain in a mounted directory or of devices"
    create = add("create", _create, text, domain=None, example="/mnt/data --name data")
    create.add_argument("place", nargs="+", metavar="DIRECTORY|DEVICE")
    create.add_argument("--type", choices=sorted(TYPES), default=None, help="LOCALFS or ISCSI by default")
    create.add_argument("--class", dest="domain_class", choices=sorted(_CLASS_NAMES), default="data")
    create.add_argument("--version", type=_version, default=None, metavar="V1..V5", help="the newest by default")
    create.add_argument("--name", default="", help="description, at most 50 characters")
    create.add_argument("--remote-path", default=None, help="what is mounted there; the directory by default")
    create.add_argument("--block-size", type=int, choices=(512, 4096), default=512)
    create.add_argument("--force", action="store_true", help="take devices that hold something")
    listing = add("list", _list, "list the domains in directories and on volume groups", domain=None, example="/mnt")
    listing.add_argument("place", nargs="*", metavar="DIRECTORY")
    text = "read from domains once and tell how long it took"
    monitor = add("monitor", _monitor, text, domain=None, example="/mnt/data")
    monitor.add_argument("place", nargs="+", metavar=DOMAIN)
    for verb, run, text in (
        ("show", _show, "show the keys of a domain and how full it is"),
        ("dump", _dump, "print all that is known of a domain; reads only"),
        ("destroy", _destroy, "remove a domain with everything in it"),
    ):
        add(verb, run, text, example="/mnt/data")
    upgrade = add("upgrade", _upgrade, "convert a data domain in place", example="/mnt/data V5")
    upgrade.add_argument("version", type=_version, metavar="V2..V5")
    leftovers = add("leftovers", _leftovers, "list what interrupted operations left", example="/mnt/data --sweep")
    leftovers.add_argument("--sweep", action="store_true", help="remove them")
    _add_checking(add("check", _check, _CHECK_TEXT, example="/mnt/data --mend"))
    whole = subjects.add_parser("check", parents=[common], help="check a whole domain", description=_CHECK_TEXT)
    whole.set_defaults(run=_check)
    whole.add_argument("domain", metavar=DOMAIN)
    _add_checking(whole)
    _add_device_verbs(subject)


def _add_checking(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mend", "--repair", action="store_true", help="mend what has a rule")
    text = "another domain, to which a move was cut; those beside the directory are found"
    parser.add_argument("--other", action="append", default=[], metavar=DOMAIN, help=text)


def _add_device_verbs(subject: Subject) -> None:
    add = subject.add
    for verb, run, text in (
        ("extend", _extend, "add devices to a volume group"),
        ("reduce", _reduce, "take an empty device out of a volume group"),
        ("resize", _resize, "let a volume group see that a device has grown"),
    ):
        parser = add(verb, run, text, domain="UUID", example="$DOMAIN /dev/mapper/lun1")
        parser.add_argument("place", nargs="+" if verb == "extend" else 1, metavar="DEVICE")
        if verb == "extend":
            parser.add_argument("--force", action="store_true", help="take devices that hold something")
    for verb, run, text in (
        ("mount", _mount, "mount the storage of file domains where hosts look for it"),
        ("unmount", _unmount, "unmount it"),
    ):
        parser = add(verb, run, text, domain=None, example="server:/export")
        parser.add_argument("remote", metavar="REMOTE", help="such as host:/path, a device or a directory")
        parser.add_argument("--type", choices=("NFS", "POSIXFS", "GLUSTERFS", "LOCALFS"), default="NFS")
        parser.add_argument("--root", default="/rhev/data-center", metavar="DIRECTORY")
        if verb == "mount":
            parser.add_argument("--file-system", default=None, metavar="NAME", help="of POSIXFS")
            parser.add_argument("--option", action="append", default=[], help="for mount; may be repeated")
    text = "deactivate logical volumes that nobody on this host has open"
    add("deactivate", _deactivate, text, domain="UUID", example="$DOMAIN")


def _create(session: Session) -> int:
    arguments = session.args
    uuid = make_id()
    kind = arguments.type or ("ISCSI" if arguments.place[0].startswith("/dev/") else "LOCALFS")
    domain_class = _CLASS_NAMES[arguments.domain_class]
    version = arguments.version
    if version is None:
        version = LATEST_VERSION if domain_class == DATA else 0
    made: AnyDomain
    if kind in BLOCK_TYPES:
        if domain_class != DATA:
            raise UnsupportedVersion("ISO and export domains are directories")
        made = session.change(
            block_group.create_block_domain,
            session.lvm,
            SystemRunner(),
            uuid,
            arguments.place,
            version=version,
            storage_type=kind,
            description=arguments.name,
            ctime=now(),
            force=arguments.force,
        )
    else:
        (directory, *more) = arguments.place
        if more:
            raise InvalidName("a domain in a directory has one place", path=more[0])
        made = session.change(
            FileDomain.create,
            directory,
            uuid,
            version=version,
            storage_type=kind,
            domain_class=domain_class,
            description=arguments.name,
            # Other hosts mount it: a name that means something only here would be wrong.
            remote_path=arguments.remote_path or os.path.abspath(directory),  # noqa: PTH100
            block_size=arguments.block_size,
            ctime=now(),
        )
    name = session.keep(made).name
    if session.out.as_json:
        return session.answer(path=name, uuid=made.uuid)
    session.out.line(f"created domain {made.uuid} in {name}" if name != made.uuid else f"created domain {made.uuid}")
    return 0


def _summary(domain: AnyDomain) -> dict[str, object]:
    total, free = domain.capacity()
    return {**domain.metadata.info(), "path": domain.name, "total": total, "free": free}


def _list(session: Session) -> int:
    found: list[dict[str, object]] = []
    status = 0
    names = [path for place in session.args.place for path in discover(place)]
    if session.args.device or not session.args.place:
        names += BlockDomain.discover(session.lvm)
    for name in names:
        try:
            found.append(_summary(session.domain(name)))
        except Error as error:
            # One bad domain must not hide the others.
            found.append({"path": name, "error": str(error)})
            status = 1
    columns = ("version", "type", "class", "role")
    rows = [
        [row.get("uuid", row["path"]), *(row.get(key, "-") for key in columns), row.get("name", row.get("error", ""))]
        for row in found
    ]
    session.table(found, ("uuid", *columns, "name"), rows)
    return status


def _show(session: Session) -> int:
    domain = session.domain()
    summary = _summary(domain)
    warnings = domain.warnings() if isinstance(domain, BlockDomain) else []
    figures = account(domain)
    warnings += SpacePolicy().warnings(figures)
    count = sum(1 for entry in domain.entries().values() if not entry.removed)
    summary.update(figures._asdict(), over_commit_percent=figures.over_commit_percent)
    summary.update(volumes=count, warnings=warnings)
    if session.out.as_json:
        return session.answer(**summary)
    for key in figures._fields:
        summary[key] = human_size(int(str(summary[key])))
    session.out.fields([(key, _plain(value)) for key, value in summary.items() if key != "warnings"])
    for warning in warnings:
        session.out.line(f"warning: {warning}")
    return 0


def _plain(value: object) -> object:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _dump(session: Session) -> int:
    domain = session.domain()
    document = dump_block(domain) if isinstance(domain, BlockDomain) else dump_file(domain)
    if session.out.as_json:
        session.out.document(document)
    else:
        _print_dump(session, document)
    return 0


def _print_dump(session: Session, document: Mapping[str, object]) -> None:
    info = document["info"]
    if isinstance(info, dict):
        session.out.fields([(key, _plain(value)) for key, value in info.items()])
    volumes = document.get("volumes")
    if isinstance(volumes, dict):
        columns = ("image", "parent", "format", "type", "voltype", "legality", "capacity", "status")
        rows = [[volume, *(told.get(key, "-") for key in columns)] for volume, told in sorted(volumes.items())]
        session.out.table(("VOLUME", *(key.upper() for key in columns)), rows)
    problems = document.get("problems")
    if isinstance(problems, dict):
        for name, texts in problems.items():
            session.out.line(f"problem: {name}: {'; '.join(texts)}")


def _leftovers(session: Session) -> int:
    domain = session.locked() if session.args.sweep else session.domain()
    found = domain.leftovers()
    session.table([leftover._asdict() for leftover in found], ("kind", "name", "why"), found)
    if session.args.sweep:
        session.change(domain.sweep, found)
        return 0
    return 3 if found else 0


def _check(session: Session) -> int:
    domain = session.domain()
    report = session.change(mend, domain, find=session.find) if session.args.mend else check_domain(domain)
    if session.out.as_json:
        session.out.document(report.to_dict())
    else:
        for line in report.lines():
            session.out.line(line)
    return 0 if report.clean else 3


def _upgrade(session: Session) -> int:
    domain = session.domain()
    report = session.change(upgrade, domain, session.args.version, ctime=now())
    if session.out.as_json:
        session.answer(problems=report, version=domain.metadata.version)
    else:
        for line in report:
            session.out.line(line)
    return 3 if report else 0


def _extend(session: Session) -> int:
    session.change(block_group.extend_block_domain, session.group(), session.args.place, force=session.args.force)
    return 0


def _reduce(session: Session) -> int:
    session.change(block_group.reduce_block_domain, session.group(), session.args.place[0])
    return 0


def _resize(session: Session) -> int:
    session.change(block_group.resize_device, session.group(), session.args.place[0])
    return 0


def _mount(session: Session) -> int:
    arguments = session.args
    target = mounts.mount(
        SystemRunner(),
        arguments.root,
        arguments.type,
        arguments.remote,
        file_system=arguments.file_system,
        options=arguments.option,
    )
    if session.out.as_json:
        return session.answer(path=target)
    session.out.line(target)
    return 0


def _unmount(session: Session) -> int:
    mounts.unmount(SystemRunner(), session.args.root, session.args.type, session.args.remote)
    return 0


def _deactivate(session: Session) -> int:
    left = activation.deactivate_unused(session.group())
    if session.out.as_json:
        return session.answer(in_use=left)
    for name in left:
        session.out.line(f"{name}: in use, still active")
    return 0


def _check_once(domain: AnyDomain) -> DomainStatus:
    return DomainMonitor(domain.uuid, lambda: domain, time.monotonic).check()


def _monitor(session: Session) -> int:
    found = []
    for name in session.args.place:
        try:
            status = _check_once(session.domain(name))
        except Error as error:
            status = DomainStatus(name, valid=False, error=str(error))
        found.append(status)
    document = [{"uuid": one.uuid, "valid": one.valid, "delay": one.delay_s, "error": one.error} for one in found]
    rows = [
        [one.uuid, "valid" if one.valid else "lost", "-" if one.delay_s is None else f"{one.delay_s * 1000:.1f} ms"]
        for one in found
    ]
    session.table(document, ("domain", "state", "read delay"), rows)
    if not session.out.as_json:
        for one in found:
            if one.error:
                session.out.line(f"{one.uuid}: {one.error}")
    return 0 if all(one.valid for one in found) else 3


def _destroy(session: Session) -> int:
    domain = session.domain()
    if isinstance(domain, BlockDomain):
        session.change(block_group.destroy_block_domain, domain)
    else:
        session.change(domain.destroy)
    return 0
