# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The manager's duties on a real pool: recovery at the start, then the mailbox.

Each is a step of :class:`~spm.service.SpmService` with its undo.  What cannot
be recovered is told and left: a bad task or a foreign domain never keeps a
manager from starting.

Invariant: S3, S5.  What an older term left half done is finished or undone
before the first request is answered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing, suppress
from typing import TYPE_CHECKING

from qcowlib.errors import Error
from qcowlib.storage.file import FileStorage
from qcowlib.units import MiB
from storage_pool.block_domain import BlockDomain
from storage_pool.errors import Illegal, NotAuthorized
from storage_pool.lv_storage import open_logical_volume
from storage_pool.master_files import master_files

from .extend import ExtensionServer
from .host import Duties
from .service import Step
from .tasks import TaskManager, TaskStore, Undo

if TYPE_CHECKING:
    from qcowlib.storage.base import Storage
    from storage_pool.engine import Engine
    from storage_pool.handles import AnyDomain

    from .lease_watch import LeaseToken
    from .mailbox import ExtendRequest

__all__ = ["PoolDuties", "open_mailbox"]

_TASKS = "tasks"


def _direct(path: str, *, writable: bool = False) -> Storage:
    """Open a file that other hosts write, around the page cache where its file system can."""
    for cache in ("none", "writeback"):
        with suppress(Error):
            return FileStorage.open(path, writable=writable, cache=cache)
    return FileStorage.open(path, writable=writable)


def open_mailbox(master: AnyDomain, *, serving: bool) -> tuple[Storage, Storage]:
    """Open inbox and outbox of *master*; the manager (*serving*) writes the outbox, every other host the inbox."""
    found: list[Storage] = []
    try:
        for name, writable in (("inbox", not serving), ("outbox", serving)):
            if isinstance(master, BlockDomain):
                found.append(open_logical_volume(master.lvm, master.state, name, writable=writable))
            else:
                found.append(_direct(f"{master.name}/dom_md/{name}", writable=writable))
    except BaseException:
        for storage in found:
            storage.close()
        raise
    return found[0], found[1]


class PoolDuties(Duties):
    """Duties of the manager of the pool whose master *open_master* opens.

    *connect* gives the engine of all domains with a token, *tell* hears what
    recovery left, by domain or task; *undo* are the steps that stored tasks name.
    """

    def __init__(
        self,
        open_master: Callable[[], AnyDomain],
        connect: Callable[[LeaseToken], Engine],
        tell: Callable[[str], None],
        *,
        undo: Mapping[str, Undo] | None = None,
        hosts: int = 250,
    ) -> None:
        self._open_master = open_master
        self._connect = connect
        self._tell = tell
        self._undo = dict(undo or {})
        self._hosts = hosts
        self._held = ExitStack()
        self._server: ExtensionServer | None = None
        self._token: LeaseToken | None = None

    def steps(self) -> tuple[Step, ...]:
        """Return what follows the epoch when the role is taken."""
        return (
            Step("tasks", self._recover_tasks, lambda: None),
            Step("recovery", self._recover_domains, lambda: None),
            Step("mailbox", self._open_mailbox, self._close_mailbox),
        )

    def step(self, now_s: float) -> None:
        """Answer requests.  Raises: NotSpm, StorageError."""
        if self._server is not None:
            self._server.step(now_s)

    # -- recovery ----------------------------------------------------------------

    def _recover_tasks(self, token: LeaseToken) -> None:
        left: dict[str, str] = {}
        with ExitStack() as stack:
            master = stack.enter_context(closing(self._open_master()))
            try:
                if isinstance(master, BlockDomain):
                    # Its programs must not outlive the right to change.
                    master = stack.enter_context(self._connect(token)).domain(master.uuid).domain
                root = stack.enter_context(master_files(token, master, _TASKS))
                if root is not None:
                    left = TaskManager(TaskStore(root), self._undo).recover(token)
            except NotAuthorized:
                raise
            except (Error, OSError) as error:
                self._tell(f"no stored task was looked at: {error}")
        for task, why in sorted(left.items()):
            self._tell(f"task {task} is left: {why}")

    def _recover_domains(self, token: LeaseToken) -> None:
        # A host may see volume groups and directories of other pools, which have managers of their own.
        with closing(self._open_master()) as master:
            members = {master.uuid, *master.metadata.pool_domains}
        with self._connect(token) as engine:
            reports = engine.recover(members)
        for uuid, report in sorted(reports.items()):
            if report.error:
                self._tell(f"nothing is recovered in {uuid}: {report.error}")
            elif not report.clean:
                self._tell(f"domain {uuid} needs a look: qpool domain check")

    # -- mailbox -------------------------------------------------------------------

    def _open_mailbox(self, token: LeaseToken) -> None:
        master = self._open_master()
        self._held.callback(master.close)
        inbox, outbox = open_mailbox(master, serving=True)
        self._held.callback(inbox.close)
        self._held.callback(outbox.close)
        self._token = token
        self._server = ExtensionServer(inbox, outbox, self._extend, hosts=self._hosts)
        self._server.start()

    def _close_mailbox(self) -> None:
        self._server = self._token = None
        self._held.close()
        self._held = ExitStack()

    def _extend(self, request: ExtendRequest) -> None:
        token = self._token
        if token is None:
            raise Illegal("this host is not the manager")
        with self._connect(token) as engine:
            domain = engine.domain(request.domain).domain
            if isinstance(domain, BlockDomain):
                domain.extend(token, request.volume, request.size_mib * MiB)
            else:
                # A file grows by itself; the volume must be there.
                domain.record(request.volume)
