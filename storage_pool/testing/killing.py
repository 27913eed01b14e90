# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Users of a domain that die at the n-th change: by an exception, or the process by SIGKILL.

:class:`KillingDomain` counts the changes of a domain.  :func:`killed_child`
runs a call in a child process and kills it before its n-th step, where a step
is any system call that changes names or makes data durable, any write to a
storage, and any program that is started.  :func:`die_at_record` does the same
to the process that calls it, where a step is a change of a domain.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from qcowlib.storage.file import FileStorage
from storage_pool.block_domain import BlockDomain
from storage_pool.domain import Domain
from storage_pool.file_domain import FileDomain

__all__ = ["Killed", "KillingDomain", "die_at_record", "killed_child"]

_PROGRAM = "subprocess.Popen"
#: Events of Python's audit that change something outside the process.
_STEPS = frozenset(
    {
        "os.chmod",
        "os.chown",
        "os.link",
        "os.mkdir",
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.truncate",
        _PROGRAM,
    }
)
_WRITES = ("write", "zero", "discard", "resize", "flush")
_FAILED = 99

_CHANGES = frozenset(
    {
        "abandon",
        "allocate",
        "change",
        "extend",
        "mark_removed",
        "publish",
        "purge",
        "reduce",
        "set_note",
        "set_notes",
        "set_parent_hint",
        "set_writable",
        "share",
        "sweep",
        "write_record",
    }
)
#: Changes of upgrades, which go past the protocol of domains.
_UPGRADES = frozenset({"make_lease", "make_lock", "make_xleases", "retag", "write_slot"})


class Killed(BaseException):
    """The process is gone; nothing more of it reaches the domain."""


class KillingDomain:
    """Passes everything to *inner* until change number *at* (from 0), which is not done, nor is any later.

    ``changes`` counts; bytes written through opened volumes before the death stay.
    """

    def __init__(self, inner: Domain, at: int | None = None) -> None:
        self._inner = inner
        self._at = at
        self.changes = 0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        return self._counted(value) if name in _CHANGES else self._opening(value) if name == "open_volume" else value

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def change(*arguments: Any, **options: Any) -> Any:
            number, self.changes = self.changes, self.changes + 1
            if self._at is not None and number >= self._at:
                raise Killed
            return call(*arguments, **options)

        return change

    def _opening(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def open_volume(volume: str, *, writable: bool = False) -> Any:
            # Opening for writing is a step too: what follows writes bytes.
            return self._counted(call)(volume, writable=True) if writable else call(volume)

        return open_volume


def killed_child(step: int | None, call: Callable[[], object], *, programs: bool = False) -> bool:
    """Run *call* in a child process that is killed (SIGKILL) before its step number *step*, from 0.

    Without a step only *call* itself ends it.  With *programs* only the start
    of a program that is no report, and zeroing, is a step.
    Returns whether it was killed; ``False`` when it ended before.

    Raises: AssertionError when *call* raised; its traceback is on standard error.
    """
    child = os.fork()
    if child == 0:
        status = _FAILED
        try:
            if step is not None:
                _die_at(step, programs)
            call()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    if status:
        raise AssertionError(f"the child ended with {status}")
    return False


def _die_at(step: int, programs: bool) -> None:
    """Let this process die before its step number *step*; there is no way back."""
    done = 0

    def count() -> None:
        nonlocal done
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if event in _STEPS and not (programs and (event != _PROGRAM or "fullreport" in str(arguments))):
            count()

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            count()
            return method(*arguments, **options)

        return call

    sys.addaudithook(audit)
    for name in ("zero",) if programs else _WRITES:
        setattr(FileStorage, name, counted(getattr(FileStorage, name)))
    if programs:
        return
    os.fsync = counted(os.fsync)


def die_at_record(step: int, counts: Callable[[], bool] = lambda: True) -> None:
    """Let this process die (SIGKILL) before change number *step* of a domain, from 0; there is no way back.

    A change is what the domain records: of a volume's record or note, of what
    is seen, kept or removed.  *counts* says whether one is counted.
    """
    done = 0

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            if counts():
                if done == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                done += 1
            return method(*arguments, **options)

        return call

    for kind in (FileDomain, BlockDomain):
        for name in _CHANGES | _UPGRADES:
            method = kind.__dict__.get(name)
            if method is not None:
                setattr(kind, name, counted(method))
