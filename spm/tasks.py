# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Operations that outlive the manager that began them.

A task is a directory ``<task>`` on the master domain with ``<task>.task``,
``<task>.job.N``, ``<task>.recover.N``; lines ``field = value`` with ``=`` in
values as ``_eq_``.  Each step records how it is undone *before* its first
change; whoever finds a task that did not end runs these, the last first.

Invariant: S5.  A save is whole or absent: the new directory is written under
another name, the old one put aside, the new one renamed, the old one removed,
each durable before the next; every undo may be run twice.  A task that cannot
be read or undone is reported and left, and never keeps a manager from
starting.

Source: tasks persisted by VDSM and its table of states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from qcowlib.errors import Error, StorageError
from storage_pool.errors import InvalidName, MetadataError, NotFound, printable
from storage_pool.ids import is_id, make_id

from .errors import NotSpm, TaskFailed

if TYPE_CHECKING:
    from storage_pool.rooted import Rooted
    from storage_pool.token import SpmToken

__all__ = ["DONE", "Job", "Recovery", "Task", "TaskManager", "TaskRecord", "TaskStore", "may_follow"]

#: State -> the states it may be entered from.
_ALLOWED: Final[dict[str, tuple[str, ...]]] = {
    "unknown": (),
    "init": (),
    "preparing": ("init", "blocked"),
    "blocked": ("preparing",),
    "acquiring": ("preparing", "acquiring"),
    "queued": ("acquiring", "running"),
    "running": ("queued",),
    "finished": ("running", "preparing"),
    "aborting": ("preparing", "blocked", "acquiring", "queued", "running"),
    "waitrecover": ("aborting",),
    "racquiring": ("aborting", "finished", "racquiring", "waitrecover"),
    "recovering": ("racquiring",),
    "raborting": ("racquiring", "recovering", "waitrecover"),
    "recovered": ("recovering",),
    "failed": ("recovering", "aborting", "raborting"),
}
#: States in which nothing is left to do.
DONE: Final = frozenset({"finished", "recovered", "failed"})
_TEMP: Final = ".temp"
_BACKUP: Final = ".backup"
_LIMIT: Final = 64 << 10
_COUNT_LIMIT: Final = 1000
_FIELDS: Final = ("id", "name", "tag", "store", "recoveryPolicy", "persistPolicy", "cleanPolicy", "priority", "state")


def may_follow(old: str, new: str) -> bool:
    """Whether a task may go from state *old* to *new*."""
    return old in _ALLOWED.get(new, ())


class Job(NamedTuple):
    """What a task does, in words."""

    name: str
    runcmd: str


class Recovery(NamedTuple):
    """How a step is undone: *function* of *object* in *module* with texts."""

    name: str
    module: str
    object: str
    function: str
    params: tuple[str, ...]


class TaskRecord(NamedTuple):
    """A task as stored; recoveries in the order of their steps."""

    id: str
    name: str
    state: str = "init"
    jobs: tuple[Job, ...] = ()
    recoveries: tuple[Recovery, ...] = ()
    tag: str = "spm"
    store: str = ""
    recovery_policy: str = "auto"
    persist_policy: str = "auto"
    clean_policy: str = "manual"
    priority: str = "low"

    def files(self) -> dict[str, bytes]:
        """Return the files of the task's directory by name.  Raises: InvalidName."""
        values = (self.id, self.name, self.tag, self.store, self.recovery_policy, self.persist_policy)
        head = dict(zip(_FIELDS, (*values, self.clean_policy, self.priority, self.state), strict=True))
        counts = {"njobs": len(self.jobs), "nrecoveries": len(self.recoveries), "metadataVersion": 1}
        files = {f"{self.id}.task": _lines({**head, **{key: str(count) for key, count in counts.items()}})}
        for number, job in enumerate(self.jobs):
            files[f"{self.id}.job.{number}"] = _lines({"name": job.name, "runcmd": job.runcmd})
        for number, undo in enumerate(self.recoveries):
            for param in undo.params:
                if "," in param:
                    raise InvalidName(f"a parameter of a recovery holds a comma: '{printable(param[:80])}'")
            texts = (undo.name, undo.module, undo.object, undo.function, ",".join(undo.params))
            names = ("name", "moduleName", "object", "function", "params")
            files[f"{self.id}.recover.{number}"] = _lines(dict(zip(names, texts, strict=True)))
        return files


def _lines(values: Mapping[str, str]) -> bytes:
    out = []
    for key, value in values.items():
        if "\n" in value or "\0" in value or not value.isprintable():
            raise InvalidName(f"the field {key} of a task is not one line: '{printable(value[:80])}'")
        out.append(f"{key} = {value.replace('=', '_eq_')}\n")
    return "".join(out).encode()


def _parse(data: bytes, path: str) -> dict[str, str]:
    values = {}
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise MetadataError("a task that is no text", path=path) from error
    for line in text.split("\n"):
        key, separator, value = line.partition("=")
        if separator:
            values[key.strip()] = value.strip().replace("_eq_", "=")
    return values


class TaskStore:
    """Tasks in a directory, ``master/tasks`` of the master domain."""

    def __init__(self, root: Rooted) -> None:
        self._root = root

    def names(self) -> list[str]:
        """Return the ids of all tasks, whole or cut."""
        bare = {name.removesuffix(_TEMP).removesuffix(_BACKUP) for name in self._root.names()}
        return sorted(name for name in bare if is_id(name))

    def save(self, token: SpmToken, record: TaskRecord) -> None:
        """Replace what is stored of a task."""
        files = record.files()
        temp, backup = record.id + _TEMP, record.id + _BACKUP
        token.check()
        with suppress(NotFound):
            self._remove(temp)
        self._root.make_directory(temp)
        for name, data in files.items():
            self._root.replace(f"{temp}/{name}", data)
        token.check()
        if self._root.exists(record.id):
            self._remove(backup)
            self._root.rename(record.id, backup)
        self._root.rename(temp, record.id)
        self._remove(backup)

    def load(self, name: str) -> TaskRecord:
        """Return a task: the newest whole version of what a cut may have left.  Raises: MetadataError."""
        error: Error = NotFound(f"there is no task {name}")
        for place in (name, name + _TEMP, name + _BACKUP):
            if not self._root.exists(place):
                continue
            try:
                return self._read(place, name)
            except (MetadataError, NotFound, StorageError) as failure:
                error = failure
        raise error if isinstance(error, MetadataError) else MetadataError(str(error), path=name)

    def _values(self, place: str, file: str) -> dict[str, str]:
        path = f"{place}/{file}"
        return _parse(self._root.read(path, _LIMIT), path)

    def _read(self, place: str, name: str) -> TaskRecord:
        head = self._values(place, f"{name}.task")
        missing = [field for field in (*_FIELDS, "njobs", "nrecoveries") if field not in head]
        if missing or head["id"] != name or head["state"] not in _ALLOWED:
            raise MetadataError(f"a task without {missing[0] if missing else 'its id or a known state'}", path=place)
        counts = []
        for field in ("njobs", "nrecoveries"):
            if not (head[field].isdecimal() and head[field].isascii()) or int(head[field]) > _COUNT_LIMIT:
                raise MetadataError(f"a task with {field} '{printable(head[field][:20])}'", path=place)
            counts.append(int(head[field]))
        jobs = []
        for number in range(counts[0]):
            values = self._values(place, f"{name}.job.{number}")
            jobs.append(Job(values.get("name", ""), values.get("runcmd", "")))
        recoveries = []
        for number in range(counts[1]):
            values = self._values(place, f"{name}.recover.{number}")
            params = values.get("params", "")
            recoveries.append(
                Recovery(
                    values.get("name", ""),
                    values.get("moduleName", ""),
                    values.get("object", ""),
                    values.get("function", ""),
                    tuple(params.split(",")) if params else (),
                )
            )
        return TaskRecord(
            name,
            head["name"],
            head["state"],
            tuple(jobs),
            tuple(recoveries),
            *(head[field] for field in _FIELDS[2:8]),
        )

    def is_unbegun(self, name: str) -> bool:
        """Whether the first save of a task was cut, so that it cannot have done anything."""
        return not self._root.exists(name) and not self._root.exists(name + _BACKUP)

    def remove(self, token: SpmToken, name: str) -> None:
        """Forget a task."""
        token.check()
        for place in (name + _BACKUP, name + _TEMP, name):
            self._remove(place)

    def _remove(self, place: str) -> None:
        if self._root.exists(place):
            self._root.remove_tree(place)


#: Undoes a step; called with the token and the recorded texts, maybe twice.
Undo = Callable[["SpmToken", tuple[str, ...]], None]


class Task:
    """A running task; see :meth:`TaskManager.task`."""

    def __init__(self, store: TaskStore, token: SpmToken, record: TaskRecord) -> None:
        self._store = store
        self._token = token
        self.record = record

    def _save(self, record: TaskRecord) -> None:
        self._store.save(self._token, record)
        self.record = record

    def move(self, *states: str) -> None:
        """Go through states, storing the last.  Raises: TaskFailed for a step that is not allowed."""
        state = self.record.state
        for new in states:
            if not may_follow(state, new):
                raise TaskFailed(f"a task does not go from {state} to {new}")
            state = new
        self._save(self.record._replace(state=state))

    def push(self, recovery: Recovery) -> None:
        """Record how the step that follows is undone."""
        self._save(self.record._replace(recoveries=(*self.record.recoveries, recovery)))

    def replace(self, recovery: Recovery) -> None:
        """Record one undo instead of all that were pushed."""
        self._save(self.record._replace(recoveries=(recovery,)))


class TaskManager:
    """Runs tasks and ends those of managers before.

    *undo* gives by ``function`` what a recorded recovery calls.
    """

    def __init__(self, store: TaskStore, undo: Mapping[str, Undo]) -> None:
        self._store = store
        self._undo = undo

    @contextmanager
    def task(self, token: SpmToken, name: str, runcmd: str = "") -> Iterator[Task]:
        """Run the body as a task: stored while it runs, undone when it raises.

        A lost lease undoes nothing: the next manager will.
        Raises: what the body raises; TaskFailed when that cannot be undone.
        """
        record = TaskRecord(make_id(), name, jobs=(Job(name, runcmd or name),))
        task = Task(self._store, token, record)
        task.move("preparing", "acquiring", "queued", "running")
        try:
            yield task
        except NotSpm:
            raise
        except Exception as error:
            self._roll_back(token, task, error)
            raise
        task.move("finished")
        self._store.remove(token, task.record.id)

    def _roll_back(self, token: SpmToken, task: Task, cause: Exception | None) -> None:
        """Undo all steps, the last first, and forget the task."""
        if may_follow(task.record.state, "aborting"):
            task.move("aborting")
        for recovery in reversed(task.record.recoveries):
            undo = self._undo.get(recovery.function)
            if undo is None:
                raise TaskFailed(f"no way to undo '{printable(recovery.function[:80])}' is known") from cause
            try:
                undo(token, recovery.params)
            except NotSpm:
                raise
            except (Error, OSError) as error:
                raise TaskFailed(
                    f"task {task.record.id}: '{printable(recovery.name[:80])}' could not be undone: {error}"
                ) from cause
        self._store.remove(token, task.record.id)

    def recover(self, token: SpmToken) -> dict[str, str]:
        """End all stored tasks; returns by id why a task is left.  Raises: NotSpm."""
        left = {}
        for name in self._store.names():
            try:
                record = self._store.load(name)
                if record.state in DONE:
                    self._store.remove(token, name)
                else:
                    self._roll_back(token, Task(self._store, token, record), None)
            except NotSpm:
                raise
            except MetadataError as error:
                if self._store.is_unbegun(name):
                    self._store.remove(token, name)
                else:
                    left[name] = str(error)
            except (Error, OSError) as error:
                left[name] = str(error)
        return left
