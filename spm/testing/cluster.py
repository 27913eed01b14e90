# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A pool of hosts in virtual time, with faults by seed.

::

    outcome = simulate(seed=7, hosts=250, hours=24)
    assert not outcome.findings

Faults: partition from storage, slow storage, pause of the process, of the
daemon, of both, of the whole host, crash of the process, power cut, hosts
whose start fails, lost and torn mailbox pages, changes reported as failed
that landed, versions of the lease that go back, clocks that drift.

Invariant: a seed, a size and the rules determine everything; the digest of
the trace proves it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from spm.election import Candidate
from spm.mailbox import ExtendRequest
from spm.timing import ElectionTiming, LeaseTiming

from .checkers import Checkers, Finding
from .kernel import Kernel
from .leases import SimSpace
from .node import AREA, DOMAIN, SDM, Node
from .pool import SimPool
from .rules import Rules

__all__ = ["Outcome", "SimCluster", "simulate"]

HOUR_S = 3600.0
#: The last part of a history is without faults, so that everything must come to an end.
QUIET_S = 900.0

FAULTS = (
    "partition",
    "slow",
    "pause_process",
    "pause_daemon",
    "pause_both",
    "pause_host",
    "crash",
    "daemon_restart",
    "power",
    "broken_start",
    "stop",
)


class Outcome(NamedTuple):
    """What a history showed."""

    seed: int
    findings: tuple[Finding, ...]
    digest: str
    terms: int
    writes: int
    answered: int
    faults: int
    events: int
    longest_absence_s: float


class SimCluster:
    """Hosts on one storage; run it with :meth:`run`."""

    def __init__(
        self,
        seed: int,
        *,
        hosts: int = 250,
        rules: Rules | None = None,
        timing: LeaseTiming | None = None,
        fault_s: float = 120.0,
        operation_s: float = 20.0,
        wish_s: float = 60.0,
    ) -> None:
        """*fault_s*, *operation_s*, *wish_s*: mean time between faults, changes, requests to extend."""
        self.kernel = Kernel(seed)
        self.seed = seed
        self.size = hosts
        self.rules = rules or Rules()
        self.timing = timing or LeaseTiming()
        self.election = ElectionTiming()
        self.fault_s, self.operation_s, self.wish_s = fault_s, operation_s, wish_s
        self.error_rate = 0.01
        self.space = SimSpace(self.kernel.time, self.timing)
        if not self.rules.wait_for_death:
            self.space.death_s = self.timing.limit_s
        absence_s = self.timing.death_s + 3 * self.timing.landing_s + 4 * self.election.round_s
        self.checkers = Checkers(self.kernel.time, self.timing.deadline_s * 1.002 + 0.1, absence_s)
        self.pool = SimPool(self.kernel, self.checkers, hosts)
        self.parked: dict[Node, float] = {}
        self.sick: dict[Node, int] = {}
        self.faults = self.answers = 0
        self.ids = 0
        self._candidates: tuple[int, tuple[Candidate, ...]] = (-1, ())
        self.nodes: list[Node] = []
        self.nodes.extend(Node(self, number) for number in range(1, hosts + 1))

    def make_id(self) -> str:
        """Return the UUID of a new volume."""
        self.ids += 1
        return f"00000000-0000-4000-8000-{self.ids:012x}"

    def candidates(self) -> tuple[Candidate, ...]:
        """Return the live hosts, as seen at most five seconds ago."""
        look = int(self.kernel.now_s / 5)
        if self._candidates[0] != look:
            live = (node for node in self.nodes if self.space.state(DOMAIN, node.host_id) == "live")
            self._candidates = look, tuple(Candidate(node.host_id, node.priority) for node in live)
        return self._candidates[1]

    # -- what nodes tell -----------------------------------------------------

    def settle(self, node: Node) -> None:
        """Note since when a host could manage without a break."""
        undisturbed = not self.sick.get(node) and node.answers and node.kernel.now_s >= node.broken_until_s
        if not undisturbed:
            node.able_since_s = None
        elif node.able_since_s is None:
            node.able_since_s = self.kernel.now_s

    def released(self) -> None:
        """The lease is free; its version may be set back by a host paused in a ballot."""
        if self.kernel.chance.random() < 0.2:
            self.space.regress(SDM, self.kernel.chance.randint(1, 9))
        self.wake(self.kernel.now_s)

    def wake(self, time_s: float) -> None:
        """Let hosts that saw a held lease look again, each at its own next turn."""
        poll_s = self.election.poll_s

        def look() -> None:
            for node, since_s in self.parked.items():
                turn_s = since_s + math.ceil((self.kernel.now_s - since_s) / poll_s) * poll_s
                self.kernel.at(turn_s, node.process._step)
            self.parked.clear()

        self.kernel.at(time_s, look)

    def answered(self, request: ExtendRequest) -> None:
        """A host got the room that it asked for."""
        self.answers += 1
        answers = self.checkers.answered
        answers[request.volume] = max(answers.get(request.volume, 0), request.size_mib)

    # -- faults ---------------------------------------------------------------

    def _next_fault(self) -> None:
        chance = self.kernel.chance
        self.kernel.after(chance.expovariate(1 / self.fault_s), self._next_fault)
        if self.kernel.now_s > self.end_s - QUIET_S:
            return
        self.faults += 1
        kind = chance.choice(FAULTS)
        owner = self.space.leader(SDM).owner
        targeted = owner is not None and chance.random() < 0.6
        node = self.nodes[owner.host_id - 1] if targeted and owner else chance.choice(self.nodes)
        duration_s = chance.choice((1.0, 5.0, 30.0, 60.0, 90.0, 150.0, 300.0)) * chance.uniform(0.5, 1.5)
        self.kernel.trace(f"fault {kind} {node.name} {duration_s:.3f}")
        getattr(self, f"_{kind}")(node, duration_s)
        self.settle(node)

    def _sicken(self, node: Node) -> None:
        self.sick[node] = self.sick.get(node, 0) + 1
        node.daemon.sicken()
        seat = self.space.seats.get((DOMAIN, node.host_id))
        if seat is not None:
            self.wake(self.space.renewed_s(seat) + self.space.death_s + 0.001)

    def _heal(self, node: Node) -> None:
        """The daemon goes on; one that was away too long gives up its lockspace and kills its clients."""
        self.sick[node] -= 1
        if self.sick[node]:
            return
        seat = self.space.seats.get((DOMAIN, node.host_id))
        too_late = seat is not None and self.kernel.now_s - self.space.renewed_s(seat) > self.timing.limit_s
        if too_late:
            node.die()
            node.term = None
        node.daemon.recover()
        node.orphaned()
        if not node.process.alive:
            self._restart_later(node)
        self.settle(node)

    def _restart(self, node: Node) -> None:
        if not node.process.alive and not self.sick.get(node):
            node.boot()

    def _partition(self, node: Node, duration_s: float) -> None:
        node.daemon.reachable = False
        self._sicken(node)

        def limit() -> None:
            # The daemon runs and kills its clients at the renewal limit.
            if not node.daemon.reachable and not node.daemon.healthy and self._age_s(node) >= self.timing.limit_s - 1:
                node.die()

        def end() -> None:
            node.daemon.reachable = True
            self._heal(node)

        self.kernel.after(self.timing.limit_s, limit)
        self.kernel.after(duration_s, end)

    def _age_s(self, node: Node) -> float:
        seat = self.space.seats.get((DOMAIN, node.host_id))
        return self.kernel.now_s - self.space.renewed_s(seat) if seat is not None else 0.0

    def _restart_later(self, node: Node) -> None:
        self.kernel.after(self.kernel.chance.uniform(1, 10), lambda: self._restart(node))

    def _slow(self, node: Node, duration_s: float) -> None:
        node.slow_s = self.kernel.chance.choice((1.0, 10.0, 60.0, 79.0))

        def end() -> None:
            node.slow_s = 0.0
            node.able_since_s = None
            self.settle(node)

        self.kernel.after(duration_s, end)

    def _pause_process(self, node: Node, duration_s: float) -> None:
        node.gate.open_s = max(node.gate.open_s, self.kernel.now_s + duration_s)
        self.kernel.after(duration_s + 0.01, lambda: self.settle(node))

    def _pause_daemon(self, node: Node, duration_s: float) -> None:
        self._sicken(node)
        self.kernel.after(duration_s, lambda: self._heal(node))

    def _pause_both(self, node: Node, duration_s: float) -> None:
        self._pause_process(node, duration_s)
        # The process may go on a little before the daemon notices.
        self._pause_daemon(node, duration_s + self.kernel.chance.choice((0.0, 0.5, 3.0)))

    def _pause_host(self, node: Node, duration_s: float) -> None:
        node.whole.open_s = max(node.whole.open_s, self.kernel.now_s + duration_s)
        node.paused_s += duration_s
        self._pause_daemon(node, duration_s + self.kernel.chance.choice((0.0, 0.5, 3.0)))

    def _crash(self, node: Node, duration_s: float) -> None:
        node.die()
        self.kernel.after(0.1, node.orphaned)
        self._restart_later(node)

    def _daemon_restart(self, node: Node, duration_s: float) -> None:
        """The daemon dies alone and comes back; the process that it knew goes on, its leases do not."""
        self._sicken(node)
        node.daemon.life += 1

        def end() -> None:
            if node.process.alive and node.daemon.reachable and (DOMAIN, node.host_id) in self.space.seats:
                node.leases.join(DOMAIN, node.host_id, AREA)
                self.released()
            self._heal(node)

        self.kernel.after(min(duration_s, 30.0), end)

    def _power(self, node: Node, duration_s: float) -> None:
        if node.child is not None:
            node.child.kill()
        node.die()
        self._sicken(node)
        node.term = None

        self.kernel.after(duration_s, lambda: self._heal(node))

    def _broken_start(self, node: Node, duration_s: float) -> None:
        node.broken_until_s = self.kernel.now_s + 10 * duration_s
        node.priority, before = 10, node.priority

        def end() -> None:
            node.priority = before
            self.settle(node)

        self.kernel.at(node.broken_until_s, end)
        self._stop(node, duration_s)

    def _stop(self, node: Node, duration_s: float) -> None:
        owner = self.space.leader(SDM).owner
        if owner is not None:
            self.nodes[owner.host_id - 1].stop_asked = True

    # -- load and checks ---------------------------------------------------------

    def _next_wish(self) -> None:
        chance = self.kernel.chance
        self.kernel.after(chance.expovariate(1 / self.wish_s), self._next_wish)
        volumes = [name for name, volume in self.pool.state.volumes.items() if not volume.initializing]
        if not volumes or self.kernel.now_s > self.end_s - QUIET_S / 2:
            return
        name = chance.choice(volumes)
        size = len(self.pool.state.volumes[name].extents) + chance.randint(1, 3)
        if size <= 40:
            self.checkers.requested[name] = max(size, self.checkers.requested.get(name, 0))
            chance.choice(self.nodes).wish(ExtendRequest(DOMAIN, name, size))

    def _look(self) -> None:
        self.kernel.after(30.0, self._look)
        checkers = self.checkers
        owner = self.space.leader(SDM).owner
        if checkers.serving is not None and (
            owner is None or self.space.state(DOMAIN, owner.host_id, owner.generation) in ("free", "dead")
        ):
            checkers.stopped(checkers.serving)
        able = [node.able_since_s for node in self.nodes if node.able_since_s is not None and node.answers]
        blocked = owner is not None and self.space.state(DOMAIN, owner.host_id, owner.generation) == "live"
        if blocked and owner is not None and not self.nodes[owner.host_id - 1].answers:
            # A process that stands still with a live daemon keeps its lease; that is the price of S1.
            checkers.absent_since_s = self.kernel.now_s
        checkers.look(min(able) if able else None)

    def run(self, hours: float) -> Outcome:
        """Run a history of *hours* and judge its end."""
        self.end_s = hours * HOUR_S + QUIET_S
        self.kernel.after(60.0 + self.kernel.chance.expovariate(1 / self.fault_s), self._next_fault)
        for first in (self._next_wish, self._look):
            self.kernel.after(60.0, first)
        self.pool.trouble = 0.05
        self.kernel.at(self.end_s - QUIET_S, self._calm)
        self.kernel.run(self.end_s)
        checkers = self.checkers
        if checkers.serving is None:
            checkers.report("S6", "no manager after the faults ended")
        if self.pool.state.tasks and checkers.serving is None:
            checkers.report("S5", "tasks are open after the faults ended")
        waiting = [node.name for node in self.nodes if node.wishes]
        if waiting:
            checkers.report("S3", f"requests of {waiting[0]} were never answered")
        return Outcome(
            self.seed,
            tuple(checkers.findings),
            self.kernel.hash(),
            checkers.terms,
            checkers.writes,
            self.answers,
            self.faults,
            self.kernel.events,
            checkers.longest_absence_s,
        )

    def _calm(self) -> None:
        self.pool.trouble = self.error_rate = 0.0
        for node in self.nodes:
            node.broken_until_s = self.kernel.now_s
            self.settle(node)


def simulate(
    seed: int, *, hosts: int = 250, hours: float = 24.0, rules: Rules | None = None, fault_s: float = 120.0
) -> Outcome:
    """Run one history; *fault_s* is the mean time between faults."""
    return SimCluster(seed, hosts=hosts, rules=rules, fault_s=fault_s).run(hours)
