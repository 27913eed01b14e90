# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Writing what an overlay holds into an image below it.

Order: the base grows if the overlay is larger, the data is copied, the base is
flushed, and only then the overlay is emptied, if it is to be.

Invariants: at every moment the overlay shows what it showed before, so that a
job that was cut is finished by calling it again (L6); what the layers above
the base do not hold is neither read nor written; a base that somebody uses is
not touched.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack

from qcowlib.errors import UsageError, printable
from qcowlib.gate import FileName, References, name_of, qemu_like
from qcowlib.image import Image
from qcowlib.image import open as open_image
from qcowlib.jobs.copy import Copier
from qcowlib.jobs.merge_plan import CopyPlan, is_file
from qcowlib.jobs.pipeline import DEFAULT_MEMORY, Control, run
from qcowlib.jobs.targets import ImageTarget, RawTarget
from qcowlib.opening import secrets_below
from qcowlib.raw import RawImage
from qcowlib.storage.file import FileStorage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    from qcowlib.gate import Kind
    from qcowlib.image import CacheMode
    from qcowlib.opening import Secrets
    from qcowlib.storage.base import Storage

__all__ = ["Below", "commit", "open_locked"]


def commit(
    path: str | bytes | os.PathLike[str],
    *,
    format: str | None = None,
    base: str | os.PathLike[str] | None = None,
    empty: bool | None = None,
    references: References = qemu_like,
    cache: CacheMode = "writeback",
    secret: Secrets | None = None,
    progress: Callable[[int, int], object] | None = None,
    cancel: Callable[[], bool] | None = None,
    rate: int | None = None,
    workers: int | None = None,
    memory: int = DEFAULT_MEMORY,
) -> None:
    """Write the overlay at *path* into its backing file, or into *base* further down.

    *empty* tells whether the overlay is emptied afterwards: by default, yes,
    unless *base* is given, for then the layers between would show other
    content through it.

    Raises: UsageError without a backing file, or when *base* is not in the
    chain; Busy when any of the images is in use; Cancelled; StorageError.
    """
    control = Control(progress=progress, cancel=cancel, rate=rate, workers=workers, memory=memory)
    wanted = None if base is None else os.fspath(base)
    empties = wanted is None if empty is None else empty
    policy = Below(references, wanted)
    with ExitStack() as stack:
        top = open_locked(path, format, policy, cache, secret, writable=True)
        stack.callback(top.close)
        if policy.found is None:
            if wanted is None:
                raise UsageError("Image does not have a backing file", path=top.path)
            raise UsageError(f"Did not find '{printable(wanted)}' in the backing chain of '{printable(top.path)}'")
        _commit(top, policy.found, references, cache, secrets_below(secret, policy.found), control)
        if empties:
            top.empty()
    control.end()


class Below:
    """A policy that locks each backing file it opens, except the base: that one is locked for writing."""

    def __init__(self, policy: References, base: str | None) -> None:
        self._policy = policy
        self._base = base
        self.opened = 0
        #: Number of the layer that is the base, counted from the top.
        self.found: int | None = None

    def parse_name(self, name: str, *, owner: str) -> FileName:
        """Return what *name* means to the policy below."""
        return name_of(self._policy, name, owner)

    def open(self, kind: Kind, name: str, owner: str, *, writable: bool, cache: str) -> Storage:
        from qcowlib.storage.imagelock import lock_image

        storage = self._policy.open(kind, name, owner, writable=writable, cache=cache)
        if kind != "backing":
            return storage
        self.opened += 1
        if self.found is None and (self._base is None or is_file(storage.name, self._base)):
            self.found = self.opened
            return storage
        if isinstance(storage, FileStorage):
            try:
                lock_image(storage.fileno(), storage.name, "read")
            except BaseException:
                storage.close()
                raise
        return storage


def open_locked(
    path: str | bytes | os.PathLike[str],
    format: str | None,
    policy: References,
    cache: CacheMode,
    secret: Secrets | None,
    *,
    writable: bool = False,
) -> Image:
    """Open the overlay: locked before anything is read, its backing files as *policy* does."""
    from qcowlib.storage.imagelock import lock_image

    storage = FileStorage.open(path, writable=writable, cache=cache)
    try:
        lock_image(storage.fileno(), storage.name, "write" if writable else "read")
        mode: Literal["r", "r+"] = "r+" if writable else "r"
        return open_image(storage, mode, format=format, references=policy, cache=cache, secret=secret, lock=False)
    except BaseException:
        storage.close()
        raise


def _commit(
    top: Image, depth: int, references: References, cache: CacheMode, secret: Secrets | None, control: Control
) -> None:
    layer = top.layers[depth]
    fmt = layer.format if not isinstance(layer, RawImage) or layer.plain else "luks"
    # What stands before a file stands before it here too.
    again = getattr(layer.storage, "reopen", None)
    source = layer.storage.name if again is None else again(cache)
    with open_image(source, "r+", format=fmt, references=references, cache=cache, secret=secret) as base:
        below = base.layers[0]
        if getattr(below.storage, "identity", None) != getattr(layer.storage, "identity", None):
            raise UsageError("the backing file was replaced meanwhile", path=layer.storage.name)
        old = base.size
        if old < top.size:
            base.resize(top.size)
        plan = CopyPlan(top, depth, old)
        raw = isinstance(below, RawImage) and below.plain
        target = RawTarget(below.data) if raw else ImageTarget(base)
        copier = Copier(target, unit=0, keep_zeros=True, offload=below.data if raw else None)
        control.begin(plan.amount() if control.wanted else plan.total)
        run(plan.units(), copier.work, control, buffer_size=plan.buffer, amount=control.total, ordered=target.ordered)
        target.finish()
