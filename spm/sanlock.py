# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Leases of domains from version 3: the daemon sanlock.

Calls go through Debian's ``python3-sanlock`` where that module can be
imported, else through the same C library by ``cffi``; both block, so callers
run them where blocking is allowed (a join waits for seconds, an acquire for
the death of a host).  What a lease *is* gets read from storage here, with
direct I/O and without the daemon, which may be stopped.

Invariant: one registered connection holds all leases of one object (one pool).
Its end frees them, so helper programs inherit it (:meth:`SanlockLeases.fileno`):
a lease cannot be freed by the death of its holder while a helper may still
write.

Source: sanlock 3.8.5, behaviour measured with real daemons.
"""

from __future__ import annotations

import errno
import os
import re
import select
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from qcowlib.errors import printable
from storage_pool.lease_records import Leader, parse_leader, released
from storage_pool.leases import HostState, Lease, LeaseArea, LeaseOwner

from .errors import LeaseError, LeaseHeld, LeaseLost
from .host_records import Damaged, RecordMender, io_timeout_of, read_sector, refuse_older_form
from .proof import LeaseProof
from .timing import LeaseTiming

__all__ = ["LibraryClient", "ModuleClient", "SanlockClient", "SanlockLeases", "make_client"]

#: Errors of the daemon that mean "somebody else has it".
_HELD: Final = frozenset((-243, -244, -245, -262, -errno.EEXIST, -errno.EBUSY, -errno.EAGAIN))
#: And that a record is damaged.
_DAMAGED: Final = range(-229, -222)
_STATES: Final[dict[int, HostState]] = {1: "unknown", 2: "free", 3: "live", 4: "fail", 5: "dead"}
_STATE_MASK: Final = 0xF
_UNKNOWN: Final = 1
_FREE: Final = 2
#: Answers of the daemon about a host that it has not seen.
_NO_HOST: Final = {-errno.ENOENT: _FREE, -errno.EAGAIN: _UNKNOWN}
_SECTORS: Final = (512, 4096)
#: Host ids that a resource has blocks for at most.
_MAX_HOSTS: Final = 2000
RUN_DIR_VARIABLE: Final = "SANLOCK_RUN_DIR"

_DECLARATIONS: Final = """
struct sanlk_disk { char path[1024]; uint64_t offset; uint32_t pad1; uint32_t pad2; };
struct sanlk_lockspace { char name[48]; uint64_t host_id; uint32_t flags; struct sanlk_disk host_id_disk; };
struct sanlk_resource {
    char lockspace_name[48]; char name[48]; uint64_t lver; uint64_t data64; uint32_t data32; uint32_t unused;
    uint32_t flags; uint32_t num_disks; struct sanlk_disk disks[1]; };
struct sanlk_host { uint64_t host_id; uint64_t generation; uint64_t timestamp; uint32_t io_timeout; uint32_t flags; };
int sanlock_register(void);
int sanlock_acquire(int, int, uint32_t, int, struct sanlk_resource **, void *);
int sanlock_release(int, int, uint32_t, int, struct sanlk_resource **);
int sanlock_inquire(int, int, uint32_t, int *, char **);
int sanlock_set_lvb(uint32_t, struct sanlk_resource *, char *, int);
int sanlock_get_lvb(uint32_t, struct sanlk_resource *, char *, int);
int sanlock_killpath(int, uint32_t, const char *, char *);
int sanlock_add_lockspace_timeout(struct sanlk_lockspace *, uint32_t, uint32_t);
int sanlock_rem_lockspace(struct sanlk_lockspace *, uint32_t);
int sanlock_inq_lockspace(struct sanlk_lockspace *, uint32_t);
int sanlock_get_hosts(const char *, uint64_t, struct sanlk_host **, int *, uint32_t);
void free(void *);
"""
_RES_SHARED: Final = 0x4
_ACQUIRE_VALUE: Final = 0x1


class SanlockClient(Protocol):
    """The calls of the daemon that are needed; each raises LeaseError with the daemon's number."""

    def register(self) -> int:
        """Connect this process; returns the connection."""

    def add_lockspace(self, name: str, host_id: int, area: LeaseArea, io_timeout_s: int) -> None:
        """Join and wait until joined."""

    def rem_lockspace(self, name: str, host_id: int, area: LeaseArea) -> None:
        """Leave and wait until left."""

    def has_lockspace(self, name: str, host_id: int, area: LeaseArea) -> bool:
        """Whether the daemon holds the host id now."""

    def acquire(self, connection: int, lease: Lease, shared: bool, value: bool = False) -> None:
        """Acquire for this process, with the right to the lease's *value* too."""

    def inquire(self, connection: int) -> list[Lease]:
        """Return what this process holds, from the daemon's memory."""

    def set_value(self, lease: Lease, data: bytes) -> None:
        """Set the value of a lease that is held with it; it is stored at the release."""

    def get_value(self, lease: Lease, size: int) -> bytes:
        """Return the value as it was when the lease was acquired."""

    def release(self, connection: int, lease: Lease) -> None:
        """Release what this process holds."""

    def host_flags(self, name: str, host_id: int) -> int:
        """Return the state of a host as the daemon numbers it; unknown while it has not looked yet."""

    def all_flags(self, name: str) -> dict[int, int]:
        """Return the states of all hosts that the daemon has seen, by host id."""

    def killpath(self, connection: int, path: str, arguments: list[str]) -> None:
        """Have the daemon run a program instead of a signal when the lease is lost."""


class ModuleClient:
    """Through the module ``sanlock``."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def _call(self, name: str, *arguments: object, **options: object) -> Any:
        try:
            return getattr(self._module, name)(*arguments, **options)
        except self._module.SanlockException as error:
            code = error.args[0] if error.args and isinstance(error.args[0], int) else 0
            raise LeaseError(f"sanlock: {name} failed: {error.args[-1]}", code=-abs(code)) from error

    def register(self) -> int:
        """See :class:`SanlockClient`."""
        return int(self._call("register"))

    def add_lockspace(self, name: str, host_id: int, area: LeaseArea, io_timeout_s: int) -> None:
        """See :class:`SanlockClient`."""
        self._call("add_lockspace", name.encode(), host_id, area.path, offset=area.offset, iotimeout=io_timeout_s)

    def rem_lockspace(self, name: str, host_id: int, area: LeaseArea) -> None:
        """See :class:`SanlockClient`."""
        self._call("rem_lockspace", name.encode(), host_id, area.path, area.offset)

    def has_lockspace(self, name: str, host_id: int, area: LeaseArea) -> bool:
        """See :class:`SanlockClient`."""
        return self._call("inq_lockspace", name.encode(), host_id, area.path, area.offset) is True

    def acquire(self, connection: int, lease: Lease, shared: bool, value: bool = False) -> None:
        """See :class:`SanlockClient`."""
        names = lease.lockspace.encode(), lease.name.encode()
        self._call("acquire", *names, [tuple(lease.area)], slkfd=connection, shared=shared, lvb=value)

    def inquire(self, connection: int) -> list[Lease]:
        """See :class:`SanlockClient`."""
        held = self._call("inquire", slkfd=connection)
        return [Lease(one["lockspace"].decode(), one["resource"].decode(), LeaseArea(*one["disks"][0])) for one in held]

    def set_value(self, lease: Lease, data: bytes) -> None:
        """See :class:`SanlockClient`."""
        names = lease.lockspace.encode(), lease.name.encode()
        self._call("set_lvb", *names, [tuple(lease.area)], data)

    def get_value(self, lease: Lease, size: int) -> bytes:
        """See :class:`SanlockClient`."""
        names = lease.lockspace.encode(), lease.name.encode()
        return bytes(self._call("get_lvb", *names, [tuple(lease.area)], size))

    def release(self, connection: int, lease: Lease) -> None:
        """See :class:`SanlockClient`."""
        self._call("release", lease.lockspace.encode(), lease.name.encode(), [tuple(lease.area)], slkfd=connection)

    def host_flags(self, name: str, host_id: int) -> int:
        """See :class:`SanlockClient`."""
        try:
            hosts = self._call("get_hosts", name.encode(), host_id)
        except LeaseError as error:
            if error.code in _NO_HOST:
                return _NO_HOST[error.code]
            raise
        return int(hosts[0]["flags"]) if hosts else _FREE

    def all_flags(self, name: str) -> dict[int, int]:
        """See :class:`SanlockClient`."""
        try:
            hosts = self._call("get_hosts", name.encode())
        except LeaseError as error:
            if error.code in _NO_HOST:
                return {}
            raise
        return {int(host["host_id"]): int(host["flags"]) for host in hosts}

    def killpath(self, connection: int, path: str, arguments: list[str]) -> None:
        """See :class:`SanlockClient`."""
        self._call("killpath", path, arguments, slkfd=connection)


class LibraryClient:
    """Through ``libsanlock_client`` by cffi, without a compiler.  Raises: LeaseError when either is missing."""

    def __init__(self, name: str = "libsanlock_client.so.1") -> None:
        try:
            import cffi
        except ImportError as error:
            raise LeaseError("neither the module sanlock nor cffi is installed") from error
        self._ffi: Any = cffi.FFI()
        self._ffi.cdef(_DECLARATIONS)
        try:
            self._lib: Any = self._ffi.dlopen(name)
        except OSError as error:
            raise LeaseError(f"no client library of sanlock: {error}", hint="Install the package sanlock.") from error
        self._libc: Any = self._ffi.dlopen(None)

    def _checked(self, what: str, result: int) -> int:
        if result < 0:
            text = os.strerror(-result) if -result < 200 else "refused"
            raise LeaseError(f"sanlock: {what} failed: {text} ({result})", code=result)
        return result

    def _lockspace(self, name: str, host_id: int, area: LeaseArea) -> Any:
        space = self._ffi.new("struct sanlk_lockspace *")
        self._ffi.memmove(space.name, *_sized(name, 48))
        space.host_id = host_id
        self._ffi.memmove(space.host_id_disk.path, *_sized(area.path, 1023))
        space.host_id_disk.offset = area.offset
        return space

    def _resource(self, lease: Lease) -> tuple[Any, Any]:
        resource = self._ffi.new("struct sanlk_resource *")
        self._ffi.memmove(resource.lockspace_name, *_sized(lease.lockspace, 48))
        self._ffi.memmove(resource.name, *_sized(lease.name, 48))
        resource.num_disks = 1
        self._ffi.memmove(resource.disks[0].path, *_sized(lease.area.path, 1023))
        resource.disks[0].offset = lease.area.offset
        return resource, self._ffi.new("struct sanlk_resource *[1]", [resource])

    def register(self) -> int:
        """See :class:`SanlockClient`."""
        return self._checked("register", self._lib.sanlock_register())

    def add_lockspace(self, name: str, host_id: int, area: LeaseArea, io_timeout_s: int) -> None:
        """See :class:`SanlockClient`."""
        space = self._lockspace(name, host_id, area)
        self._checked("add_lockspace", self._lib.sanlock_add_lockspace_timeout(space, 0, io_timeout_s))

    def rem_lockspace(self, name: str, host_id: int, area: LeaseArea) -> None:
        """See :class:`SanlockClient`."""
        self._checked("rem_lockspace", self._lib.sanlock_rem_lockspace(self._lockspace(name, host_id, area), 0))

    def has_lockspace(self, name: str, host_id: int, area: LeaseArea) -> bool:
        """See :class:`SanlockClient`."""
        result = self._lib.sanlock_inq_lockspace(self._lockspace(name, host_id, area), 0)
        if result not in (0, -errno.ENOENT, -errno.EINPROGRESS):
            self._checked("inq_lockspace", result)
        return bool(result == 0)

    def acquire(self, connection: int, lease: Lease, shared: bool, value: bool = False) -> None:
        """See :class:`SanlockClient`."""
        resource, array = self._resource(lease)
        resource.flags = _RES_SHARED if shared else 0
        flags = _ACQUIRE_VALUE if value else 0
        self._checked("acquire", self._lib.sanlock_acquire(connection, -1, flags, 1, array, self._ffi.NULL))

    def inquire(self, connection: int) -> list[Lease]:
        """See :class:`SanlockClient`."""
        count = self._ffi.new("int *")
        state = self._ffi.new("char **")
        self._checked("inquire", self._lib.sanlock_inquire(connection, -1, 0, count, state))
        if state[0] == self._ffi.NULL:
            return []
        try:
            text = self._ffi.string(state[0]).decode()
        finally:
            self._libc.free(state[0])
        return [_parse_state(one) for one in text.split(" ") if one]

    def set_value(self, lease: Lease, data: bytes) -> None:
        """See :class:`SanlockClient`."""
        resource, _array = self._resource(lease)
        self._checked("set_lvb", self._lib.sanlock_set_lvb(0, resource, self._ffi.from_buffer(data), len(data)))

    def get_value(self, lease: Lease, size: int) -> bytes:
        """See :class:`SanlockClient`."""
        resource, _array = self._resource(lease)
        data = self._ffi.new("char[]", size)
        self._checked("get_lvb", self._lib.sanlock_get_lvb(0, resource, data, size))
        return bytes(self._ffi.buffer(data, size))

    def release(self, connection: int, lease: Lease) -> None:
        """See :class:`SanlockClient`."""
        _resource, array = self._resource(lease)
        self._checked("release", self._lib.sanlock_release(connection, -1, 0, 1, array))

    def host_flags(self, name: str, host_id: int) -> int:
        """See :class:`SanlockClient`."""
        hosts = self._ffi.new("struct sanlk_host **")
        count = self._ffi.new("int *")
        result = self._lib.sanlock_get_hosts(name.encode(), host_id, hosts, count, 0)
        if result in _NO_HOST:
            return _NO_HOST[result]
        self._checked("get_hosts", result)
        try:
            return int(hosts[0][0].flags) if count[0] else _FREE
        finally:
            self._libc.free(hosts[0])

    def all_flags(self, name: str) -> dict[int, int]:
        """See :class:`SanlockClient`."""
        hosts = self._ffi.new("struct sanlk_host **")
        count = self._ffi.new("int *")
        result = self._lib.sanlock_get_hosts(name.encode(), 0, hosts, count, 0)
        if result in _NO_HOST:
            return {}
        self._checked("get_hosts", result)
        try:
            return {int(hosts[0][n].host_id): int(hosts[0][n].flags) for n in range(count[0])}
        finally:
            self._libc.free(hosts[0])

    def killpath(self, connection: int, path: str, arguments: list[str]) -> None:
        """See :class:`SanlockClient`."""
        text = self._ffi.new("char[]", " ".join(arguments).encode())
        self._checked("killpath", self._lib.sanlock_killpath(connection, 0, path.encode(), text))


def _sized(text: str, limit: int) -> tuple[bytes, int]:
    data = text.encode()
    if len(data) > limit or b"\0" in data:
        raise LeaseError(f"a name of {len(data)} bytes is too long for sanlock")
    return data, len(data)


def _parse_state(text: str) -> Lease:
    """Read what the daemon says of a lease: lockspace, name, path, offset, flags and version; colons are escaped."""
    parts = re.split(r"(?<!\\):", text)
    if len(parts) < 4 or not parts[3].isdecimal():
        raise LeaseError(f"sanlock: inquire answered {printable(text[:100])}")
    lockspace, name, path = (part.replace("\\:", ":") for part in parts[:3])
    return Lease(lockspace, name, LeaseArea(path, int(parts[3])))


def make_client() -> SanlockClient:
    """Return the client that this installation has.  Raises: LeaseError."""
    try:
        import sanlock  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return LibraryClient()
    return ModuleClient(sanlock)


class SanlockLeases:
    """A :class:`~spm.proof.ProvingLeases` of one process on one daemon."""

    def __init__(
        self,
        client: SanlockClient,
        timing: LeaseTiming,
        run_dir: str | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """*run_dir* is the daemon's; the library keeps the first one that a process uses.

        With *clock* (``CLOCK_BOOTTIME``, as the daemon has it) damaged records
        of dead hosts are mended, see :mod:`.host_records`.
        """
        self.client = client
        self.timing = timing
        self._run_dir = run_dir
        self._clock = clock
        self._mender = None if clock is None else RecordMender(timing, clock)
        self._connection = -1
        self._joined: dict[str, tuple[int, LeaseArea]] = {}
        self._held: set[Lease] = set()
        #: Of each lease that was taken, whether a write of its former holder may still be on its way.
        self._unsettled: dict[Lease, bool] = {}

    def _select(self) -> SanlockClient:
        if self._run_dir is not None:
            os.environ[RUN_DIR_VARIABLE] = self._run_dir
        return self.client

    def fileno(self) -> int:
        """Return the connection, made when first asked for; helper programs inherit it.

        One that broke is made anew while no lease is held.
        Raises: LeaseLost when one is, for the daemon no longer counts it as this process's.
        """
        if self._connection >= 0 and not self.connected():
            if self._held:
                names = ", ".join(sorted(lease.name for lease in self._held))
                raise LeaseLost(f"the connection to the lease manager broke while {names} was held")
            self.close()
        if self._connection < 0:
            self._connection = self._select().register()
        return self._connection

    def connected(self) -> bool:
        """See :class:`~spm.proof.ProvingLeases`."""
        if self._connection < 0:
            return False
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        return not any(events & (select.POLLHUP | select.POLLERR | select.POLLNVAL) for _, events in poll.poll(0))

    def close(self) -> None:
        """Close the connection, which frees the leases of this process."""
        if self._connection >= 0:
            os.close(self._connection)
            self._connection = -1
        self._held.clear()

    def drop(self, lease: Lease) -> None:
        """See :class:`~spm.proof.ProvingLeases`; the daemon frees the lease when it sees the connection closed."""
        self.close()

    def join(self, lockspace: str, host_id: int, area: LeaseArea) -> None:
        """See :class:`~storage_pool.leases.Leases`; waits, at most until the id's former holder is dead."""
        client = self._select()
        try:
            client.add_lockspace(lockspace, host_id, area, int(self.timing.io_timeout_s))
        except LeaseError as error:
            mine = error.code == -errno.EEXIST and client.has_lockspace(lockspace, host_id, area)
            if not mine:
                if error.code in _HELD:
                    raise LeaseHeld(f"host id {host_id} of {lockspace} is used by another host") from error
                if error.code in _DAMAGED:
                    self._mend_own(lockspace, host_id, area)
                raise
            told_s = io_timeout_of(read_sector(area, (host_id - 1) * self._first(area).sector_size))
            if told_s != int(self.timing.io_timeout_s):
                # Others count its death by that; ours would be judged by another clock.
                raise LeaseError(f"host id {host_id} is renewed with an I/O timeout of {told_s} s already") from error
        self._joined[lockspace] = host_id, area

    def _mend_own(self, lockspace: str, host_id: int, area: LeaseArea) -> None:
        """This host cannot join: its own record may be what is damaged, of an earlier life."""
        found = self._record(lockspace, area, host_id)
        if self._mender is not None and isinstance(found, Damaged):
            self._mender.look(found, host_id)

    def leave(self, lockspace: str, host_id: int, area: LeaseArea) -> None:
        """See :class:`~storage_pool.leases.Leases`."""
        self._select().rem_lockspace(lockspace, host_id, area)
        self._joined.pop(lockspace, None)

    def host_state(self, lockspace: str, host_id: int) -> HostState:
        """See :class:`~storage_pool.leases.Leases`."""
        return _STATES.get(self._select().host_flags(lockspace, host_id) & _STATE_MASK, "unknown")

    def members(self, lockspace: str) -> list[int]:
        """See :class:`~spm.proof.ProvingLeases`."""
        flags = self._select().all_flags(lockspace)
        return sorted(number for number, value in flags.items() if _STATES.get(value & _STATE_MASK) == "live")

    def acquire(self, lease: Lease, *, shared: bool = False, value: bool = False) -> LeaseOwner:
        """See :class:`~storage_pool.leases.Leases`; with *value* also :meth:`get_value` and :meth:`set_value`."""
        host_id, _ = self._own(lease.lockspace)
        before, taken_from = self._leader(lease), self._stored(lease)
        refuse_older_form(lease, before.alignment)
        try:
            self._select().acquire(self.fileno(), lease, shared, value)
        except LeaseError as error:
            if error.code in _HELD:
                raise LeaseHeld(f"the lease {lease.name} is held") from error
            if not self.connected():
                self.close()
            raise
        self._held.add(lease)
        leader = self._leader(lease)
        # It changed hands while the daemon waited for it: of whom it was taken is not known.
        passed_on = leader.version != before.version + 1
        self._unsettled[lease] = passed_on or (taken_from is not None and not self._renewed(lease, taken_from))
        return LeaseOwner(host_id, self._delta(lease.lockspace, host_id).owner_generation, leader.version)

    def release(self, lease: Lease) -> None:
        """See :class:`~storage_pool.leases.Leases`; one that is not held is fine."""
        try:
            self._select().release(self.fileno(), lease)
        except LeaseError as error:
            if error.code not in (-1, -errno.ENOENT):
                raise
        self._held.discard(lease)

    def held(self) -> list[Lease]:
        """Return the leases of this process as the daemon has them.  Raises: LeaseError, also for a passing reason."""
        return self._select().inquire(self.fileno())

    def set_value(self, lease: Lease, data: bytes) -> None:
        """Set the value block of a held lease, at most a sector; others see it after the release.

        Raises: LeaseError, also when the lease was acquired without its value.
        """
        self._bounded(len(data))
        self._select().set_value(lease, data)

    def get_value(self, lease: Lease, size: int = 512) -> bytes:
        """Return *size* bytes of the value block of a held lease; zeros if nobody set it.  Raises: LeaseError."""
        self._bounded(size)
        return self._select().get_value(lease, size)

    @staticmethod
    def _bounded(size: int) -> None:
        if not 0 < size <= max(_SECTORS):
            raise LeaseError(f"the value of a lease has 1 to {max(_SECTORS)} bytes, not {size}")

    def on_loss(self, program: str, arguments: Sequence[str] = ()) -> None:
        """Have the daemon run *program* first, instead of a signal, when the leases of this process are lost.

        If the leases are not free a while later the daemon kills this process
        all the same.  Raises: LeaseError.
        """
        if not program.startswith("/") or any(character in program for character in " \0"):
            raise LeaseError(f"no program for the lease manager: {printable(program)}")
        self._select().killpath(self.fileno(), program, list(arguments))

    def owner(self, lease: Lease) -> LeaseOwner | None:
        """See :class:`~storage_pool.leases.Leases`."""
        owner = self._stored(lease)
        if owner is None:
            return None
        delta = self._delta(lease.lockspace, owner.host_id, owner.generation)
        gone = delta.owner_generation != owner.generation or not delta.timestamp
        return None if gone or self.host_state(lease.lockspace, owner.host_id) in ("free", "dead") else owner

    def prove(self, lease: Lease) -> LeaseProof:
        """See :class:`~spm.proof.ProvingLeases`; the daemon's clock is this host's CLOCK_BOOTTIME."""
        host_id, _ = self._own(lease.lockspace)
        delta = self._delta(lease.lockspace, host_id)
        renewed_s = float(delta.timestamp) if delta.timestamp else float("-inf")
        return LeaseProof(renewed_s, delta.owner_generation, self._stored(lease))

    def settle_s(self, lease: Lease) -> float:
        """See :class:`~spm.proof.ProvingLeases`."""
        if lease in self._held:
            return self.timing.landing_s if self._unsettled.get(lease) else 0.0
        owner = self._stored(lease)
        return 0.0 if owner is None or self._renewed(lease, owner) else self.timing.landing_s

    def _renewed(self, lease: Lease, owner: LeaseOwner) -> bool:
        """Whether the host id of *owner* is in the life in which it took *lease*."""
        delta = self._delta(lease.lockspace, owner.host_id, owner.generation)
        return delta.owner_generation == owner.generation and bool(delta.timestamp)

    def _own(self, lockspace: str) -> tuple[int, LeaseArea]:
        if lockspace not in self._joined:
            raise LeaseError(f"the lockspace {lockspace} was not joined")
        return self._joined[lockspace]

    def _stored(self, lease: Lease) -> LeaseOwner | None:
        leader = self._leader(lease)
        if not leader.owner_id or not leader.timestamp:
            return None
        if leader.sector_size not in _SECTORS or leader.owner_id > _MAX_HOSTS:
            raise LeaseError(f"the record of the lease {lease.name} is damaged", path=lease.area.path)
        if released(leader, read_sector(lease.area, (1 + leader.owner_id) * leader.sector_size)):
            return None
        return LeaseOwner(leader.owner_id, leader.owner_generation, leader.version)

    def _leader(self, lease: Lease) -> Leader:
        leader = parse_leader(read_sector(lease.area, 0))
        if leader is None or not leader.valid or leader.lockspace:
            raise LeaseError(f"no lease {lease.name} at byte {lease.area.offset}", path=lease.area.path)
        if leader.resource_name != lease.name:
            raise LeaseError(f"the lease here is called {leader.resource_name!r}", path=lease.area.path)
        return leader

    def _delta(self, lockspace: str, host_id: int, generation: int = 0) -> Leader:
        """Return the record of a host id; *generation* is the last one that a lease names."""
        own, area = self._own(lockspace)
        found = self._record(lockspace, area, host_id, generation)
        if isinstance(found, Leader):
            return found
        told = f"the record of host id {host_id} is damaged"
        if self._mender is not None and own != host_id and self._renews(lockspace, area, own):
            told += ", it was mended" if self._mender.look(found, own) else ", it is mended when its host must be dead"
        raise LeaseError(told, path=area.path)

    def _record(self, lockspace: str, area: LeaseArea, host_id: int, generation: int = 0) -> Leader | Damaged:
        """Read the record of a host id; its sector size is that of the first record."""
        read_s = 0.0 if self._clock is None else self._clock()
        first = self._first(area)
        data = read_sector(area, (host_id - 1) * first.sector_size)
        record = parse_leader(data)
        if record is not None and record.valid:
            return record
        return Damaged(lockspace, host_id, area, first.sector_size, first.alignment, data, read_s, generation)

    @staticmethod
    def _first(area: LeaseArea) -> Leader:
        first = parse_leader(read_sector(area, 0))
        if first is None or first.sector_size not in _SECTORS:
            raise LeaseError("no lockspace here", path=area.path)
        return first

    def _renews(self, lockspace: str, area: LeaseArea, own: int) -> bool:
        """Whether this host's own record is good and fresh: it sees storage as it is."""
        record = self._record(lockspace, area, own)
        now_s = 0.0 if self._clock is None else self._clock()
        return isinstance(record, Leader) and now_s - record.timestamp < self.timing.deadline_s
