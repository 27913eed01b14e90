# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What a command works with on this host: domains, LVM, the right to change, the clock, the answer.

Invariant: a :class:`Session` is of one command line.  Whatever it opened is
closed when the command ends, and the right to change is taken before anything
that a change is decided by is read, for what was read before is forgotten.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from storage_pool.block_domain import BlockDomain
from storage_pool.cli.output import Output
from storage_pool.embedded import FileToken
from storage_pool.errors import Illegal, NotFound, ProcessError, printable
from storage_pool.file_domain import FileDomain
from storage_pool.handles import AnyDomain
from storage_pool.ids import is_id
from storage_pool.lvm import Lvm, LvmHost, has_device_mapper
from storage_pool.process import SystemRunner
from storage_pool.token import SpmToken

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

__all__ = ["Run", "Session", "Subject", "add_progress", "now", "plain"]

P = ParamSpec("P")
R = TypeVar("R")
DOMAIN = "DIRECTORY|UUID"


class Session:
    """One command line at work; ``args`` are its arguments, ``out`` is where its answer goes."""

    def __init__(self, arguments: argparse.Namespace, output: Output) -> None:
        self.args = arguments
        self.out = output
        self._stack = ExitStack()
        self._lvm: Lvm | None = None
        self._token: SpmToken | None = None
        self._domains: dict[str, AnyDomain] = {}
        self._progress: Callable[[int, int], None] | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    @property
    def lvm(self) -> Lvm:
        """LVM of this host, limited to the devices of the command line."""
        if self._lvm is None:
            devices = self.args.device
            activation = not self.args.no_activation and has_device_mapper()
            host = LvmHost(
                None if devices is None else lambda: tuple(devices),
                activation=activation,
                system_dir=os.environ.get("LVM_SYSTEM_DIR"),
                locking_dir=os.environ.get("QPOOL_LVM_LOCKING_DIR"),
            )
            self._lvm = Lvm(self.args.runner or SystemRunner(), host)
        return self._lvm

    def domain(self, name: str | None = None) -> AnyDomain:
        """Return a domain, that of the command line by default: a directory, or the volume group of that name.

        Raises: NotFound, MetadataError.
        """
        name = self.args.domain if name is None else name
        if name not in self._domains:
            self._domains[name] = made = self.keep(self._open(name))
            # Two names of one domain are one object, or each would be out of date after the other's changes.
            self._domains[name] = next(one for one in self._domains.values() if one.uuid == made.uuid)
        return self._domains[name]

    def _open(self, name: str) -> AnyDomain:
        if is_id(name) and not Path(name).exists():
            return BlockDomain.open(self.lvm, name)
        if not Path(name).is_dir():
            raise NotFound("neither a directory nor the UUID of a volume group", path=name)
        return FileDomain.open(name)

    def keep(self, domain: AnyDomain) -> AnyDomain:
        """Close *domain* when the command ends."""
        self._stack.callback(domain.close)
        return domain

    def files(self) -> FileDomain:
        """Return the domain of the command line, which must be in a directory.  Raises: Illegal."""
        domain = self.domain()
        if not isinstance(domain, FileDomain):
            raise Illegal("a volume group holds no media", path=domain.name)
        return domain

    def group(self) -> BlockDomain:
        """Return the domain of the command line, which must be on a volume group.  Raises: Illegal."""
        domain = self.domain()
        if not isinstance(domain, BlockDomain):
            raise Illegal("a domain in a directory has no devices", path=domain.name)
        return domain

    def find(self, uuid: str) -> AnyDomain:
        """Return a domain by UUID: one of the command line, one beside its directory, or a volume group.

        Raises: NotFound.
        """
        if not is_id(uuid):
            raise NotFound(f"'{printable(uuid[:64])}' is no domain")
        for name in getattr(self.args, "other", ()):
            self.domain(name)
        for known in self._domains.values():
            if known.uuid == uuid:
                return known
        own = self.domain()
        if isinstance(own, FileDomain):
            for place in sorted(Path(own.name).parent.parent.glob(f"*/{uuid}")):
                if place.is_dir():
                    return self.domain(str(place))
        try:
            return self.domain(uuid)
        except ProcessError as error:
            raise NotFound(f"the domain {uuid} is not here, and LVM cannot be asked: {error}") from error

    @property
    def token(self) -> SpmToken:
        """The right to change pools on this host, taken at the first use unless it was given.  Raises: Busy."""
        if self._token is None:
            self._token = self.args.held or self._stack.enter_context(FileToken(self.args.lock))
            for domain in self._domains.values():
                domain.refresh()
        return self._token

    def locked(self) -> AnyDomain:
        """Return the domain of the command line as it is since nobody else may change it."""
        return self.change(lambda _: self.domain())

    def change(self, work: Callable[Concatenate[SpmToken, P], R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Do *work* with the right to change before its other arguments."""
        return work(self.token, *args, **kwargs)

    @property
    def told(self) -> Callable[[int, int], None]:
        """What a job tells its progress to, shown when the command line asks for it."""
        if self._progress is None:
            self._progress = self._stack.enter_context(self.out.progress(self.args.progress))
        return self._progress

    # Answers

    def answer(self, **values: object) -> int:
        """Print names and values; success."""
        if self.out.as_json:
            self.out.document(values)
        else:
            self.out.fields(list(values.items()))
        return 0

    def table(self, document: object, titles: Sequence[str], rows: Sequence[Sequence[object]]) -> int:
        """Print *document* as JSON, *rows* for people; success."""
        if self.out.as_json:
            self.out.document(document)
        else:
            self.out.table([title.upper() for title in titles], rows)
        return 0


Run = Callable[[Session], int]


def plain(work: Callable[[argparse.Namespace, Output], int]) -> Run:
    """Return *work*, which opens no domains, as what a session runs."""
    return lambda session: work(session.args, session.out)


class Subject:
    """The verbs of one subject of the command line."""

    def __init__(self, subjects: Subparsers, common: argparse.ArgumentParser, name: str, text: str) -> None:
        self._name = name
        self._common = common
        self._verbs = subjects.add_parser(name, help=text, description=text).add_subparsers(
            dest="verb", required=True, metavar="VERB"
        )

    def add(
        self, verb: str, run: Run, text: str, *operands: str, domain: str | None = DOMAIN, example: str = ""
    ) -> argparse.ArgumentParser:
        """Add a verb with the domain it works in (named *domain* in the help) and plain *operands*.

        *example* is what may follow the verb on a command line.
        """
        shown = f"example:\n  qpool {self._name} {verb} {example}" if example else None
        parser = self._verbs.add_parser(
            verb,
            parents=[self._common],
            help=text,
            description=text,
            epilog=shown,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.set_defaults(run=run)
        if domain is not None:
            parser.add_argument("domain", metavar=domain)
        for operand in operands:
            parser.add_argument(operand)
        return parser


def add_progress(*parsers: argparse.ArgumentParser) -> None:
    """Let commands tell their progress."""
    for parser in parsers:
        parser.add_argument("-p", "--progress", action="store_true", help="tell the progress on standard error")


def now() -> int:
    """Return the time in seconds since 1970."""
    return int(time.time())
