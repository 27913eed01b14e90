# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``qpool pool``: create, show, attach, detach, activate, deactivate, migrate, reconstruct, destroy.

A pool is named by its master domain, whose keys say which pool it is.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from storage_pool import metadata_domain as md
from storage_pool.cli.hosting import now, open_domain, take_token
from storage_pool.cli.output import Output
from storage_pool.errors import Illegal
from storage_pool.handles import AnyDomain
from storage_pool.ids import check_id, make_id
from storage_pool.pool import StoragePool
from storage_pool.upgrade import upgrade

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

__all__ = ["add_parsers"]

Run = Callable[[argparse.Namespace, Output], int]
_DOMAIN = "DIRECTORY|UUID"


def add_parsers(subjects: Subparsers, common: argparse.ArgumentParser) -> None:
    """Add the subcommands of this subject."""
    verbs = subjects.add_parser("pool", help="pools of domains").add_subparsers(
        dest="verb", required=True, metavar="VERB"
    )

    def add(verb: str, run: Run, text: str) -> argparse.ArgumentParser:
        parser = verbs.add_parser(verb, parents=[common], help=text, description=text)
        parser.set_defaults(run=run)
        return parser

    create = add("create", _create, "make a pool of unattached domains")
    create.add_argument("name", help="at most 50 characters")
    create.add_argument("master", metavar=f"MASTER-{_DOMAIN}")
    create.add_argument("others", nargs="*", metavar=_DOMAIN)
    create.add_argument("--uuid", default=None, help="a new one by default")
    for verb, run, text in (
        ("show", _show, "show a pool by its master"),
        ("destroy", _destroy, "end a pool whose only member is its master"),
    ):
        add(verb, run, text).add_argument("master", metavar=f"MASTER-{_DOMAIN}")
    for verb, run, text in (
        ("attach", _attach, "make a domain a member"),
        ("detach", _detach, "take a domain that is not active out"),
        ("activate", _activate, "let hosts use a member; an older domain is upgraded"),
        ("deactivate", _deactivate, "let no host use a member; a lost one is named by its UUID"),
        ("migrate", _migrate, "make another active data domain the master"),
    ):
        parser = add(verb, run, text)
        parser.add_argument("master", metavar=f"MASTER-{_DOMAIN}")
        parser.add_argument("domain", metavar=_DOMAIN)
    again = add("reconstruct", _reconstruct, "make a domain the master of a pool whose master is lost")
    again.add_argument("uuid", help="of the pool")
    again.add_argument("master", metavar=f"MASTER-{_DOMAIN}")
    again.add_argument("others", nargs="*", metavar=_DOMAIN, help="the other members that are left")
    again.add_argument("--name", default="", help="of the pool")
    again.add_argument("--master-version", type=int, required=True, metavar="N", help="above that of the lost master")


def _open_pool(master: AnyDomain) -> StoragePool:
    pools = master.metadata.pools
    if master.metadata.role != md.MASTER or len(pools) != 1:
        raise Illegal("the domain is the master of no pool", path=master.name)
    return StoragePool.open(pools[0], master)


def _open_all(arguments: argparse.Namespace, stack: ExitStack) -> list[AnyDomain]:
    """Open the master and the other domains of the command line."""
    found: list[AnyDomain] = []
    for name in (arguments.master, *arguments.others):
        found.append(open_domain(arguments, name))
        stack.callback(found[-1].close)
    return found


def _answer(pool: StoragePool, output: Output) -> int:
    info = pool.info()
    if output.as_json:
        output.document(info)
        return 0
    output.fields([(key, value) for key, value in info.items() if key != "domains"])
    output.table(("DOMAIN", "STATUS"), sorted(pool.members.items()))
    return 0


def _create(arguments: argparse.Namespace, output: Output) -> int:
    with ExitStack() as stack:
        master, *others = _open_all(arguments, stack)
        token = stack.enter_context(take_token(arguments))
        uuid = make_id() if arguments.uuid is None else check_id(arguments.uuid, "pool UUID")
        return _answer(StoragePool.create(token, uuid, arguments.name, master, others), output)


def _show(arguments: argparse.Namespace, output: Output) -> int:
    with open_domain(arguments, arguments.master) as master:
        return _answer(_open_pool(master), output)


def _destroy(arguments: argparse.Namespace, output: Output) -> int:
    with open_domain(arguments, arguments.master) as master, take_token(arguments) as token:
        _open_pool(master).destroy(token)
    return 0


def _attach(arguments: argparse.Namespace, output: Output) -> int:
    with (
        open_domain(arguments, arguments.master) as master,
        open_domain(arguments, arguments.domain) as domain,
        take_token(arguments) as token,
    ):
        pool = _open_pool(master)
        pool.attach(token, domain)
        return _answer(pool, output)


def _detach(arguments: argparse.Namespace, output: Output) -> int:
    with (
        open_domain(arguments, arguments.master) as master,
        open_domain(arguments, arguments.domain) as domain,
        take_token(arguments) as token,
    ):
        pool = _open_pool(master)
        pool.detach(token, domain)
        return _answer(pool, output)


def _activate(arguments: argparse.Namespace, output: Output) -> int:
    with (
        open_domain(arguments, arguments.master) as master,
        open_domain(arguments, arguments.domain) as domain,
        take_token(arguments) as token,
    ):
        pool = _open_pool(master)
        pool.activate(token, domain)
        version = master.metadata.version
        if domain.metadata.domain_class == md.DATA and domain.metadata.version < version:
            upgrade(token, domain, version, ctime=now())
        return _answer(pool, output)


def _deactivate(arguments: argparse.Namespace, output: Output) -> int:
    with open_domain(arguments, arguments.master) as master, take_token(arguments) as token:
        pool = _open_pool(master)
        uuid = arguments.domain
        if uuid not in pool.members:
            with open_domain(arguments, uuid) as domain:
                uuid = domain.uuid
        pool.deactivate(token, uuid)
        return _answer(pool, output)


def _migrate(arguments: argparse.Namespace, output: Output) -> int:
    with (
        open_domain(arguments, arguments.master) as master,
        open_domain(arguments, arguments.domain) as domain,
        take_token(arguments) as token,
    ):
        pool = _open_pool(master)
        pool.migrate_master(token, domain)
        return _answer(pool, output)


def _reconstruct(arguments: argparse.Namespace, output: Output) -> int:
    with ExitStack() as stack:
        master, *others = _open_all(arguments, stack)
        token = stack.enter_context(take_token(arguments))
        members = {domain.uuid: md.ACTIVE for domain in (master, *others)}
        pool = StoragePool.reconstruct(
            token, arguments.uuid, arguments.name, master, members, master_version=arguments.master_version
        )
        for domain in others:
            pool.repair_role(token, domain)
        return _answer(pool, output)
