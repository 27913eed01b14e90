# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``qpool volume``, ``image``, ``snapshot`` and ``template``: what is in a domain."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from qcowlib.cli.values import parse_size
from qcowlib.units import human_size
from storage_pool import image_group, merge, merge_swap, snapshot, transfer, volume
from storage_pool.cli.cmd_exchange import add_image_verbs
from storage_pool.cli.hosting import now, open_domain, take_token
from storage_pool.cli.output import Output
from storage_pool.ids import BLANK, make_id
from storage_pool.metadata_volume import COW, ILLEGAL, LEGAL, PREALLOCATED, RAW, SHARED, SPARSE

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

__all__ = ["add_parsers"]

Run = Callable[[argparse.Namespace, Output], int]
Add = Callable[[str, Run, str], argparse.ArgumentParser]


def _size(text: str) -> int:
    """Read a size as ``qcow`` does, with a suffix k to E."""
    size = parse_size(text)
    if size is None or size >= 1 << 63:
        raise argparse.ArgumentTypeError("not a size; such as 10G")
    return size


def add_parsers(subjects: Subparsers, common: argparse.ArgumentParser) -> None:
    """Add the subcommands of these subjects."""

    def verbs_of(subject: str, text: str) -> Add:
        verbs = subjects.add_parser(subject, help=text).add_subparsers(dest="verb", required=True, metavar="VERB")

        def add(verb: str, run: Run, text: str) -> argparse.ArgumentParser:
            parser = verbs.add_parser(verb, parents=[common], help=text, description=text)
            parser.set_defaults(run=run)
            parser.add_argument("domain", metavar="DIRECTORY|UUID")
            return parser

        return add

    _add_volume_verbs(verbs_of("volume", "volumes of disks"))
    images = verbs_of("image", "whole disks")
    _add_disk_verbs(images)
    add_image_verbs(images)
    _add_template_verbs(verbs_of("template", "templates"))
    _add_snapshot_verbs(verbs_of("snapshot", "snapshots of disks that nobody writes"))


def _add_volume_verbs(add: Add) -> None:
    create = add("create", _create, "make a volume")
    create.add_argument("size", type=_size, metavar="SIZE", help="such as 10G")
    create.add_argument("--image", help="the disk it belongs to; a new one by default")
    create.add_argument("--parent", default=BLANK, help="the template it stands on")
    create.add_argument("--format", choices=(RAW, COW), default=COW)
    create.add_argument("--preallocated", action="store_true")
    create.add_argument("--initial-size", type=_size, default=None, metavar="SIZE")
    create.add_argument("--disk-type", default="DATA")
    create.add_argument("--description", default="")
    add("list", _list, "list volumes")
    extend = add("extend", _extend, "make a disk larger")
    extend.add_argument("volume")
    extend.add_argument("size", type=_size, metavar="SIZE")
    update = add("update", _update, "change what a volume's record says")
    update.add_argument("volume")
    update.add_argument("--legality", choices=(LEGAL, ILLEGAL), default=None)
    update.add_argument("--description", default=None)
    update.add_argument("--generation", type=int, default=None, metavar="N", help="the next one by default")
    update.add_argument("--expect", type=int, default=None, metavar="N", help="refuse another generation than this")
    remove = add("remove", _remove, "remove a volume")
    remove.add_argument("volume")
    remove.add_argument("--zero", action="store_true", help="overwrite its data first")
    remove.add_argument("--discard", action="store_true", help="give its blocks back to the storage below")


def _add_disk_verbs(add: Add) -> None:
    show = add("show", _show, "show the chain of a disk and what is wrong with it")
    show.add_argument("image")
    copy = add("copy", _copy, "copy a disk, within the domain or to another")
    copy.add_argument("image")
    copy.add_argument("--to", metavar="DIRECTORY|UUID", help="the domain to copy to")
    copy.add_argument("--collapse", action="store_true", help="make one volume of its chain")
    copy.add_argument("-p", "--progress", action="store_true", help="tell the progress on standard error")
    drop = add("remove", _remove_image, "remove a disk")
    drop.add_argument("image")
    drop.add_argument("--zero", action="store_true", help="overwrite its data first")
    drop.add_argument("--discard", action="store_true", help="give its blocks back to the storage below")


def _add_template_verbs(add: Add) -> None:
    add("list", _templates, "list templates")
    for verb, run, text in (
        ("thin", _thin, "make a disk that stands on a template"),
        ("clone", _clone, "make a disk of one volume that reads as a template"),
    ):
        parser = add(verb, run, text)
        parser.add_argument("image")
        parser.add_argument("--description", default="")
    parser.add_argument("-p", "--progress", action="store_true", help="tell the progress on standard error")
    template = add("create", _template, "make a template of what a disk reads as")
    template.add_argument("image")
    template.add_argument("--description", default=None)
    template.add_argument("-p", "--progress", action="store_true", help="tell the progress on standard error")


def _add_snapshot_verbs(add: Add) -> None:
    take = add("create", _snapshot, "take a snapshot")
    take.add_argument("image")
    for verb, run, text in (
        ("preview", _preview, "make a second leaf on a snapshot"),
        ("undo", _undo, "drop a preview"),
        ("commit", _commit, "make a preview the disk"),
        ("delete", _delete, "merge a volume into its parent"),
    ):
        parser = add(verb, run, text)
        parser.add_argument("image")
        parser.add_argument("volume")
        if verb == "delete":
            text = "merge it with its child instead, into a new volume that takes the child's name"
            parser.add_argument("--by-renames", action="store_true", help=text)


def _answer(output: Output, **values: object) -> int:
    if output.as_json:
        output.document(values)
    else:
        output.fields(list(values.items()))
    return 0


def _create(arguments: argparse.Namespace, output: Output) -> int:
    spec = volume.VolumeSpec(
        arguments.image or make_id(),
        make_id(),
        arguments.size,
        arguments.format,
        PREALLOCATED if arguments.preallocated else SPARSE,
        arguments.parent,
        arguments.disk_type,
        arguments.description,
        initial_size=arguments.initial_size,
    )
    with open_domain(arguments, arguments.domain) as domain, take_token(arguments) as token:
        record = volume.create_volume(token, domain, spec, now())
    return _answer(output, image=spec.image, volume=spec.volume, capacity=record.capacity)


def _list(arguments: argparse.Namespace, output: Output) -> int:
    with open_domain(arguments, arguments.domain) as domain:
        records = volume.records_of(domain)
        rows = [
            {"volume": name, **record._asdict(), "size": domain.size_of(name)}
            for name, record in sorted(records.items(), key=lambda item: (item[1].image, item[1].ctime, item[0]))
        ]
    if output.as_json:
        output.document(rows)
        return 0
    columns = ("volume", "image", "format", "type", "voltype", "legality")
    table = [
        [*(row[key] for key in columns), human_size(int(str(row["capacity"]))), human_size(int(str(row["size"])))]
        for row in rows
    ]
    output.table((*(key.upper() for key in columns), "CAPACITY", "SIZE"), table)
    return 0


def _extend(arguments: argparse.Namespace, output: Output) -> int:
    with open_domain(arguments, arguments.domain) as domain, take_token(arguments) as token:
        record = volume.extend_capacity(token, domain, arguments.volume, arguments.size)
    return _answer(output, volume=arguments.volume, capacity=record.capacity)


def _update(arguments: argparse.Namespace, output: Output) -> int:
    with open_domain(arguments, arguments.domain) as domain, take_token(arguments) as token:
        record = volume.update_volume(
            token,
            domain,
            arguments.volume,
            legality=arguments.legality,
            description=arguments.description,
            generation=arguments.generation,
            expected_generation=arguments.expect,
        )
    return _answer(output, volume=arguments.volume, legality=record.legality, generation=record.generation)


def _remove(arguments: argparse.Namespace, output: Output) -> int:
    with open_domain(arguments, arguments.domain) as domain, take_token(arguments) as token:
        image = domain.record(arguments.volume).image
        volume.remove_volumes(token, domain, image, [arguments.volume], zero=arguments.zero, discard=arguments.discard)
    return 0


def _remove_image(arguments: argparse.Namespace, output: Output) -> int:
    with open_domain(arguments, arguments.domain) as domain, take_token(arguments) as token:
        group = image_group.ImageGroup.load(domain, arguments.image)
        volume.remove_volumes(
            token, domain, arguments.image, group.own(), zero=arguments.zero, discard=arguments.discard
        )
    return 0


def _show(arguments: argparse.Namespace, output: Output) -> int:
    with open_domain(arguments, arguments.domain) as domain:
        group = image_group.ImageGroup.load(domain, arguments.image)
        found = image_group.findings(group)
    if output.as_json:
        volumes = {name: record._asdict() for name, record in group.records.items()}
        told = [finding._asdict() for finding in found]
        output.document({"image": group.image, "leaves": group.leaves(), "volumes": volumes, "findings": told})
    else:
        for leaf in group.leaves():
            output.line(" <- ".join(reversed(group.chain(leaf))) if not found else leaf)
        for name, record in sorted(group.records.items()):
            what = "template" if record.voltype == SHARED else record.voltype.lower()
            output.line(f"{name}  {record.format}  {what}  {record.legality}")
        for finding in found:
            output.line(f"{finding.volume}: {finding.text}")
    return 3 if found else 0


def _copy(arguments: argparse.Namespace, output: Output) -> int:
    with (
        open_domain(arguments, arguments.domain) as source,
        open_domain(arguments, arguments.to or arguments.domain) as target,
        take_token(arguments) as token,
        output.progress(arguments.progress) as told,
    ):
        if arguments.collapse:
            image, made = transfer.collapse(token, source, arguments.image, target, ctime=now(), progress=told)
            return _answer(output, image=image, volume=made)
        image = transfer.copy_image(token, source, arguments.image, target, ctime=now(), progress=told)
    return _answer(output, image=image)


def _template(arguments: argparse.Namespace, output: Output) -> int:
    with (
        open_domain(arguments, arguments.domain) as domain,
        take_token(arguments) as token,
        output.progress(arguments.progress) as told,
    ):
        image, made = transfer.make_template(
            token, domain, arguments.image, domain, ctime=now(), description=arguments.description, progress=told
        )
    return _answer(output, image=image, volume=made)


def _templates(arguments: argparse.Namespace, output: Output) -> int:
    with open_domain(arguments, arguments.domain) as domain:
        entries = domain.entries()
        rows = [
            {
                "image": record.image,
                "volume": name,
                "capacity": record.capacity,
                "disks": len(entries[name].images) - 1,
                "description": record.description,
            }
            for name, record in sorted(volume.records_of(domain).items(), key=lambda item: item[1].image)
            if record.voltype == SHARED
        ]
    if output.as_json:
        output.document(rows)
    else:
        columns = ("image", "volume", "capacity", "disks", "description")
        output.table([key.upper() for key in columns], [[row[key] for key in columns] for row in rows])
    return 0


def _thin(arguments: argparse.Namespace, output: Output) -> int:
    with open_domain(arguments, arguments.domain) as domain, take_token(arguments) as token:
        parent = image_group.ImageGroup.load(domain, arguments.image).leaf()
        capacity = domain.record(parent).capacity
        spec = volume.VolumeSpec(make_id(), make_id(), capacity, parent=parent, description=arguments.description)
        volume.create_volume(token, domain, spec, now())
    return _answer(output, image=spec.image, volume=spec.volume, capacity=capacity)


def _clone(arguments: argparse.Namespace, output: Output) -> int:
    with (
        open_domain(arguments, arguments.domain) as domain,
        take_token(arguments) as token,
        output.progress(arguments.progress) as told,
    ):
        image, made = transfer.collapse(
            token, domain, arguments.image, domain, ctime=now(), description=arguments.description, progress=told
        )
    return _answer(output, image=image, volume=made)


def _snapshot(arguments: argparse.Namespace, output: Output) -> int:
    with open_domain(arguments, arguments.domain) as domain, take_token(arguments) as token:
        before = image_group.ImageGroup.load(domain, arguments.image).leaf()
        made = snapshot.create_snapshot(token, domain, arguments.image, ctime=now())
    return _answer(output, snapshot=before, leaf=made)


def _preview(arguments: argparse.Namespace, output: Output) -> int:
    with open_domain(arguments, arguments.domain) as domain, take_token(arguments) as token:
        made = snapshot.preview(token, domain, arguments.image, arguments.volume, ctime=now())
    return _answer(output, preview=made)


def _undo(arguments: argparse.Namespace, output: Output) -> int:
    with open_domain(arguments, arguments.domain) as domain, take_token(arguments) as token:
        snapshot.undo_preview(token, domain, arguments.image, arguments.volume)
    return 0


def _commit(arguments: argparse.Namespace, output: Output) -> int:
    with open_domain(arguments, arguments.domain) as domain, take_token(arguments) as token:
        dropped = snapshot.commit_preview(token, domain, arguments.image, arguments.volume)
    return _answer(output, dropped=dropped)


def _delete(arguments: argparse.Namespace, output: Output) -> int:
    with open_domain(arguments, arguments.domain) as domain, take_token(arguments) as token:
        if arguments.by_renames:
            made = merge_swap.merge_by_swap(token, domain, arguments.image, arguments.volume)
        else:
            made = merge.merge(token, domain, arguments.image, arguments.volume)
    return _answer(output, merged_into=made)
