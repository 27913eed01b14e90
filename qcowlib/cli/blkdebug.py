# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``blkdebug``: errors where a test wants them, before the file of an image or before the image itself.

The rules and what they are called are those of qemu's driver.  Before a file
``none`` fires when it is opened, ``read_aio`` and ``write_aio`` before guest
data (compressed or not) is read from it and written to it.  A rule that fired
fails the requests that it fits, those for metadata too.  Rules for other
events are accepted and never fire.  Before an image, which can only be read
then, ``none`` alone fires; ``map`` looks past it, as in qemu-img.

Invariant: rules are understood in full before any request, or refused with one line.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from typing import NamedTuple

from qcowlib.cli.console import Failure
from qcowlib.cli.values import parse_bool, parse_size
from qcowlib.errors import StorageError
from qcowlib.image import Image
from qcowlib.storage.file import FileStorage
from qcowlib.storage.imagelock import lock_image
from qcowlib.storage.wrapper import StorageWrapper

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from _typeshed import ReadableBuffer, WriteableBuffer

    from qcowlib.cli.names import Tree
    from qcowlib.native import RunList
    from qcowlib.storage.base import Storage, StorageExtent

__all__ = ["DebuggedImage", "DebuggedStorage", "Rules", "rules_of", "shown_name"]

_MAX_CONFIG = 64 << 10
_MAX_RULES = 4096
_MAX_NUMBER = (1 << 31) - 1
_EVENT_NAMES = (
    "l1_update l1_grow_alloc_table l1_grow_write_table l1_grow_activate_table l2_load l2_update "
    "l2_update_compressed l2_alloc_cow_read l2_alloc_write read_aio read_backing_aio read_compressed write_aio "
    "write_compressed vmstate_load vmstate_save cow_read cow_write reftable_load reftable_grow reftable_update "
    "refblock_load refblock_update refblock_update_part refblock_alloc refblock_alloc_hookup refblock_alloc_write "
    "refblock_alloc_write_blocks refblock_alloc_write_table refblock_alloc_switch_table cluster_alloc "
    "cluster_alloc_bytes cluster_free flush_to_os flush_to_disk pwritev_rmw_head pwritev_rmw_after_head "
    "pwritev_rmw_tail pwritev_rmw_after_tail pwritev pwritev_zero pwritev_done empty_image_prepare "
    "l1_shrink_write_table l1_shrink_free_l2_clusters cor_write cluster_alloc_space none"
)
_EVENTS = frozenset(_EVENT_NAMES.split())
_IOTYPES = ("read", "write", "write-zeroes", "discard", "flush", "block-status")
_INJECT = "inject-error"
_SET = "set-state"
_KEYS = {
    _INJECT: frozenset(("event", "state", "iotype", "errno", "sector", "once", "immediately")),
    _SET: frozenset(("event", "state", "new_state")),
}
_LIMITS = (
    ("max-transfer", None),
    ("opt-write-zero", None),
    ("max-write-zero", "opt-write-zero"),
    ("opt-discard", None),
    ("max-discard", "opt-discard"),
)
_OTHER_NAMES = "driver image config align node-name read-only auto-read-only force-share detect-zeroes discard cache"
_OTHERS = frozenset(_OTHER_NAMES.split())


class _Rule(NamedTuple):
    """*state* 0 is any, *sector* -1 too; *new_state* None: an error is injected."""

    event: str
    state: int
    iotypes: tuple[str, ...] = ()
    errno: int = 0
    sector: int = -1
    once: bool = False
    new_state: int | None = None


class Rules:
    """The rules of one node and its state; any thread may ask."""

    def __init__(self, rules: Iterable[_Rule]) -> None:
        # Source: qemu looks at the last rule first.
        self._rules = list(rules)[::-1]
        self._active: list[_Rule] = []
        self._state = 1
        self._lock = threading.Lock()
        self.fire("none")

    def fire(self, event: str) -> None:
        """*event* happens: its rules of the present state take the place of those that fired before."""
        with self._lock:
            found = [rule for rule in self._rules if rule.event == event and rule.state in (0, self._state)]
            injected = [rule for rule in found if rule.new_state is None]
            if injected:
                self._active = injected[::-1]
            for rule in found:
                if rule.new_state is not None:
                    self._state = rule.new_state

    def check(self, iotype: str, offset: int, length: int, path: str, *, place: bool = True) -> None:
        """Raise the StorageError of the first active rule that fits a request, with its *place* in the file."""
        if not self._active:
            return
        with self._lock:
            for rule in self._active:
                if iotype in rule.iotypes and (rule.sector < 0 or offset <= rule.sector * 512 < offset + length):
                    break
            else:
                return
            if rule.errno and rule.once:
                self._active = [one for one in self._active if one is not rule]
                self._rules = [one for one in self._rules if one is not rule]
        if rule.errno:
            raise StorageError(rule.errno, path=path, operation=iotype, offset=offset if place else None)


class DebuggedStorage(StorageWrapper):
    """A file behind *rules*; *shown* is what ``map`` calls it, *guest* the side for guest data."""

    __slots__ = ("_node", "_rules", "_text", "guest", "shown")

    def __init__(self, storage: Storage, rules: Rules, node: Tree, text: str, *, side: bool = False) -> None:
        super().__init__(storage)
        self._rules = rules
        self._node = node
        self._text = text
        self.shown = shown_name(node, storage.name)
        if not side:
            self.guest = _GuestSide(storage, rules, node, text, side=True)

    @property
    def identity(self) -> tuple[int, int] | None:
        """Which file it is."""
        return getattr(self._storage, "identity", None)

    def reopen(self, cache: str) -> DebuggedStorage:
        """Open the same file for writing behind the same rules, in their first state, and lock it."""
        file = FileStorage.open(self.name, writable=True, cache=cache)
        try:
            lock_image(file.fileno(), file.name, "write")
            return DebuggedStorage(file, rules_of(self._node, self._text), self._node, self._text)
        except BaseException:
            file.close()
            raise

    def read_into(self, offset: int, buffers: Sequence[WriteableBuffer]) -> None:
        self._rules.check("read", offset, _total(buffers), self.name)
        super().read_into(offset, buffers)

    def write(self, offset: int, buffers: Sequence[ReadableBuffer]) -> None:
        self._rules.check("write", offset, _total(buffers), self.name)
        super().write(offset, buffers)

    def zero(self, offset: int, length: int, *, allocate: bool = False) -> None:
        self._rules.check("write-zeroes", offset, length, self.name)
        super().zero(offset, length, allocate=allocate)

    def discard(self, offset: int, length: int) -> None:
        self._rules.check("discard", offset, length, self.name)
        super().discard(offset, length)

    def flush(self) -> None:
        self._rules.check("flush", 0, 0, self.name)
        super().flush()

    def extents(self, offset: int, length: int) -> Iterator[StorageExtent]:
        self._rules.check("block-status", offset, length, self.name)
        return super().extents(offset, length)


class _GuestSide(DebuggedStorage):
    """The same file, as far as guest data is concerned."""

    __slots__ = ()

    @property
    def identity(self) -> None:
        """None: what another image has at the same place is read all the same."""
        return None

    def read_into(self, offset: int, buffers: Sequence[WriteableBuffer]) -> None:
        self._rules.fire("read_aio")
        super().read_into(offset, buffers)

    def write(self, offset: int, buffers: Sequence[ReadableBuffer]) -> None:
        self._rules.fire("write_aio")
        super().write(offset, buffers)


class DebuggedImage(Image):
    """An image, open for reading, behind *rules* about guest offsets; closing it closes *image*."""

    __slots__ = ("_rules",)

    def __init__(self, image: Image, rules: Rules) -> None:
        super().__init__(image._chain, image._runtime, image.mode)
        self._rules = rules

    def pread(self, length: int, offset: int) -> bytes:
        self._rules.check("read", offset, length, self.path, place=False)
        return super().pread(length, offset)

    def preadinto(self, buffer: WriteableBuffer, offset: int) -> int:
        self._rules.check("read", offset, memoryview(buffer).nbytes, self.path, place=False)
        return super().preadinto(buffer, offset)

    def preadinto_many(self, buffer: WriteableBuffer, offsets: Iterable[int], length: int) -> int:
        places = list(offsets)
        for offset in places:
            self._rules.check("read", offset, length, self.path, place=False)
        return super().preadinto_many(buffer, places, length)

    def map(self, offset: int, length: int, *, holes: bool = True) -> RunList:
        if holes:
            self._rules.check("block-status", offset, length, self.path)
        return super().map(offset, length, holes=holes)

    def read_runs(self, runs: RunList, buffer: WriteableBuffer, base: int) -> None:
        self._rules.check("read", base, memoryview(buffer).nbytes, self.path, place=False)
        super().read_runs(runs, buffer, base)


def _total(buffers: Sequence[ReadableBuffer]) -> int:
    return sum(memoryview(buffer).nbytes for buffer in buffers)


def shown_name(node: Tree, path: str) -> str:
    """Return the shortest name of *path* behind *node*."""
    if set(node) - {"driver", "image", "config"}:
        from qcowlib.cli.jsonout import compact

        return "json:" + compact({"driver": "blkdebug", "image": {"driver": "file", "filename": path}})
    return f"blkdebug:{node.get('config') or ''}:{path}"


def rules_of(node: Tree, text: str) -> Rules:
    """Return the rules that *node* of the image named *text* holds or names.  Raises :class:`Failure`."""
    for key in node:
        if key not in _OTHERS and key not in _KEYS and key not in dict(_LIMITS):
            raise _refused(text, f"Block protocol 'blkdebug' doesn't support the option '{key}'")
    found: list[tuple[str, dict[str, object]]] = []
    config = node.get("config")
    if config:
        found += _read_config(str(config), text)
    for group in (_INJECT, _SET):
        found += _listed(node, group, text)
    if len(found) > _MAX_RULES:
        raise _refused(text, f"more than {_MAX_RULES} rules")
    # Source: qemu takes all errors before all changes of state.
    rules = [_rule(group, given, text) for kind in (_INJECT, _SET) for group, given in found if group == kind]
    _check_limits(node, text)
    return Rules(rules)


def _refused(text: str, cause: str) -> Failure:
    return Failure(f"Could not open '{text}': {cause}")


def _listed(node: Tree, group: str, text: str) -> Iterator[tuple[str, dict[str, object]]]:
    given = node.get(group, {})
    if not isinstance(given, dict):
        raise _refused(text, f"Invalid parameter '{group}'")
    if given and not all(isinstance(item, dict) for item in given.values()):
        given = {"0": given}
    for index, item in enumerate(given.values()):
        one = given.get(str(index), item)
        if not isinstance(one, dict):
            raise _refused(text, f"Invalid parameter '{group}'")
        for key in one:
            if key not in _KEYS[group]:
                raise _refused(text, f"[{group}] section doesn't support the option '{key}'")
        yield group, dict(one)


def _read_config(path: str, text: str) -> list[tuple[str, dict[str, object]]]:
    """Read a file of sections: ``[group]``, then lines of ``key = "value"``."""
    import re

    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            data = file.read(_MAX_CONFIG + 1)
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else "Invalid argument"
        raise _refused(text, f"Could not read blkdebug config file: {cause}") from None
    if len(data) > _MAX_CONFIG:
        raise _refused(text, f"Could not read blkdebug config file: more than {_MAX_CONFIG} bytes")
    found: list[tuple[str, dict[str, object]]] = []
    for line in data.decode("utf-8", "replace").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        section = re.match(r"\[([^\]]{1,63})\]", line)
        if section is not None:
            if section[1] not in _KEYS:
                raise _refused(text, f"There is no option group '{section[1]}'")
            found.append((section[1], {}))
            continue
        if not found:
            raise _refused(text, "no group defined")
        # Source: a line without a value has an empty one.
        key, value = re.findall(r'^\s*(\S{1,63})(?:\s*=\s*"([^"]{1,1023})")?', line)[0]
        group, given = found[-1]
        if key not in _KEYS[group]:
            raise _refused(text, f"Invalid parameter '{key}'")
        given[key] = value
    return found


def _rule(group: str, given: dict[str, object], text: str) -> _Rule:
    event = given.get("event")
    if event is None:
        raise _refused(text, "Missing event name for rule")
    if event not in _EVENTS:
        raise _refused(text, f"invalid parameter value: {event}")
    state = _number(given, "state", 0, text)
    if group == _SET:
        return _Rule(str(event), state, new_state=_number(given, "new_state", 0, text))
    try:
        once, _ = (_flag(given, key) for key in ("once", "immediately"))
    except Failure as failure:
        raise _refused(text, failure.messages[0]) from None
    iotype = given.get("iotype")
    if iotype is not None and iotype not in _IOTYPES:
        raise _refused(text, f"invalid parameter value: {iotype}")
    # Source: without a type, all but the block status.
    iotypes = _IOTYPES[:-1] if iotype is None else (str(iotype),)
    code, sector = _number(given, "errno", errno.EIO, text), _number(given, "sector", -1, text)
    return _Rule(str(event), state, iotypes, code, sector, once)


def _flag(given: dict[str, object], key: str) -> bool:
    value = given.get(key, False)
    return value if isinstance(value, bool) else parse_bool(key, str(value))


def _number(given: dict[str, object], key: str, default: int, text: str) -> int:
    value = given.get(key, default)
    if isinstance(value, str):
        value = int(value) if value.isascii() and value.isdigit() and len(value) < 20 else None
    if value is None or isinstance(value, bool) or not isinstance(value, int) or not -1 <= value < 1 << 54:
        raise _refused(text, f"Parameter '{key}' expects a number")
    return value


def _check_limits(node: Tree, text: str) -> None:
    """Check how requests are to be limited; ours are not made larger or smaller by it."""
    sizes: dict[str, int] = {}
    for key in ("align", *dict(_LIMITS)):
        value = node.get(key, 0)
        number = parse_size(value) if isinstance(value, str) else value
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise _refused(text, f"Parameter '{key}' expects a non-negative number below 2^64")
        sizes[key] = number
    align = sizes["align"]
    if align and (align >= _MAX_NUMBER or align & (align - 1)):
        raise _refused(text, f"Cannot meet constraints with align {align}")
    for key, base in _LIMITS:
        least = max(1, align, sizes[base] if base is not None else 0)
        if sizes[key] and (sizes[key] >= _MAX_NUMBER or sizes[key] % least):
            raise _refused(text, f"Cannot meet constraints with {key} {sizes[key]}")
