# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""One simulated host: it runs the product's own machines on a simulated storage.

The election, the judgement of the lease, the mailbox and the epochs are the
real ones; what is simulated is the daemon, the clock, the network and the
storage.  A check of the token and the begin of the write that follows are one
step, as they are microseconds apart in reality.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from qcowlib.errors import StorageError
from spm.election import Election, PoolView
from spm.errors import LeaseError, LeaseHeld, LeaseLost
from spm.lease_watch import LeaseToken, LeaseWatch, next_epoch, settling_s
from spm.mailbox import ExtendRequest, HsmMailbox, SpmMailbox
from spm.proof import LeaseProof
from storage_pool.leases import Lease, LeaseArea, LeaseOwner

from . import pool as change
from .checkers import PoolState, SimTask, Term
from .kernel import Gate, Process, Steps
from .leases import SimHost, SimLeases

if TYPE_CHECKING:
    from .cluster import SimCluster

__all__ = ["AREA", "DOMAIN", "SDM", "Node"]

DOMAIN: Final = "5d000000-0000-4000-8000-000000000001"
AREA: Final = LeaseArea("ids", 0)
SDM: Final = Lease(DOMAIN, "SDM", LeaseArea("leases", 1 << 20))
VOLUMES: Final = 40


class _LaxWatch(LeaseWatch):
    """A watch that may forget its deadline."""

    deadline_matters = True

    def prove(self, proof: LeaseProof, stored_epoch: int, now_s: float) -> str:  # type: ignore[override]
        if not self.deadline_matters:
            proof = proof._replace(renewed_s=now_s)
        return super().prove(proof, stored_epoch, now_s)


class Node:
    """A host with its daemon, its manager process and its mailbox."""

    def __init__(self, cluster: SimCluster, host_id: int) -> None:
        self.cluster = cluster
        self.kernel = cluster.kernel
        self.rules = cluster.rules
        self.host_id = host_id
        self.name = f"host{host_id}"
        self.daemon = SimHost(cluster.space, self.name)
        self.rate = 1 + self.kernel.chance.uniform(-1e-3, 1e-3)
        self.offset_s = self.kernel.chance.uniform(0, 1e6)
        self.priority = self.kernel.chance.choice((1, 5, 5, 5, 9))
        self.gate = Gate()
        self.whole = Gate()
        self.paused_s = 0.0
        self.slow_s = 0.0
        self.broken_until_s = 0.0
        self.last_epoch = 0
        self.in_flight_s = 0.0
        self.term: Term | None = None
        self.token: LeaseToken | None = None
        self.seen: PoolState | None = None
        self.child: Process | None = None
        self.stop_asked = False
        self.able_since_s: float | None = None
        self.wishes: dict[ExtendRequest, None] = {}
        self.mail: Process | None = None
        self.boot()

    # -- clock and storage -------------------------------------------------

    def clock(self) -> float:
        """Return the host's own time."""
        paused_s = 0.0 if self.rules.boot_clock else self.paused_s
        return self.to_clock(self.kernel.now_s) - paused_s

    def to_clock(self, time_s: float) -> float:
        """Return what the daemon's clock shows at a time of the storage's."""
        return time_s * self.rate + self.offset_s

    def latency(self) -> float:
        """Return how long the next access takes."""
        return self.kernel.chance.uniform(0.001, 0.05 + self.slow_s)

    def reach(self) -> None:
        """Raise StorageError when this host does not reach storage."""
        if not self.daemon.reachable:
            raise StorageError(5, path=self.name, operation="read")

    # -- life --------------------------------------------------------------

    def boot(self) -> None:
        """Start the process of this host, after a crash or at the beginning."""
        self.leases = SimLeases(self.daemon, self.to_clock)
        self.election = Election(self.host_id, self.cluster.election)
        self.box: HsmMailbox | None = None
        self.mail = None
        self.process = Process(self.kernel, self._life(), self.gate, self.whole)

    def _life(self) -> Steps:
        yield self.kernel.chance.uniform(0, 2)
        while True:
            try:
                self.leases.join(DOMAIN, self.host_id, AREA)
                break
            except (StorageError, LeaseHeld):
                yield self.cluster.election.poll_s
        yield 3 * self.cluster.timing.io_timeout_s
        self.cluster.settle(self)
        self.open_box()
        while True:
            view = self.look()
            action = self.election.observe(self.clock(), view)
            if action.kind == "contend":
                yield from self._contend()
            elif view is not None and not view.free:
                self.cluster.parked[self] = self.kernel.now_s
                yield math.inf
            else:
                yield max(0.05, (action.again_s - self.clock()) / self.rate)

    def look(self) -> PoolView | None:
        """Return what this host sees of the lease."""
        try:
            owner = self.leases.owner(SDM)
        except StorageError:
            return None
        if owner is not None and not self.rules.arbitration and not self.cluster.nodes[owner.host_id - 1].answers:
            owner = None
        epoch = self.cluster.pool.state.epoch
        if owner is not None:
            return PoolView(owner.host_id, self.cluster.space.state(DOMAIN, owner.host_id), None, epoch, ())
        return PoolView(None, "free", None, epoch, self.cluster.candidates())

    @property
    def answers(self) -> bool:
        """Whether the host would answer a call over the network."""
        now_s = self.kernel.now_s
        return self.daemon.reachable and max(self.gate.open_s, self.whole.open_s) <= now_s and self.process.alive

    # -- the manager's role --------------------------------------------------

    def _contend(self) -> Steps:
        try:
            if not self.rules.arbitration:
                self.cluster.space.leader(SDM).owner = None
            unreleased_s = self.leases.settle_s(SDM)
            own = self.leases.acquire(SDM)
        except (LeaseHeld, LeaseError, StorageError) as error:
            self.election.failed(self.clock(), held=isinstance(error, LeaseHeld))
            return
        self.term = self.cluster.checkers.acquired(self.name)
        self.kernel.trace(f"{self.name} acquired {own.version}")
        self.stop_asked = False
        served = lost = False
        try:
            self.reach()
            pool = self.cluster.pool
            if self.rules.settle:
                yield settling_s(self.cluster.timing, unreleased_s, pool.state.lease_version, own)
            yield self.latency()
            self.reach()
            epoch = next_epoch(pool.state.epoch, self.last_epoch) if self.rules.own_epoch else own.version
            self.last_epoch = max(self.last_epoch, epoch)
            self.token = self._make_token(own, epoch)
            if self.rules.read_again or self.seen is None:
                self.seen = pool.state
            yield from self._write(self.seen._replace(lease_version=own.version))
            if self.kernel.now_s < self.broken_until_s:
                raise StorageError(32, path=self.name, operation="mount")
            if self.rules.recover_tasks:
                yield from self._recover()
            self._check()
            self.election.won()
            served = True
            self.cluster.checkers.serves(self.term, pool.state)
            self.kernel.trace(f"{self.name} serves epoch {epoch}")
            yield from self._serve()
        except LeaseLost:
            lost = True
        except (StorageError, LeaseError):
            pass
        yield from self._give_back()
        if served:
            self.election.ended(self.clock(), lost=lost)
        else:
            self.election.failed(self.clock(), held=not self.rules.set_aside)

    def _make_token(self, own: LeaseOwner, epoch: int) -> LeaseToken:
        timing = self.cluster.timing
        proof = self.leases.prove(SDM)
        watch = _LaxWatch(timing, own, epoch, proof, self.clock())
        watch.deadline_matters = self.rules.deadline

        def prove() -> tuple[LeaseProof, int]:
            if not self.rules.recheck:
                return LeaseProof(self.clock(), watch.own.generation, watch.own), 0
            return self.leases.prove(SDM), self.cluster.pool.state.epoch

        leases = self.leases

        def connected() -> bool:
            return leases.connected() or not self.rules.connection

        return LeaseToken(watch, self.clock, prove, lambda reason: self._end_child(), connected)

    def _check(self) -> LeaseToken:
        token, term = self.token, self.term
        if token is None or term is None:
            raise LeaseLost("no term")
        token.check()
        self.cluster.checkers.allowed(term)
        return token

    def _begin(self, term: Term, new: PoolState) -> float:
        """Begin a change; returns how long it takes."""
        cluster = self.cluster
        latency_s = min(self.latency(), cluster.timing.landing_s - 0.1)
        seat = cluster.space.seats[DOMAIN, self.host_id]
        cluster.checkers.write_begins(term, self.kernel.now_s - cluster.space.renewed_s(seat))
        self.in_flight_s = max(self.in_flight_s, self.kernel.now_s + latency_s)
        if self.daemon.reachable:
            cluster.pool.submit(term, new, latency_s)
        return latency_s

    def _write(self, new: PoolState) -> Steps:
        token = self._check()
        term = self.term
        if term is None:
            return
        new = new._replace(epoch=token.epoch)
        yield self._begin(term, new)
        self.reach()
        if self.kernel.chance.random() < self.cluster.error_rate:
            # Reported as failed, and landed nevertheless.
            self.seen = self.cluster.pool.state
            raise StorageError(5, path=self.name, operation="write")
        self.seen = new

    def _change(self, make: Callable[[PoolState], PoolState]) -> Steps:
        if self.seen is not None:
            new = make(self.seen)
            if new is not self.seen:
                yield from self._write(new)

    def _recover(self) -> Steps:
        for name, task in list(self.seen.tasks.items() if self.seen else ()):
            yield from self._change(lambda state, volume=task.volume: change.removed(state, volume))  # type: ignore[misc]
            yield from self._change(lambda state, name=name: change.without_task(state, name))  # type: ignore[misc]

    def _serve(self) -> Steps:
        chance = self.kernel.chance
        manager = SpmMailbox(self.cluster.size)
        next_s = self.kernel.now_s + chance.expovariate(1 / self.cluster.operation_s)
        while True:
            yield 1.0
            try:
                yield from self._mail(manager)
                if self.kernel.now_s >= next_s:
                    next_s = self.kernel.now_s + chance.expovariate(1 / self.cluster.operation_s)
                    yield from self._operation()
                if self.stop_asked:
                    break
            except (StorageError, LeaseError):
                self._check()
                yield 1.0
                self.reach()
                self.seen = self.cluster.pool.state
                yield from self._recover()
        if not self.rules.release_last:
            self.leases.release(SDM)
            self.cluster.released()
            for _ in range(20):
                yield 1.0
                yield from self._mail(manager)

    def _operation(self) -> Steps:
        state = self.seen
        if state is None:
            return
        kind = self.kernel.chance.choice(("create", "create", "delete", "child"))
        name = f"t{self.kernel.chance.getrandbits(32):08x}"
        if kind == "child":
            yield from self._run_child()
        elif kind == "create" and len(state.volumes) < VOLUMES:
            yield from self._create(name, self.cluster.make_id())
        elif kind == "delete" and state.volumes:
            volume = self.kernel.chance.choice(sorted(state.volumes))
            epoch = self._check().epoch
            yield from self._change(lambda state: change.with_task(state, name, SimTask("delete", volume, epoch)))
            yield from self._change(lambda state: change.removed(state, volume))
            yield from self._change(lambda state: change.without_task(state, name))

    def _create(self, name: str, volume: str) -> Steps:
        epoch = self._check().epoch
        task = SimTask("create", volume, epoch)
        steps: list[Callable[[PoolState], PoolState]] = [
            lambda state: change.with_task(state, name, task),
            lambda state: change.with_volume(state, volume, initializing=True),
            lambda state: change.with_volume(state, volume, initializing=False),
            lambda state: change.without_task(state, name),
        ]
        if not self.rules.record_first:
            steps[0], steps[1] = steps[1], steps[0]
        for step in steps:
            yield from self._change(step)

    # -- helper programs -----------------------------------------------------

    def _run_child(self) -> Steps:
        token = self._check()
        limit_s = token.watch.deadline_s
        term, state = self.term, self.seen
        if term is None or state is None:
            return
        content = state._replace(epoch=token.epoch)

        def steps() -> Steps:
            for _ in range(40):
                if self.rules.bound_children and self.clock() >= limit_s:
                    return
                yield self._begin(term, content)
                yield 4.0

        self.child = Process(self.kernel, steps(), self.whole)
        while self.child is not None and self.child.alive:
            yield 1.0
            self._check()
        self.seen = content

    def _end_child(self) -> None:
        if self.child is not None and self.rules.bound_children:
            self.child.kill()
            self.child = None

    # -- the end of a term -----------------------------------------------------

    def _give_back(self) -> Steps:
        term = self.term
        if self.token is not None:
            self.token.give_up()
        self._end_child()
        if term is not None:
            self.cluster.checkers.stopped(term)
        yield max(0.0, self.in_flight_s - self.kernel.now_s)
        while self.term is not None:
            try:
                self._release()
            except (StorageError, LeaseError):
                yield 1.0

    def _release(self) -> None:
        self.leases.release(SDM)
        self.term = None
        self.kernel.trace(f"{self.name} released")
        self.cluster.released()

    def die(self) -> None:
        """The process is killed, and its helper programs with it."""
        self.process.kill()
        if self.mail is not None:
            self.mail.kill()
        self.cluster.parked.pop(self, None)
        self._end_child()
        if self.term is not None:
            self.cluster.checkers.stopped(self.term)
        self.token = None
        self.able_since_s = None

    def orphaned(self) -> None:
        """The daemon sees that its client is gone, once no call of it is in the kernel any more."""
        if self.term is None or self.process.alive:
            return
        if self.rules.bound_children and self.in_flight_s > self.kernel.now_s:
            self.kernel.at(self.in_flight_s + 0.01, self.orphaned)
        elif self.daemon.healthy and self.daemon.reachable and self.leases.alive(DOMAIN):
            self._release()

    # -- the mailbox -------------------------------------------------------------

    def open_box(self) -> None:
        """Begin a new life of this host's mailbox."""
        self.box = HsmMailbox(self.host_id)
        self.box.start(self.cluster.pool.read_box("outbox", self.host_id))
        for wish in self.wishes:
            self.box.post(wish)
        self._start_mail()

    def wish(self, request: ExtendRequest) -> None:
        """A guest of this host needs more room."""
        self.wishes[request] = None
        if self.box is not None and self.process.alive:
            self.box.post(request)
            self._start_mail()

    def _start_mail(self) -> None:
        if self.mail is None or not self.mail.alive:
            self.mail = Process(self.kernel, self._correspond(), self.gate, self.whole)

    def _correspond(self) -> Steps:
        pool, box = self.cluster.pool, self.box
        waited = 0
        while box is not None and (box.waiting or box.dirty):
            yield 1.0
            waited += 1
            if waited % 10 == 0:
                box.resend()
            if not self.daemon.reachable:
                continue
            if box.dirty and pool.write_boxes("inbox", box.offset, box.begin_write()):
                box.written()
            for reply in box.receive(pool.read_box("outbox", self.host_id)):
                request = reply.request
                if reply.size_mib:
                    self.wishes.pop(request, None)
                    self.cluster.answered(request)
                elif request.volume in pool.state.volumes:
                    box.post(request)
                else:
                    self.wishes.pop(request, None)

    def _mail(self, manager: SpmMailbox) -> Steps:
        pool = self.cluster.pool
        self._check()
        self.reach()
        manager.scan(pool.inbox())
        for incoming in manager.pending():
            request = incoming.request
            size = request.size_mib
            if self.seen is not None and request.volume in self.seen.volumes:
                if not self.rules.absolute_size:
                    size = len(self.seen.volumes[request.volume].extents) + 1
                yield from self._change(
                    lambda state, name=request.volume, size=size: change.extended(state, name, size)  # type: ignore[misc]
                )
                manager.reply(incoming, request.size_mib)
            else:
                manager.reply(incoming, 0)
        if manager.dirty:
            whole = [pool.write_boxes("outbox", offset, data) for offset, data in manager.begin_write()]
            if all(whole):
                manager.written()
