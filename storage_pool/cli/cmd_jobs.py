# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``qpool volume sparsify|reduce|amend|bitmaps|bitmap-add|bitmap-remove|bitmap-clear``: jobs on one volume."""

from __future__ import annotations

from collections.abc import Callable
from typing import Concatenate

from storage_pool import volume, volume_jobs
from storage_pool.cli.hosting import P, R, Session, Subject
from storage_pool.domain import Domain
from storage_pool.token import SpmToken

__all__ = ["add_job_verbs"]


def add_job_verbs(subject: Subject) -> None:
    """Add these verbs to the subject ``volume``."""
    add = subject.add
    example = "/mnt/data $VOLUME"
    sparsify = add("sparsify", _sparsify, "give back the space of zeros that a leaf stores", "volume", example=example)
    text = "reduce a volume on block storage to what it needs"
    reduce = add("reduce", _reduce, text, "volume", example="$DOMAIN $VOLUME")
    amend = add("amend", _amend, "bring a volume to a level of its format", "volume", example=f"{example} 1.1")
    amend.add_argument("level", choices=("0.10", "1.1"))
    add("bitmaps", _bitmaps, "list the dirty bitmaps of a volume", "volume", example=example)
    names = ("volume", "name")
    more = add("bitmap-add", _add_bitmap, "record changes in a new bitmap", *names, example=f"{example} backup")
    more.add_argument("--granularity", type=int, default=None, metavar="BYTES", help="of one bit")
    more.add_argument("--disabled", action="store_true", help="record nothing yet")
    less = add("bitmap-remove", _remove_bitmap, "delete a bitmap", *names, example=f"{example} backup")
    text = "forget what a bitmap has recorded"
    clear = add("bitmap-clear", _clear_bitmap, text, *names, example=f"{example} backup")
    for parser in (sparsify, reduce, amend, more, less, clear):
        text = "refuse another generation than this"
        parser.add_argument("--expect", type=int, default=None, metavar="N", help=text)


def _job(
    session: Session,
    work: Callable[Concatenate[SpmToken, Domain, str, P], R],
    *args: P.args,
    **kwargs: P.kwargs,
) -> R:
    """Do *work* to the volume of the command line."""
    return session.change(work, session.domain(), session.args.volume, *args, **kwargs)


def _done(session: Session, **more: object) -> int:
    name = session.args.volume
    return session.answer(volume=name, generation=session.domain().record(name).generation, **more)


def _sparsify(session: Session) -> int:
    return _done(session, zeros=_job(session, volume_jobs.sparsify, generation=session.args.expect))


def _reduce(session: Session) -> int:
    return _done(session, size=_job(session, volume_jobs.reduce_to_optimal, generation=session.args.expect))


def _amend(session: Session) -> int:
    _job(session, volume_jobs.amend, session.args.level, generation=session.args.expect)
    return _done(session)


def _add_bitmap(session: Session) -> int:
    arguments = session.args
    _job(
        session,
        volume_jobs.add_bitmap,
        arguments.name,
        granularity=arguments.granularity,
        enabled=not arguments.disabled,
        generation=arguments.expect,
    )
    return _done(session)


def _remove_bitmap(session: Session) -> int:
    _job(session, volume_jobs.remove_bitmap, session.args.name, generation=session.args.expect)
    return _done(session)


def _clear_bitmap(session: Session) -> int:
    _job(session, volume_jobs.clear_bitmap, session.args.name, generation=session.args.expect)
    return _done(session)


def _bitmaps(session: Session) -> int:
    with volume.open_image(session.domain(), session.args.volume, backing=False) as image:
        found = image.bitmaps()
    rows = [one._asdict() for one in found]
    titles = tuple(rows[0]) if rows else ("name",)
    return session.table(rows, titles, [list(row.values()) for row in rows])
