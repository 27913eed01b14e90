# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Backup and restore of several disks as one step.

A backup of a set, with what a cut leaves and what :func:`finish_set` makes of it:

===== ==================================================== ==========================================
step  done, each durable before the next                   after a cut here
===== ==================================================== ==========================================
1     all sources are locked; the journal says *copying*   taken back: nothing was begun
2     in each disk a second bitmap begins to record        taken back: the second bitmaps go
3     each overlay is written, as :func:`.backup` does     taken back: the overlays go too
4     the journal says *advancing*                         finished: from here on the backup counts
5     in each disk the second bitmap takes the first's     finished: a disk whose second bitmap is gone
      place and name, by one switch of its directory       is done, each other one is done now
6     the journal goes                                     nothing is left to do
===== ==================================================== ==========================================

Invariants: either the bitmaps of all disks advance, or none; whenever the cut
is finished or taken back, and whatever the guests wrote meanwhile, the bitmaps
hold all that no backup holds, since both record from step 2 to step 5.

A restore is a redo log: the journal names all pairs, each is restored, the
journal goes; to finish it is to do it again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, Unpack

from qcowlib.errors import FormatError, UsageError, printable
from qcowlib.gate import References, qemu_like
from qcowlib.image import Image
from qcowlib.image import open as open_image
from qcowlib.jobs.backup import backup, restore
from qcowlib.jobs.creation import NewOptions
from qcowlib.jobs.journal import read_journal, remove_journal, write_journal
from qcowlib.jobs.pipeline import DEFAULT_MEMORY
from qcowlib.storage.file import sync_directory

if TYPE_CHECKING:
    from qcowlib.image import CacheMode

__all__ = ["DiskBackup", "DiskRestore", "backup_set", "finish_set", "restore_set"]

_VERSION: Final = 1
_NEXT: Final = "~next"

Ending = Literal["nothing", "taken back", "finished"]


class DiskBackup(NamedTuple):
    """What :func:`.backup` does for one disk of a set: *bitmap* of *source* to a new overlay *target*.

    *backing* is stored as given, the other names as seen from the root.
    """

    source: str
    target: str
    bitmap: str
    backing: str
    backing_format: str
    source_format: str | None = None


class DiskRestore(NamedTuple):
    """What :func:`.restore` does for one disk of a set."""

    increment: str
    target: str
    format: str | None = None
    target_format: str | None = None


class _Journal:
    """The file that says how far a set is; replaced whole, durable before what follows from it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(path)  # noqa: PTH100

    def begin(self, kind: str, state: str, disks: Sequence[DiskBackup] | Sequence[DiskRestore]) -> None:
        """Make it.  Raises UsageError where there is one already."""
        if os.path.lexists(self.path):
            raise UsageError(
                "the journal of an unfinished set is there", path=self.path, hint="Finish it, or give another name."
            )
        self.write(kind, state, disks)

    def write(self, kind: str, state: str, disks: Sequence[DiskBackup] | Sequence[DiskRestore]) -> None:
        """Say that *state* is reached."""
        entries = [dict(zip(disk._fields, disk, strict=True)) for disk in disks]
        write_journal(self.path, {"journal": _VERSION, "kind": kind, "state": state, "disks": entries})

    def end(self) -> None:
        """Remove it."""
        remove_journal(self.path)

    def read(self) -> tuple[str, str, list[DiskBackup] | list[DiskRestore]] | None:
        """Return kind, state and disks; ``None`` where there is no journal.  Raises FormatError, StorageError."""
        content = read_journal(self.path, "a set")
        if content is None:
            return None
        try:
            if content["journal"] != _VERSION:
                raise ValueError("unknown version")
            kind, state, found = str(content["kind"]), str(content["state"]), content["disks"]
            if (kind, state) not in (("backup", "copying"), ("backup", "advancing"), ("restore", "restoring")):
                raise ValueError("unknown state")
            if not isinstance(found, list):
                raise ValueError("no list of disks")
            return kind, state, [_disk(kind, entry) for entry in found]  # type: ignore[return-value]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise FormatError(f"this is no journal of a set: {printable(str(error))[:200]}", path=self.path) from error


def _disk(kind: str, entry: object) -> DiskBackup | DiskRestore:
    if not isinstance(entry, dict) or not all(isinstance(value, str) or value is None for value in entry.values()):
        raise ValueError("a disk is not told in texts")
    return DiskBackup(**entry) if kind == "backup" else DiskRestore(**entry)


def backup_set(
    disks: Iterable[DiskBackup],
    journal: str | os.PathLike[str],
    *,
    compress: bool = False,
    references: References = qemu_like,
    source_cache: CacheMode = "writeback",
    cache: CacheMode = "writeback",
    progress: Callable[[int, int], object] | None = None,
    cancel: Callable[[], bool] | None = None,
    rate: int | None = None,
    workers: int | None = None,
    memory: int = DEFAULT_MEMORY,
    **options: Unpack[NewOptions],
) -> list[int]:
    """Back up what the bitmaps of all *disks* have recorded, and advance all of them, or none.

    The sources are locked for the whole time, so no guest uses them; returns
    how many guest bytes each overlay stores.  *journal* names a file that is
    there until all is done; after a cut :func:`finish_set` wants it.  *options*
    are :class:`~qcowlib.jobs.creation.NewOptions` of the overlays.

    Raises: UsageError, before anything is made; Busy; Cancelled, and any error
    of :func:`.backup`, after all is taken back; an error while the bitmaps
    advance leaves the journal, for :func:`finish_set`.
    """
    wanted = [_absolute(disk) for disk in disks]
    _check(wanted, cache)
    log = _Journal(journal)
    with ExitStack() as stack:
        images = _open_all(stack, wanted, references, source_cache)
        granularity = [_granularity(image, disk) for image, disk in zip(images, wanted, strict=True)]
        log.begin("backup", "copying", wanted)
        try:
            for image, disk, size in zip(images, wanted, granularity, strict=True):
                image.add_bitmap(disk.bitmap + _NEXT, size)
            total, before, stored = sum(image.size for image in images), 0, []
            for image, disk in zip(images, wanted, strict=True):
                stored.append(
                    backup(
                        image,
                        disk.target,
                        disk.bitmap,
                        backing=disk.backing,
                        backing_format=disk.backing_format,
                        compress=compress,
                        references=references,
                        cache=cache,
                        workers=workers,
                        memory=memory,
                        progress=_share(progress, before, image.size, total),
                        cancel=cancel,
                        rate=rate,
                        **options,
                    )
                )
                sync_directory(disk.target)
                before += image.size
            log.write("backup", "advancing", wanted)
        except BaseException:
            # The last word may have reached storage although it failed.
            log.write("backup", "copying", wanted)
            for image, disk in zip(images, wanted, strict=True):
                _take_back(image, disk)
            log.end()
            raise
        for image, disk in zip(images, wanted, strict=True):
            _advance(image, disk)
        log.end()
    return stored


def _open_all(
    stack: ExitStack, disks: Iterable[DiskBackup], references: References, cache: CacheMode = "writeback"
) -> list[Image]:
    return [
        stack.enter_context(
            open_image(disk.source, "r+", format=disk.source_format, references=references, cache=cache)
        )
        for disk in disks
    ]


def _absolute(disk: DiskBackup) -> DiskBackup:
    return disk._replace(
        source=os.path.abspath(disk.source),  # noqa: PTH100
        target=os.path.abspath(disk.target),  # noqa: PTH100
    )


def _check(disks: list[DiskBackup], cache: CacheMode) -> None:
    if not disks:
        raise UsageError("a set has at least one disk")
    if cache == "unsafe":
        raise UsageError("backups written with cache 'unsafe' are not durable: no bitmap is advanced")
    for names, what in (([d.source for d in disks], "source"), ([d.target for d in disks], "target")):
        if len({os.path.realpath(name) for name in names}) < len(names):
            raise UsageError(f"two disks of the set have the same {what}")
    for disk in disks:
        if os.path.lexists(disk.target):
            raise UsageError("the file exists already", path=disk.target)


def _granularity(image: Image, disk: DiskBackup) -> int:
    """Return that of the disk's bitmap.  Raises UsageError where it cannot be advanced."""
    found = {bitmap.name: bitmap for bitmap in image.bitmaps()}
    if disk.bitmap + _NEXT in found:
        raise UsageError(f"bitmap '{printable(disk.bitmap + _NEXT)}' is of an unfinished set", path=image.path)
    if disk.bitmap not in found:
        raise UsageError(f"there is no bitmap '{printable(disk.bitmap)}'", path=image.path)
    bitmap = found[disk.bitmap]
    if bitmap.inconsistent or not bitmap.enabled:
        state = "inconsistent" if bitmap.inconsistent else "disabled"
        raise UsageError(f"bitmap '{printable(disk.bitmap)}' is {state}: it does not hold all changes", path=image.path)
    return bitmap.granularity


def _share(
    progress: Callable[[int, int], object] | None, before: int, size: int, total: int
) -> Callable[[int, int], object] | None:
    """Return the progress of one disk as a part of that of all."""
    if progress is None:
        return None
    return lambda done, amount: progress(before + (size * done // amount if amount else size), total)


def _take_back(image: Image, disk: DiskBackup) -> None:
    """Undo steps 2 and 3 for one disk; does nothing where they were not done."""
    with suppress(FileNotFoundError):
        os.unlink(disk.target)  # noqa: PTH108
    if disk.bitmap + _NEXT in {bitmap.name for bitmap in image.bitmaps()}:
        image.remove_bitmap(disk.bitmap + _NEXT)


def _advance(image: Image, disk: DiskBackup) -> None:
    """Do step 5 for one disk; does nothing where it was done."""
    if disk.bitmap + _NEXT in {bitmap.name for bitmap in image.bitmaps()}:
        image.replace_bitmap(disk.bitmap, disk.bitmap + _NEXT)


def restore_set(
    disks: Iterable[DiskRestore],
    journal: str | os.PathLike[str],
    *,
    references: References = qemu_like,
    progress: Callable[[int, int], object] | None = None,
    cancel: Callable[[], bool] | None = None,
    rate: int | None = None,
    workers: int | None = None,
) -> None:
    """Apply one increment to each of several disks; after a cut, :func:`finish_set` does it again from the start.

    Raises: as :func:`.restore`; UsageError where *journal* exists.
    """
    wanted = [
        disk._replace(
            increment=os.path.abspath(disk.increment),  # noqa: PTH100
            target=os.path.abspath(disk.target),  # noqa: PTH100
        )
        for disk in disks
    ]
    if not wanted:
        raise UsageError("a set has at least one disk")
    log = _Journal(journal)
    log.begin("restore", "restoring", wanted)
    _restore_all(wanted, references, progress, cancel, rate, workers)
    log.end()


def _restore_all(
    disks: Sequence[DiskRestore],
    references: References,
    progress: Callable[[int, int], object] | None = None,
    cancel: Callable[[], bool] | None = None,
    rate: int | None = None,
    workers: int | None = None,
) -> None:
    for number, disk in enumerate(disks):
        restore(
            disk.increment,
            disk.target,
            format=disk.format,
            target_format=disk.target_format,
            references=references,
            progress=_share(progress, number << 20, 1 << 20, len(disks) << 20),
            cancel=cancel,
            rate=rate,
            workers=workers,
        )


def finish_set(journal: str | os.PathLike[str], *, references: References = qemu_like) -> Ending:
    """Bring a set that was cut off to its end, or take it back; says which, ``nothing`` without a journal.

    Raises: Busy while the set is still at work; FormatError for a file that is
    no journal; any error of opening a disk, which may be finished later.
    """
    log = _Journal(journal)
    found = log.read()
    if found is None:
        return "nothing"
    kind, state, disks = found
    if kind == "restore":
        _restore_all([disk for disk in disks if isinstance(disk, DiskRestore)], references)
        log.end()
        return "finished"
    step = _take_back if state == "copying" else _advance
    with ExitStack() as stack:
        backups = [disk for disk in disks if isinstance(disk, DiskBackup)]
        for image, disk in zip(_open_all(stack, backups, references), backups, strict=True):
            step(image, disk)
        log.end()
    return "taken back" if state == "copying" else "finished"
