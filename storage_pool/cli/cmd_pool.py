# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``qpool pool``: create, show, attach, detach, activate, deactivate, migrate, reconstruct, destroy.

A pool is named by its master domain, whose keys say which pool it is.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from storage_pool import metadata_domain as md
from storage_pool.cli.hosting import DOMAIN, Session, Subject, now
from storage_pool.errors import Illegal
from storage_pool.handles import AnyDomain
from storage_pool.ids import check_id, make_id
from storage_pool.pool import StoragePool
from storage_pool.upgrade import upgrade

if TYPE_CHECKING:
    from storage_pool.cli.hosting import Subparsers

__all__ = ["add_parsers"]

_MASTER = f"MASTER-{DOMAIN}"


def add_parsers(subjects: Subparsers, common: argparse.ArgumentParser) -> None:
    """Add the subcommands of this subject."""
    add = Subject(subjects, common, "pool", "pools of domains").add
    create = add("create", _create, "make a pool of unattached domains", domain=None, example="Default /mnt/data")
    create.add_argument("name", help="at most 50 characters")
    create.add_argument("domain", metavar=_MASTER)
    create.add_argument("others", nargs="*", metavar=DOMAIN)
    create.add_argument("--uuid", default=None, help="a new one by default")
    add("show", _show, "show a pool by its master", domain=_MASTER, example="/mnt/data --output=json")
    add("destroy", _destroy, "end a pool whose only member is its master", domain=_MASTER, example="/mnt/data")
    for verb, run, text in (
        ("attach", _attach, "make a domain a member"),
        ("detach", _detach, "take a domain that is not active out"),
        ("activate", _activate, "let hosts use a member; an older domain is upgraded"),
        ("deactivate", _deactivate, "let no host use a member; a lost one is named by its UUID"),
        ("migrate", _migrate, "make another active data domain the master"),
    ):
        parser = add(verb, run, text, domain=_MASTER, example="/mnt/data /mnt/other")
        parser.add_argument("member", metavar=DOMAIN)
    text = "make a domain the master of a pool whose master is lost"
    again = add("reconstruct", _reconstruct, text, domain=None, example="$POOL_UUID /mnt/other --master-version 2")
    again.add_argument("uuid", help="of the pool")
    again.add_argument("domain", metavar=_MASTER)
    again.add_argument("others", nargs="*", metavar=DOMAIN, help="the other members that are left")
    again.add_argument("--name", default="", help="of the pool")
    again.add_argument("--master-version", type=int, required=True, metavar="N", help="above that of the lost master")


def _pool(session: Session) -> StoragePool:
    """Open the pool of the master on the command line."""
    master = session.domain()
    pools = master.metadata.pools
    if master.metadata.role != md.MASTER or len(pools) != 1:
        raise Illegal("the domain is the master of no pool", path=master.name)
    return StoragePool.open(pools[0], master)


def _member(session: Session) -> AnyDomain:
    return session.domain(session.args.member)


def _others(session: Session) -> list[AnyDomain]:
    return [session.domain(name) for name in session.args.others]


def _answer(session: Session, pool: StoragePool) -> int:
    info = pool.info()
    if session.out.as_json:
        return session.answer(**info)
    session.out.fields([(key, value) for key, value in info.items() if key != "domains"])
    session.out.table(("DOMAIN", "STATUS"), sorted(pool.members.items()))
    return 0


def _create(session: Session) -> int:
    uuid = make_id() if session.args.uuid is None else check_id(session.args.uuid, "pool UUID")
    return _answer(
        session,
        session.change(StoragePool.create, uuid, session.args.name, session.domain(), _others(session)),
    )


def _show(session: Session) -> int:
    return _answer(session, _pool(session))


def _destroy(session: Session) -> int:
    session.change(_pool(session).destroy)
    return 0


def _attach(session: Session) -> int:
    pool = _pool(session)
    session.change(pool.attach, _member(session))
    return _answer(session, pool)


def _detach(session: Session) -> int:
    pool = _pool(session)
    session.change(pool.detach, _member(session))
    return _answer(session, pool)


def _activate(session: Session) -> int:
    pool, domain = _pool(session), _member(session)
    session.change(pool.activate, domain)
    version = pool.master.metadata.version
    if domain.metadata.domain_class == md.DATA and domain.metadata.version < version:
        session.change(upgrade, domain, version, ctime=now())
    return _answer(session, pool)


def _deactivate(session: Session) -> int:
    pool = _pool(session)
    uuid = session.args.member
    if uuid not in pool.members:
        uuid = _member(session).uuid
    session.change(pool.deactivate, uuid)
    return _answer(session, pool)


def _migrate(session: Session) -> int:
    pool = _pool(session)
    session.change(pool.migrate_master, _member(session))
    return _answer(session, pool)


def _reconstruct(session: Session) -> int:
    master, others = session.domain(), _others(session)
    members = {domain.uuid: md.ACTIVE for domain in (master, *others)}
    arguments = session.args
    pool = session.change(
        StoragePool.reconstruct,
        arguments.uuid,
        arguments.name,
        master,
        members,
        master_version=arguments.master_version,
    )
    for domain in others:
        session.change(pool.repair_role, domain)
    return _answer(session, pool)
