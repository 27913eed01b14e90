# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``qpool domain``: make, look at, check, convert, grow, watch and remove domains."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from qcowlib.errors import Error
from qcowlib.units import human_size
from storage_pool import activation, block_group, mounts
from storage_pool.block_domain import BlockDomain
from storage_pool.check import check_domain, mend
from storage_pool.cli.hosting import make_lvm, now, open_domain, take_token
from storage_pool.cli.output import Output
from storage_pool.dump import dump_block, dump_file
from storage_pool.errors import Illegal, printable
from storage_pool.file_domain import FileDomain, discover
from storage_pool.ids import make_id
from storage_pool.metadata_domain import BACKUP, BLOCK_TYPES, DATA, TYPES, VERSIONS
from storage_pool.monitor import DomainMonitor, DomainStatus
from storage_pool.process import SystemRunner
from storage_pool.space import SpacePolicy, account
from storage_pool.upgrade import upgrade

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

__all__ = ["add_parsers"]

Run = Callable[[argparse.Namespace, Output], int]
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
    verbs = subjects.add_parser("domain", help="storage domains").add_subparsers(
        dest="verb", required=True, metavar="VERB"
    )

    def add(verb: str, run: Run, text: str) -> argparse.ArgumentParser:
        parser = verbs.add_parser(verb, parents=[common], help=text, description=text)
        parser.set_defaults(run=run)
        return parser

    create = add("create", _create, "make a domain in a mounted directory or of devices")
    create.add_argument("place", nargs="+", metavar="DIRECTORY|DEVICE")
    create.add_argument("--type", choices=sorted(TYPES), default=None, help="LOCALFS or ISCSI by default")
    create.add_argument("--class", dest="domain_class", choices=sorted(_CLASS_NAMES), default="data")
    create.add_argument("--version", type=_version, default=5, metavar="V1..V5")
    create.add_argument("--name", default="", help="description, at most 50 characters")
    create.add_argument("--remote-path", default=None, help="what is mounted there; the directory by default")
    create.add_argument("--block-size", type=int, choices=(512, 4096), default=512)
    create.add_argument("--force", action="store_true", help="take devices that hold something")
    for verb, run, text in (
        ("extend", _extend, "add devices to a volume group"),
        ("reduce", _reduce, "take an empty device out of a volume group"),
        ("resize", _resize, "let a volume group see that a device has grown"),
    ):
        parser = add(verb, run, text)
        parser.add_argument("domain", metavar="UUID")
        parser.add_argument("place", nargs="+" if verb == "extend" else 1, metavar="DEVICE")
        if verb == "extend":
            parser.add_argument("--force", action="store_true", help="take devices that hold something")
    for verb, run, text in (
        ("mount", _mount, "mount the storage of file domains where hosts look for it"),
        ("unmount", _unmount, "unmount it"),
    ):
        parser = add(verb, run, text)
        parser.add_argument("remote", metavar="REMOTE", help="such as host:/path, a device or a directory")
        parser.add_argument("--type", choices=("NFS", "POSIXFS", "GLUSTERFS", "LOCALFS"), default="NFS")
        parser.add_argument("--root", default="/rhev/data-center", metavar="DIRECTORY")
        if verb == "mount":
            parser.add_argument("--file-system", default=None, metavar="NAME", help="of POSIXFS")
            parser.add_argument("--option", action="append", default=[], help="for mount; may be repeated")
    add("deactivate", _deactivate, "deactivate logical volumes that nobody on this host has open").add_argument(
        "domain", metavar="UUID"
    )
    add("monitor", _monitor, "read from domains once and tell how long it took").add_argument(
        "place", nargs="+", metavar="DIRECTORY|UUID"
    )
    listing = add("list", _list, "list the domains in directories and on volume groups")
    listing.add_argument("place", nargs="*", metavar="DIRECTORY")
    whole = subjects.add_parser("check", parents=[common], help="check a whole domain", description=_CHECK_TEXT)
    whole.set_defaults(run=_check)
    whole.add_argument("domain", metavar="DIRECTORY|UUID")
    whole.add_argument("--mend", action="store_true", help="mend what has a rule")
    for verb, run, text in (
        ("show", _show, "show the keys of a domain and how full it is"),
        ("dump", _dump, "print all that is known of a domain; reads only"),
        ("check", _check, _CHECK_TEXT),
        ("upgrade", _upgrade, "convert a data domain in place"),
        ("leftovers", _leftovers, "list what interrupted operations left"),
        ("destroy", _destroy, "remove a domain with everything in it"),
    ):
        parser = add(verb, run, text)
        parser.add_argument("domain", metavar="DIRECTORY|UUID")
        if verb == "check":
            parser.add_argument("--mend", action="store_true", help="mend what has a rule")
        if verb == "upgrade":
            parser.add_argument("version", type=_version, metavar="V2..V5")
        if verb == "leftovers":
            parser.add_argument("--sweep", action="store_true", help="remove them")


def _create(arguments: argparse.Namespace, output: Output) -> int:
    uuid = make_id()
    kind = arguments.type or ("ISCSI" if arguments.place[0].startswith("/dev/") else "LOCALFS")
    with take_token(arguments) as token:
        if kind in BLOCK_TYPES:
            runner = SystemRunner()
            with block_group.create_block_domain(
                token,
                make_lvm(arguments),
                runner,
                uuid,
                arguments.place,
                version=arguments.version,
                storage_type=kind,
                description=arguments.name,
                ctime=now(),
                force=arguments.force,
            ) as made:
                return _print_created(output, made.uuid, made.name)
        directory = arguments.place[0]
        with FileDomain.create(
            token,
            directory,
            uuid,
            version=arguments.version,
            storage_type=kind,
            domain_class=_CLASS_NAMES[arguments.domain_class],
            description=arguments.name,
            remote_path=arguments.remote_path or directory,
            block_size=arguments.block_size,
            ctime=now(),
        ) as file_domain:
            return _print_created(output, file_domain.uuid, file_domain.name)


def _print_created(output: Output, uuid: str, name: str) -> int:
    if output.as_json:
        output.document({"path": name, "uuid": uuid})
    else:
        output.line(f"created domain {uuid} in {name}" if name != uuid else f"created domain {uuid}")
    return 0


def _summary(domain: FileDomain | BlockDomain) -> dict[str, object]:
    total, free = domain.capacity()
    return {**domain.metadata.info(), "path": domain.name, "total": total, "free": free}


def _list(arguments: argparse.Namespace, output: Output) -> int:
    found: list[dict[str, object]] = []
    status = 0
    names = [path for place in arguments.place for path in discover(place)]
    if arguments.device or not arguments.place:
        names += BlockDomain.discover(make_lvm(arguments))
    for name in names:
        try:
            with open_domain(arguments, name) as domain:
                found.append(_summary(domain))
        except Error as error:
            # One bad domain must not hide the others.
            found.append({"path": name, "error": str(error)})
            status = 1
    if output.as_json:
        output.document(found)
        return status
    columns = ("version", "type", "class", "role")
    rows = [
        [row.get("uuid", row["path"]), *(row.get(key, "-") for key in columns), row.get("name", row.get("error", ""))]
        for row in found
    ]
    output.table(("UUID", "VERSION", "TYPE", "CLASS", "ROLE", "NAME"), rows)
    return status


def _show(arguments: argparse.Namespace, output: Output) -> int:
    with open_domain(arguments, arguments.domain) as domain:
        summary = _summary(domain)
        warnings = domain.warnings() if isinstance(domain, BlockDomain) else []
        count = sum(1 for entry in domain.entries().values() if not entry.removed)
        figures = account(domain)
    warnings += SpacePolicy().warnings(figures)
    summary.update(figures._asdict(), over_commit_percent=figures.over_commit_percent)
    summary.update(volumes=count, warnings=warnings)
    if output.as_json:
        output.document(summary)
        return 0
    for key in figures._fields:
        summary[key] = human_size(int(str(summary[key])))
    output.fields([(key, _plain(value)) for key, value in summary.items() if key != "warnings"])
    for warning in warnings:
        output.line(f"warning: {warning}")
    return 0


def _plain(value: object) -> object:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _dump(arguments: argparse.Namespace, output: Output) -> int:
    with open_domain(arguments, arguments.domain) as domain:
        document = dump_block(domain) if isinstance(domain, BlockDomain) else dump_file(domain)
    if output.as_json:
        output.document(document)
    else:
        _print_dump(document, output)
    return 0


def _print_dump(document: Mapping[str, object], output: Output) -> None:
    info = document["info"]
    if isinstance(info, dict):
        output.fields([(key, _plain(value)) for key, value in info.items()])
    volumes = document.get("volumes")
    if isinstance(volumes, dict):
        columns = ("image", "parent", "format", "type", "voltype", "legality", "capacity", "status")
        rows = [[volume, *(told.get(key, "-") for key in columns)] for volume, told in sorted(volumes.items())]
        output.table(("VOLUME", *(key.upper() for key in columns)), rows)
    problems = document.get("problems")
    if isinstance(problems, dict):
        for name, texts in problems.items():
            output.line(f"problem: {name}: {'; '.join(texts)}")


def _leftovers(arguments: argparse.Namespace, output: Output) -> int:
    with open_domain(arguments, arguments.domain) as domain:
        found = domain.leftovers()
        if output.as_json:
            output.document([leftover._asdict() for leftover in found])
        else:
            output.table(("KIND", "NAME", "WHY"), found)
        if arguments.sweep and found:
            with take_token(arguments) as token:
                domain.sweep(token, found)
            return 0
    return 3 if found else 0


def _check(arguments: argparse.Namespace, output: Output) -> int:
    with open_domain(arguments, arguments.domain) as domain:
        if arguments.mend:
            with take_token(arguments) as token:
                report = mend(token, domain)
        else:
            report = check_domain(domain)
    if output.as_json:
        document = report._asdict()
        document["findings"] = [finding._asdict() for finding in report.findings]
        document["leftovers"] = [leftover._asdict() for leftover in report.leftovers]
        output.document(document)
    else:
        output.line(f"{report.images} images, {report.volumes} volumes")
        for finding in report.findings:
            rule = "" if finding.repair == "none" else f" ({finding.repair} {finding.value})".replace(" )", ")")
            output.line(f"{finding.volume}: {finding.text}{rule}")
        for leftover in report.leftovers:
            output.line(f"{leftover.name}: {leftover.kind}, {leftover.why}")
        for name, note in report.unfinished.items():
            output.line(f"{name}: {note} was cut")
        for name in report.unmapped:
            output.line(f"{name}: a device that the keys of the domain do not name")
    return 0 if report.clean else 3


def _upgrade(arguments: argparse.Namespace, output: Output) -> int:
    with open_domain(arguments, arguments.domain) as domain, take_token(arguments) as token:
        report = upgrade(token, domain, arguments.version, ctime=now())
        version = domain.metadata.version
    if output.as_json:
        output.document({"problems": report, "version": version})
    else:
        for line in report:
            output.line(line)
    return 3 if report else 0


def _group(domain: FileDomain | BlockDomain) -> BlockDomain:
    if not isinstance(domain, BlockDomain):
        raise Illegal("a domain in a directory has no devices", path=domain.name)
    return domain


def _extend(arguments: argparse.Namespace, output: Output) -> int:
    with open_domain(arguments, arguments.domain) as domain, take_token(arguments) as token:
        block_group.extend_block_domain(token, _group(domain), arguments.place, force=arguments.force)
    return 0


def _reduce(arguments: argparse.Namespace, output: Output) -> int:
    with open_domain(arguments, arguments.domain) as domain, take_token(arguments) as token:
        block_group.reduce_block_domain(token, _group(domain), arguments.place[0])
    return 0


def _resize(arguments: argparse.Namespace, output: Output) -> int:
    with open_domain(arguments, arguments.domain) as domain, take_token(arguments) as token:
        block_group.resize_device(token, _group(domain), arguments.place[0])
    return 0


def _mount(arguments: argparse.Namespace, output: Output) -> int:
    target = mounts.mount(
        SystemRunner(),
        arguments.root,
        arguments.type,
        arguments.remote,
        file_system=arguments.file_system,
        options=arguments.option,
    )
    if output.as_json:
        output.document({"path": target})
    else:
        output.line(target)
    return 0


def _unmount(arguments: argparse.Namespace, output: Output) -> int:
    mounts.unmount(SystemRunner(), arguments.root, arguments.type, arguments.remote)
    return 0


def _deactivate(arguments: argparse.Namespace, output: Output) -> int:
    with open_domain(arguments, arguments.domain) as domain:
        left = activation.deactivate_unused(_group(domain))
    if output.as_json:
        output.document({"in_use": left})
    else:
        for name in left:
            output.line(f"{name}: in use, still active")
    return 0


def _check_once(domain: FileDomain | BlockDomain) -> DomainStatus:
    return DomainMonitor(domain.uuid, lambda: domain, time.monotonic).check()


def _monitor(arguments: argparse.Namespace, output: Output) -> int:
    found = []
    for name in arguments.place:
        try:
            with open_domain(arguments, name) as domain:
                status = _check_once(domain)
        except Error as error:
            status = DomainStatus(name, valid=False, error=str(error))
        found.append(status)
    if output.as_json:
        output.document(
            [{"uuid": one.uuid, "valid": one.valid, "delay": one.delay_s, "error": one.error} for one in found]
        )
    else:
        rows = [
            [one.uuid, "valid" if one.valid else "lost", "-" if one.delay_s is None else f"{one.delay_s * 1000:.1f} ms"]
            for one in found
        ]
        output.table(("DOMAIN", "STATE", "READ DELAY"), rows)
        for one in found:
            if one.error:
                output.line(f"{one.uuid}: {one.error}")
    return 0 if all(one.valid for one in found) else 3


def _destroy(arguments: argparse.Namespace, output: Output) -> int:
    with open_domain(arguments, arguments.domain) as domain, take_token(arguments) as token:
        if isinstance(domain, BlockDomain):
            block_group.destroy_block_domain(token, domain)
        else:
            domain.destroy(token)
    return 0
