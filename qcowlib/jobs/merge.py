# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Merging consecutive layers of a chain, in one pass, into the lowest of them or into a new image.

===== ======================================================= =====================================
step  done, each durable before the next                      after a cut here, calling it again
===== ======================================================= =====================================
1     the journal says *copying* and how far                  goes on from the last durable piece
2     data goes into the result, piece by piece               the same
3     the journal says *linking*                              goes on with step 4
4     the image above is told to stand on the result          the same, which changes nothing then
5     with *delete*, the merged files go, the lower first     the rest goes
6     the journal goes                                        nothing is left to do
===== ======================================================= =====================================

Invariants: at every moment every image from the upper merged layer upwards
shows what it showed before (L6); no file is deleted before nothing stands on it
any more, and only the one that was merged, whatever has its name by then.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple, Unpack

from qcowlib.errors import FormatError, StorageError, UnsupportedFeature, UsageError
from qcowlib.gate import References, parse_name, qemu_like
from qcowlib.image import Image
from qcowlib.image import open as open_image
from qcowlib.jobs.commit import Below, open_locked
from qcowlib.jobs.creation import NewOptions, create
from qcowlib.jobs.journal import read_journal, remove_journal, write_journal
from qcowlib.jobs.merge_copy import Measured, copy_layers, measure_merge
from qcowlib.jobs.merge_plan import CopyPlan, MergePlan, MergeSource, Place, find_part, is_file, layers_of, sources_of
from qcowlib.jobs.pipeline import DEFAULT_MEMORY, Control
from qcowlib.jobs.rebase import check_backing_fits, rebase
from qcowlib.qcow2.image import Qcow2Image
from qcowlib.raw import RawImage
from qcowlib.storage.file import FileStorage
from qcowlib.storage.shadow import ShadowStorage

if TYPE_CHECKING:
    from qcowlib.image import CacheMode
    from qcowlib.jobs.creation import Format
    from qcowlib.opening import Secrets
    from qcowlib.storage.base import Storage

__all__ = ["MergePlan", "MergeSource", "merge", "plan_merge"]

_VERSION = 1
_WHAT = "a merge"


def merge(
    path: str | os.PathLike[str],
    *,
    lowest: str | os.PathLike[str] | None = None,
    highest: str | os.PathLike[str] | None = None,
    target: str | os.PathLike[str] | None = None,
    target_format: Format = "qcow2",
    delete: bool = False,
    journal: str | os.PathLike[str] | None = None,
    format: str | None = None,
    references: References = qemu_like,
    cache: CacheMode = "writeback",
    secret: Secrets | None = None,
    progress: Callable[[int, int], object] | None = None,
    cancel: Callable[[], bool] | None = None,
    rate: int | None = None,
    workers: int | None = None,
    memory: int = DEFAULT_MEMORY,
    **options: Unpack[NewOptions],
) -> None:
    """Merge the layers from *highest* down to *lowest* of the chain of the image at *path*.

    By default these are the whole chain.  The result is the lowest one, or a
    new image *target* with creation *options*, over what the lowest stands on;
    the image above the part then stands on it.  It has the size and the
    content that the highest showed, and the valid enabled bitmaps of all layers.
    *delete* removes the files that were merged, at the end.

    Called again after a cut, it goes on: *journal* (by default the result's
    name and ``.merge``; none beside a device) tells how far it was.  Other
    images that stand on a merged layer lose what they stand on.

    Raises: UsageError, before anything is changed; Busy when an image is in
    use; Cancelled; any error of opening; StorageError.
    """
    control = Control(progress=progress, cancel=cancel, rate=rate, workers=workers, memory=memory)
    new = _new_target(target, target_format, options)
    part = _Part(os.fspath(path), format, lowest, highest, references, cache, secret)
    record = _Record.find(part, new, journal)
    if record.state != "linking":
        _copy(part, new, record, delete, control)
    _link(part, record)
    control.end()


def plan_merge(
    path: str | os.PathLike[str],
    *,
    lowest: str | os.PathLike[str] | None = None,
    highest: str | os.PathLike[str] | None = None,
    target: str | os.PathLike[str] | None = None,
    target_format: Format = "qcow2",
    format: str | None = None,
    references: References = qemu_like,
    secret: Secrets | None = None,
    **options: Unpack[NewOptions],
) -> MergePlan:
    """Tell what :func:`merge` with the same arguments would do, to the cluster; nothing is changed or locked.

    Raises: as :func:`merge`.
    """
    new = _new_target(target, target_format, options)
    part = _Part(os.fspath(path), format, lowest, highest, references, "writeback", secret)
    with ExitStack() as stack:
        source, above = part.open(stack, lock=False)
        depth = part.low + (new is not None)
        end, measured = _measure(part, new, source, stack)
        sources = sources_of(source, depth, end)
        place = part.layers[part.low] if new is None else new
        plan = CopyPlan(source, depth, end)
        return MergePlan(
            tuple(sources),
            place.path,
            place.format,
            new is not None,
            None if above is None else above.path,
            source.size,
            plan.amount(),
            sum(one.zeros for one in sources),
            measured.bitmaps,
            measured.lost_bitmaps,
            measured.file_size,
            measured.required,
            measured.peak,
            tuple(place.path for place in part.layers[:depth]),
        )


class _New(NamedTuple):
    """The new image."""

    path: str
    format: Format
    options: dict[str, object]


def _new_target(target: str | os.PathLike[str] | None, format: Format, options: Mapping[str, object]) -> _New | None:
    """Return the new image that is asked for.  Raises: UsageError."""
    if target is None:
        if options:
            raise UsageError("options of a new image need a target")
        return None
    if options.get("data_file") is not None:
        raise UsageError("the result of a merge is one file, without an external data file", path=os.fspath(target))
    return _New(os.fspath(target), format, dict(options))


class _Part:
    """The layers that are merged; :meth:`open` fills in :attr:`layers`, those from the highest down."""

    def __init__(
        self,
        path: str,
        format: str | None,
        lowest: str | os.PathLike[str] | None,
        highest: str | os.PathLike[str] | None,
        references: References,
        cache: CacheMode,
        secret: Secrets | None,
    ) -> None:
        self.path, self.format = path, format
        self.lowest = None if lowest is None else os.fspath(lowest)
        self.highest = None if highest is None else os.fspath(highest)
        self.references, self.cache, self.secret = references, cache, secret
        self.layers: list[Place] = []
        #: Number of the lowest merged layer, counted from the highest.
        self.low = 0

    def open(self, stack: ExitStack, *, lock: bool) -> tuple[Image, Place | None]:
        """Open the highest layer with what it stands on; returns the place of the image above it too."""
        with open_image(
            self.path, format=self.format, references=self.references, secret=self.secret, lock=False
        ) as whole:
            all_layers = layers_of(whole)
        if isinstance(self.secret, list | tuple):
            # Layers are opened by themselves, where their number in the chain says nothing.
            names = [place.path for place in all_layers]
            self.secret = {name: one for name, one in zip(names, self.secret, strict=False) if one is not None}
        high, low = find_part(all_layers, self.lowest, self.highest)
        self.layers, self.low = all_layers[high:], low - high
        above = all_layers[high - 1] if high else None
        policy = Below(self.references, all_layers[low].path) if lock else self.references
        if lock:
            top = open_locked(self.path, self.format, policy, self.cache, self.secret)
            stack.callback(top.close)
            if layers_of(top) != all_layers:
                raise UsageError("the chain was changed meanwhile", path=self.path)
            if high == 0:
                return top, None
        place = self.layers[0]
        source = open_image(place.path, format=place.format, references=self.references, secret=self.secret, lock=False)
        stack.callback(source.close)
        return source, above

    def owner(self, source: Image) -> Qcow2Image:
        """The layer that stands on the lowest one."""
        owner = source.layers[self.low - 1]
        if not isinstance(owner, Qcow2Image):
            raise UsageError("a raw image stands on nothing", path=owner.storage.name)
        return owner

    def open_lowest(self, source: Image) -> Storage:
        """Open the file of the lowest layer for writing, as the layer above it names it, locked."""
        from qcowlib.storage.imagelock import lock_image

        owner = self.owner(source)
        name = parse_name(os.fsdecode(owner.header.backing_file or b""), owner=owner.storage.name).path
        storage = self.references.open("backing", name, owner.storage.name, writable=True, cache=self.cache)
        try:
            if isinstance(storage, FileStorage):
                lock_image(storage.fileno(), storage.name, "write")
            old = source.layers[self.low].storage
            if getattr(storage, "identity", None) != getattr(old, "identity", None):
                raise UsageError("the backing file was replaced meanwhile", path=storage.name)
        except BaseException:
            storage.close()
            raise
        return storage

    def backing(self, target: str) -> tuple[str | None, str | None]:
        """What the new image *target* stands on: name to store, format."""
        if self.low + 1 >= len(self.layers):
            return None, None
        place = self.layers[self.low + 1]
        return _name_from(place.path, target), place.format


def _name_from(path: str, owner: str) -> str:
    """The name of *path* in the header of *owner*: plain in the same folder, else from the root."""
    full = os.path.abspath(path)  # noqa: PTH100
    if os.path.dirname(full) == os.path.dirname(os.path.abspath(owner)):  # noqa: PTH100
        return os.path.basename(full)
    return full


# -- the trial -------------------------------------------------------------------


def _measure(part: _Part, new: _New | None, source: Image, stack: ExitStack) -> tuple[int, Measured]:
    """Return the size of the target before, and what a trial says."""
    if new is None:
        layer, place = source.layers[part.low], part.layers[part.low]
        if isinstance(layer, RawImage):
            _check_raw(layer)
            is_block = bool(getattr(layer.storage, "is_block", False))
            lost = {name: None for one in sources_of(source, part.low, 0) for name in one.bitmaps}
            if is_block and layer.size < source.size:
                raise UsageError(f"the device is smaller than the {source.size} bytes it is to hold", path=place.path)
            length = layer.size if is_block else source.size
            return layer.size, Measured(length, source.size, max(layer.size, source.size), (), tuple(lost))
        owner = part.owner(source)
        name = parse_name(os.fsdecode(owner.header.backing_file or b""), owner=owner.storage.name).path
        below = part.references.open("backing", name, owner.storage.name, writable=False, cache=part.cache)
        shadow = ShadowStorage(below, name=place.path)
        stack.callback(below.close)
        # The guest's bytes of a base with an external data file are there: the trial must not reach them either.
        data = ShadowStorage(layer.data, name=layer.data.name) if layer.header.has_data_file else None
        target = open_image(
            shadow,
            "r+",
            format="qcow2",
            references=part.references,
            secret=part.secret,
            data_file=data,
            lock=False,
        )
        return target.size, measure_merge(source, part.low, target, shadow, part.secret)
    shadow = ShadowStorage(None, name=new.path)
    _create(part, new, shadow, source.size)
    target = open_image(shadow, "r+", format=new.format, references=part.references, secret=part.secret, lock=False)
    return source.size, measure_merge(source, part.low + 1, target, shadow, part.secret)


def _check_raw(layer: RawImage) -> None:
    if not layer.plain:
        raise UnsupportedFeature(
            "layers are not merged into a LUKS file; make a new image of them, or merge those above it",
            path=layer.storage.name,
        )


def _create(part: _Part, new: _New, where: str | Storage, size: int) -> None:
    backing, backing_format = part.backing(new.path)
    create(
        where,
        size,
        format=new.format,
        backing=backing,
        backing_format=backing_format,
        check_backing=False,
        references=part.references,
        cache=part.cache,
        **new.options,
    )


# -- the job ---------------------------------------------------------------------


class _Record:
    """How far a merge is, in its journal if it has one."""

    def __init__(self, path: str | None, name: dict[str, object]) -> None:
        self.path = path
        #: What tells this merge from another one.
        self.name = name
        self.state = "new"
        self.done = self.end = 0
        self.above: Place | None = None
        self.result: Place | None = None
        self.remove: list[tuple[str, int, int]] = []
        self.seen: list[list[int]] = []

    @classmethod
    def find(cls, part: _Part, new: _New | None, journal: str | os.PathLike[str] | None) -> _Record:
        """Read the journal that there may be."""
        where = None if journal is None else os.fspath(journal)
        if where is None:
            beside = new.path if new is not None else part.lowest
            if beside is None:
                with open_image(
                    part.path, format=part.format, references=part.references, secret=part.secret, lock=False
                ) as image:
                    beside = layers_of(image)[-1].path
            where = None if os.path.exists(beside) and not os.path.isfile(beside) else f"{beside}.merge"  # noqa: PTH110, PTH113
        name = [part.path, part.highest, part.lowest, None if new is None else new.path]
        record = cls(where, {"merge": [one if one is None else os.path.abspath(one) for one in name]})  # noqa: PTH100
        content = None if where is None else read_journal(where, _WHAT)
        if content is not None:
            record._load(content)
        return record

    def _load(self, content: dict[str, object]) -> None:
        try:
            if content["journal"] != _VERSION or content["state"] not in ("copying", "linking"):
                raise ValueError("unknown version or state")
            if content["merge"] != self.name["merge"]:
                raise UsageError("the journal of another unfinished merge is there", path=self.path)
            self.state, self.done, self.end = str(content["state"]), _number(content["done"]), _number(content["end"])
            self.above, self.result = _place(content["above"]), _place(content["result"])
            removed, seen = content["remove"], content["seen"]
            if not isinstance(removed, list) or not isinstance(seen, list):
                raise ValueError("no lists")
            self.remove = [(str(name), _number(device), _number(node)) for name, device, node in removed]
            self.seen = [[_number(value) for value in one] for one in seen]
        except (KeyError, ValueError, TypeError) as error:
            raise FormatError("this is no journal of a merge", path=self.path) from error

    def save(self, state: str) -> None:
        """Say that *state* is reached, durably."""
        self.state = state
        if self.path is not None:
            fields = ("state", "done", "end", "above", "result", "remove", "seen")
            write_journal(self.path, {"journal": _VERSION, **self.name, **{one: getattr(self, one) for one in fields}})

    def finish(self) -> None:
        """Nothing is left to do."""
        if self.path is not None:
            remove_journal(self.path)


def _number(value: object) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError("a number is none")
    return value


def _place(value: object) -> Place | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(one, str) for one in value):
        raise ValueError("a place is none")
    return Place(*value)


def _copy(part: _Part, new: _New | None, record: _Record, delete: bool, control: Control) -> None:
    with ExitStack() as stack:
        source, above = part.open(stack, lock=True)
        depth = part.low + (new is not None)
        seen = [_seen(place.path) for place in part.layers[:depth]]
        again = record.state == "copying" and record.seen == seen
        record.above = above
        record.result = part.layers[part.low] if new is None else Place(new.path, new.format)
        if above is not None:
            name = _name_from(record.result.path, above.path)
            with open_image(above.path, format=above.format, backing=False, secret=part.secret, lock=False) as image:
                engine = image.layers[0]
                if isinstance(engine, Qcow2Image):
                    check_backing_fits(engine, name, record.result.format)
        removable = part.layers[:depth] if delete else []
        record.remove = []
        for place in removable:
            device, node = _seen(place.path)[:2]
            record.remove.append((place.path, device, node))
        record.seen = seen
        target = _open_target(part, new, source, record, again)
        stack.callback(target.close)
        if not again:
            record.done, record.end = 0, min(target.size, source.size) if new is None else source.size
        record.save("copying")

        def done(offset: int) -> None:
            record.done = offset
            record.save("copying")

        plan = CopyPlan(source, depth, record.end, record.done)
        control.begin(plan.amount() if control.wanted else plan.total)
        copy_layers(source, depth, target, control, end=record.end, start=record.done, done=done)
    record.save("linking")


def _open_target(part: _Part, new: _New | None, source: Image, record: _Record, again: bool) -> Image:
    if new is None:
        layer = source.layers[part.low]
        if isinstance(layer, RawImage):
            _check_raw(layer)
        storage: Storage | str = part.open_lowest(source)
        format = layer.format
    else:
        if any(is_file(place.path, new.path) for place in part.layers):
            raise UsageError("the new image is one of the chain", path=new.path)
        if not again or not os.path.exists(new.path):  # noqa: PTH110
            record.done = 0
            _create(part, new, new.path, source.size)
        storage, format = new.path, new.format
    try:
        return open_image(
            storage,
            "r+",
            format=format,
            references=part.references,
            cache=part.cache,
            secret=part.secret,
            lock=new is not None,
        )
    except BaseException:
        if not isinstance(storage, str):
            storage.close()
        raise


def _seen(path: str) -> list[int]:
    """What tells whether a file is the one it was."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return [0, 0, 0, 0]
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns]


def _link(part: _Part, record: _Record) -> None:
    above, result = record.above, record.result
    if result is None:
        raise FormatError("this is no journal of a merge", path=record.path)
    if above is not None:
        name = _name_from(result.path, above.path)
        rebase(
            above.path,
            name,
            result.format,
            format=above.format,
            unsafe=True,
            references=part.references,
            cache=part.cache,
            secret=_one_secret(part.secret, above.path),
        )
    for name, device, node in reversed(record.remove):
        _remove(name, device, node)
    record.finish()


def _one_secret(secret: Secrets | None, path: str) -> str | bytes | None:
    if secret is None or isinstance(secret, str | bytes):
        return secret
    found = secret.get(path) if isinstance(secret, Mapping) else None
    return found if isinstance(found, str | bytes) else None


def _remove(path: str, device: int, node: int) -> None:
    """Remove a merged file, not what took its name meanwhile, and no device."""
    try:
        status = os.stat(path)  # noqa: PTH116
        if (status.st_dev, status.st_ino) == (device, node) and os.path.isfile(path):  # noqa: PTH113
            os.unlink(path)  # noqa: PTH108
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError.from_os(error, path=path, operation="remove") from error
