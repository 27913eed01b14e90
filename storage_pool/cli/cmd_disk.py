# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``qpool volume``, ``image``, ``snapshot`` and ``template``: what is in a domain."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qcowlib.cli.values import parse_size
from qcowlib.units import human_size
from storage_pool import image_group, merge, merge_swap, snapshot, transfer, volume
from storage_pool.cli.cmd_exchange import add_image_verbs
from storage_pool.cli.cmd_jobs import add_job_verbs
from storage_pool.cli.hosting import DOMAIN, Session, Subject, add_progress, now
from storage_pool.errors import NotFound
from storage_pool.ids import BLANK, check_id, make_id
from storage_pool.metadata_volume import COW, ILLEGAL, LEGAL, PREALLOCATED, RAW, SHARED, SPARSE

if TYPE_CHECKING:
    from storage_pool.cli.hosting import Subparsers

__all__ = ["add_parsers"]


def _size(text: str) -> int:
    """Read a size as ``qcow`` does, with a suffix k to E."""
    size = parse_size(text)
    if size is None or size >= 1 << 63:
        raise argparse.ArgumentTypeError("not a size; such as 10G")
    return size


def add_parsers(subjects: Subparsers, common: argparse.ArgumentParser) -> None:
    """Add the subcommands of these subjects."""
    volumes = Subject(subjects, common, "volume", "volumes of disks")
    _add_volume_verbs(volumes)
    add_job_verbs(volumes)
    images = Subject(subjects, common, "image", "whole disks")
    _add_disk_verbs(images)
    add_image_verbs(images)
    _add_template_verbs(Subject(subjects, common, "template", "templates"))
    _add_snapshot_verbs(Subject(subjects, common, "snapshot", "snapshots of disks that nobody writes"))


def _add_zero(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--zero", action="store_true", help="overwrite data before they are removed")


def _add_wiping(parser: argparse.ArgumentParser) -> None:
    _add_zero(parser)
    parser.add_argument("--discard", action="store_true", help="give its blocks back to the storage below")


def _add_volume_verbs(subject: Subject) -> None:
    add = subject.add
    create = add("create", _create, "make a volume", example="/mnt/data 10G --description root")
    create.add_argument("size", type=_size, metavar="SIZE", help="such as 10G")
    create.add_argument("--image", help="the disk it belongs to; a new one by default")
    create.add_argument("--parent", default=BLANK, help="the template it stands on")
    create.add_argument("--format", choices=(RAW, COW), default=COW)
    create.add_argument("--preallocated", action="store_true")
    create.add_argument("--initial-size", type=_size, default=None, metavar="SIZE")
    create.add_argument("--disk-type", default="DATA")
    create.add_argument("--description", default="")
    add("list", _list, "list volumes", example="/mnt/data --output=json")
    extend = add("extend", _extend, "make a disk larger", "volume", example="/mnt/data $VOLUME 20G")
    extend.add_argument("size", type=_size, metavar="SIZE")
    text = "change what a volume's record says"
    update = add("update", _update, text, "volume", example="/mnt/data $VOLUME --description root")
    update.add_argument("--legality", choices=(LEGAL, ILLEGAL), default=None)
    update.add_argument("--description", default=None)
    update.add_argument("--generation", type=int, default=None, metavar="N", help="the next one by default")
    update.add_argument("--expect", type=int, default=None, metavar="N", help="refuse another generation than this")
    _add_wiping(add("remove", _remove, "remove a volume", "volume", example="/mnt/data $VOLUME --zero"))
    text = "show what is wrong with one volume"
    add("check", _check, text, "volume", example="/mnt/data $VOLUME")


def _add_disk_verbs(subject: Subject) -> None:
    add = subject.add
    text = "show the chain of a disk and what is wrong with it"
    add("show", _show, text, "image", example="/mnt/data $IMAGE --output=json")
    text = "let records follow a merge that a running guest made"
    sync = add("sync", _sync, text, "image", example="/mnt/data $IMAGE $LEAF $BASE")
    sync.add_argument("chain", nargs="+", metavar="VOLUME", help="what the guest has open, from its leaf down")
    text = "copy a disk, within the domain or to another"
    copy = add("copy", _copy, text, "image", example="/mnt/data $IMAGE --to /mnt/other -p")
    copy.add_argument("--to", metavar=DOMAIN, help="the domain to copy to")
    copy.add_argument("--collapse", action="store_true", help="make one volume of its chain")
    add_progress(copy)
    _add_wiping(add("remove", _remove_image, "remove a disk", "image", example="/mnt/data $IMAGE --discard"))


def _add_template_verbs(subject: Subject) -> None:
    add = subject.add
    add("list", _templates, "list templates", example="/mnt/data")
    thin = add("thin", _thin, "make a disk that stands on a template", "image", example="/mnt/data $TEMPLATE")
    text = "make a disk of one volume that reads as a template"
    clone = add("clone", _clone, text, "image", example="/mnt/data $TEMPLATE -p")
    text = "make a template of what a disk reads as"
    create = add("create", _template, text, "image", example="/mnt/data $IMAGE --description gold")
    for parser in (thin, clone, create):
        parser.add_argument("--description", default=None)
    add_progress(clone, create)


def _add_snapshot_verbs(subject: Subject) -> None:
    add = subject.add
    take = add("create", _snapshot, "take a snapshot", "image", example="/mnt/data $IMAGE")
    take.add_argument("--copy-bitmaps", action="store_true", help="dirty bitmaps go on in the new leaf")
    take.add_argument("--new-bitmap", default=None, metavar="NAME", help="begin one in the new leaf")
    for verb, run, text in (
        ("preview", _preview, "make a second leaf on a snapshot"),
        ("undo", _undo, "drop a preview"),
        ("commit", _commit, "make a preview the disk"),
        ("delete", _delete, "merge a volume into its parent"),
    ):
        parser = add(verb, run, text, "image", "volume", example="/mnt/data $IMAGE $VOLUME")
        if verb != "preview":
            _add_zero(parser)
        if verb == "delete":
            text = "merge it with its child instead, into a new volume that takes the child's name"
            parser.add_argument("--by-renames", action="store_true", help=text)


def _create(session: Session) -> int:
    arguments = session.args
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
    record = session.change(volume.create_volume, session.domain(), spec, now())
    return session.answer(image=spec.image, volume=spec.volume, capacity=record.capacity)


def _list(session: Session) -> int:
    domain = session.domain()
    rows = [
        {"volume": name, **record._asdict(), "size": domain.size_of(name)}
        for name, record in sorted(
            volume.records_of(domain).items(), key=lambda item: (item[1].image, item[1].ctime, item[0])
        )
    ]
    columns = ("volume", "image", "format", "type", "voltype", "legality")
    table = [
        [*(row[key] for key in columns), human_size(int(str(row["capacity"]))), human_size(int(str(row["size"])))]
        for row in rows
    ]
    return session.table(rows, (*columns, "capacity", "size"), table)


def _extend(session: Session) -> int:
    record = session.change(volume.extend_capacity, session.domain(), session.args.volume, session.args.size)
    return session.answer(volume=session.args.volume, capacity=record.capacity)


def _update(session: Session) -> int:
    arguments = session.args
    record = session.change(
        volume.update_volume,
        session.domain(),
        arguments.volume,
        legality=arguments.legality,
        description=arguments.description,
        generation=arguments.generation,
        expected_generation=arguments.expect,
    )
    return session.answer(volume=arguments.volume, legality=record.legality, generation=record.generation)


def _remove(session: Session) -> int:
    arguments, domain = session.args, session.locked()
    entry = domain.entries().get(check_id(arguments.volume, "volume UUID"))
    if entry is None or not entry.images:
        raise NotFound(f"there is no volume {arguments.volume}", path=domain.name)
    image, options = entry.images[0], {"zero": arguments.zero, "discard": arguments.discard}
    session.change(volume.remove_volumes, domain, image, [arguments.volume], **options)
    return 0


def _remove_image(session: Session) -> int:
    arguments, domain = session.args, session.locked()
    own = image_group.ImageGroup.load(domain, arguments.image).own()
    options = {"zero": arguments.zero, "discard": arguments.discard}
    session.change(volume.remove_volumes, domain, arguments.image, own, **options)
    return 0


def _tell(session: Session, found: list[image_group.Finding]) -> int:
    for finding in found:
        session.out.line(finding.line())
    return 3 if found else 0


def _check(session: Session) -> int:
    domain, name = session.domain(), check_id(session.args.volume, "volume UUID")
    entry = domain.entries().get(name)
    if entry is None or not entry.images:
        raise NotFound(f"there is no volume {name}", path=domain.name)
    group = image_group.ImageGroup.load(domain, entry.images[0])
    found = [finding for finding in image_group.findings(group) if finding.volume == name]
    if session.out.as_json:
        session.answer(volume=name, findings=[finding._asdict() for finding in found])
        return 3 if found else 0
    return _tell(session, found)


def _show(session: Session) -> int:
    group = image_group.ImageGroup.load(session.domain(), session.args.image)
    found = image_group.findings(group)
    if session.out.as_json:
        volumes = {name: record._asdict() for name, record in group.records.items()}
        told = [finding._asdict() for finding in found]
        session.answer(image=group.image, leaves=group.leaves(), volumes=volumes, findings=told)
        return 3 if found else 0
    for leaf in group.leaves():
        session.out.line(" <- ".join(reversed(group.chain(leaf))) if not found else leaf)
    for name, record in sorted(group.records.items()):
        what = "template" if record.voltype == SHARED else record.voltype.lower()
        session.out.line(f"{name}  {record.format}  {what}  {record.legality}")
    return _tell(session, found)


def _sync(session: Session) -> int:
    arguments = session.args
    return session.answer(changed=session.change(merge.sync_chain, session.domain(), arguments.image, arguments.chain))


def _copy(session: Session) -> int:
    image, source, time, told = session.args.image, session.domain(), now(), session.told
    target = session.domain(session.args.to or session.args.domain)
    if session.args.collapse:
        made, name = session.change(transfer.collapse, source, image, target, ctime=time, progress=told)
        return session.answer(image=made, volume=name)
    return session.answer(image=session.change(transfer.copy_image, source, image, target, ctime=time, progress=told))


def _template(session: Session) -> int:
    return _collapsed(session, role=SHARED)


def _clone(session: Session) -> int:
    return _collapsed(session, role=None)


def _collapsed(session: Session, *, role: str | None) -> int:
    arguments, domain = session.args, session.domain()
    image, made = session.change(
        transfer.collapse,
        domain,
        arguments.image,
        domain,
        ctime=now(),
        description=arguments.description,
        role=role,
        progress=session.told,
    )
    return session.answer(image=image, volume=made)


def _templates(session: Session) -> int:
    domain = session.domain()
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
    columns = ("image", "volume", "capacity", "disks", "description")
    return session.table(rows, columns, [[row[key] for key in columns] for row in rows])


def _thin(session: Session) -> int:
    arguments, domain = session.args, session.locked()
    parent = image_group.ImageGroup.load(domain, arguments.image).leaf()
    capacity = domain.record(parent).capacity
    spec = volume.VolumeSpec(make_id(), make_id(), capacity, parent=parent, description=arguments.description or "")
    session.change(volume.create_volume, domain, spec, now())
    return session.answer(image=spec.image, volume=spec.volume, capacity=capacity)


def _snapshot(session: Session) -> int:
    arguments, domain = session.args, session.locked()
    before = image_group.ImageGroup.load(domain, arguments.image).leaf()
    made = session.change(
        snapshot.create_snapshot,
        domain,
        arguments.image,
        ctime=now(),
        copy_bitmaps=arguments.copy_bitmaps,
        new_bitmap=arguments.new_bitmap,
    )
    return session.answer(snapshot=before, leaf=made)


def _preview(session: Session) -> int:
    arguments = session.args
    made = session.change(snapshot.preview, session.domain(), arguments.image, arguments.volume, ctime=now())
    return session.answer(preview=made)


def _undo(session: Session) -> int:
    arguments = session.args
    session.change(snapshot.undo_preview, session.domain(), arguments.image, arguments.volume, zero=arguments.zero)
    return 0


def _commit(session: Session) -> int:
    arguments = session.args
    dropped = session.change(
        snapshot.commit_preview, session.domain(), arguments.image, arguments.volume, zero=arguments.zero
    )
    return session.answer(dropped=dropped)


def _delete(session: Session) -> int:
    arguments = session.args
    work = merge_swap.merge_by_swap if arguments.by_renames else merge.merge
    made = session.change(work, session.domain(), arguments.image, arguments.volume, zero=arguments.zero)
    return session.answer(merged_into=made)
