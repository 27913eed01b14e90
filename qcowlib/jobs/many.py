# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""One operation over many images, several at a time.

Invariant: answers come in the order of the images, each as soon as those
before it are there; one that fails is an answer and does not end the others;
no more than a window of them is under way or waits, and no thread outlives
the iterator.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from typing import Final, Generic, NamedTuple, TypeVar, Unpack

from qcowlib.errors import Cancelled, Error, UsageError
from qcowlib.gate import References, qemu_like
from qcowlib.jobs.creation import NewOptions, create, file_options, open_backing
from qcowlib.jobs.pipeline import MAX_WORKERS
from qcowlib.ondisk.header import is_qcow2
from qcowlib.storage.file import FileStorage

__all__ = ["Outcome", "OverlaysPlan", "create_overlays", "images_in", "many", "plan_overlays"]

T = TypeVar("T")

#: Answers that wait for an earlier one, at most, for each worker.
_AHEAD: Final = 8
_MAGIC: Final = 512


class Outcome(NamedTuple, Generic[T]):
    """What became of the image at *path*: a *value*, or an *error*."""

    path: str
    value: T | None
    error: Error | None


def images_in(paths: Iterable[str | os.PathLike[str]], *, recursive: bool = False) -> Iterator[str]:
    """Yield *paths*, each folder replaced by the qcow2 images in it, in order of their names.

    With *recursive* folders in folders are looked into too; links to folders never.
    Raises: StorageError for a folder that cannot be read.
    """
    for path in [os.fspath(path) for path in paths]:
        if os.path.isdir(path):  # noqa: PTH112
            yield from _in_folder(path, recursive)
        else:
            yield path


def _in_folder(folder: str, recursive: bool) -> Iterator[str]:
    pending = [folder]
    while pending:
        here = pending.pop()
        with os.scandir(here) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        if recursive:
            pending += [entry.path for entry in reversed(found) if entry.is_dir(follow_symlinks=False)]
        for entry in found:
            if entry.is_file() and _is_image(entry.path):
                yield entry.name if here == "." else entry.path


def _is_image(path: str) -> bool:
    try:
        with closing(FileStorage.open(path)) as storage:
            head = bytearray(min(_MAGIC, storage.size))
            storage.read_into(0, [head])
            return is_qcow2(bytes(head))
    except Error:
        return False


def many(
    action: Callable[[str], T],
    paths: Iterable[str],
    *,
    workers: int | None = None,
    cancel: Callable[[], bool] | None = None,
) -> Iterator[Outcome[T]]:
    """Yield what *action* answers for each of *paths*, *workers* (1 to 16; as many as processors) at a time.

    Raises: UsageError; Cancelled when *cancel* says so; whatever *action*
    raises that is no error of ours.
    """
    count = min(os.cpu_count() or 1, MAX_WORKERS) if workers is None else workers
    if not 1 <= count <= MAX_WORKERS:
        raise UsageError(f"the number of workers must be between 1 and {MAX_WORKERS}")

    def attempt(path: str) -> Outcome[T]:
        if cancel is not None and cancel():
            raise Cancelled("the job was cancelled")
        try:
            return Outcome(path, action(path), None)
        except Error as error:
            return Outcome(path, None, error)

    with ThreadPoolExecutor(count) as pool:
        try:
            waiting: deque[Future[Outcome[T]]] = deque()
            futures = (pool.submit(attempt, path) for path in paths)
            for future in futures:
                waiting.append(future)
                if len(waiting) >= count * _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class OverlaysPlan(NamedTuple):
    """What :func:`create_overlays` makes: *paths*, each of *size* bytes over *backing*."""

    backing: str
    size: int
    paths: list[str]


def plan_overlays(
    backing: str | os.PathLike[str],
    names: Iterable[str | os.PathLike[str]],
    *,
    backing_format: str,
    size: int | None = None,
    references: References = qemu_like,
    **options: Unpack[NewOptions],
) -> OverlaysPlan:
    """Return what :func:`create_overlays` of the same arguments makes; nothing is made.

    Raises: UsageError for a name that exists or comes twice, or options that
    do not fit; any error of opening the backing file.
    """
    targets = [os.fspath(name) for name in names]
    base = os.fspath(backing)
    if len(set(targets)) < len(targets):
        raise UsageError("two overlays have the same name")
    for target in targets:
        if os.path.lexists(target):
            raise UsageError("the file exists already", path=target)
    found = open_backing(base, backing_format, targets[0], references) if targets else 0
    size = found if size is None else size
    file_options(options, size, backing=base, backing_format=backing_format)
    return OverlaysPlan(base, size, targets)


def create_overlays(
    backing: str | os.PathLike[str],
    names: Iterable[str | os.PathLike[str]],
    *,
    backing_format: str,
    size: int | None = None,
    references: References = qemu_like,
    workers: int | None = None,
    progress: Callable[[int, int], object] | None = None,
    cancel: Callable[[], bool] | None = None,
    **options: Unpack[NewOptions],
) -> list[str]:
    """Make an overlay over *backing* under each of *names*, all or none; returns the names.

    The name of the backing file is stored as given, so the overlays belong in
    one folder, or the name is absolute.  It is opened once, for the first of
    them.  *options* are :class:`~qcowlib.jobs.creation.NewOptions`; *progress* is
    called with how many are made and how many there will be.

    Raises: UsageError, before anything is made, for a name that exists or
    comes twice; any error of opening the backing file; Cancelled, StorageError,
    after what was made is removed.
    """
    plan = plan_overlays(backing, names, backing_format=backing_format, size=size, references=references, **options)
    made: list[str] = []

    def make(target: str) -> None:
        create(
            target,
            plan.size,
            backing=plan.backing,
            backing_format=backing_format,
            check_backing=False,
            **options,
        )
        made.append(target)

    try:
        for number, outcome in enumerate(many(make, plan.paths, workers=workers, cancel=cancel), 1):
            if outcome.error is not None:
                raise outcome.error
            if progress is not None:
                progress(number, len(plan.paths))
    except BaseException:
        for target in made:
            with suppress(OSError):
                os.unlink(target)  # noqa: PTH108
        raise
    return plan.paths
